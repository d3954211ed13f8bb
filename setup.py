"""What pyproject.toml cannot say: where three folders are installed, and a path file (.pth) of Python.

The folders `trainers`, `planners` and `dataset_conversion` become packages in `nnunet_semiseg`. Python runs the path
file at each start. It tells nnU-Net where our trainers are.
"""

from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

PTH_NAME = "nnunet_semiseg.pth"

# Runs at every start of the interpreter: os is loaded by then anyway, and a failure would print a traceback
# each time. What the user has set comes first, so that their trainer wins over ours of the same name.
PTH_CODE = """
try:
    folder = {folder}
    theirs = os.environ.get("nnUNet_extTrainer", "")
    if folder not in theirs.split(os.pathsep):
        os.environ["nnUNet_extTrainer"] = os.pathsep.join(filter(None, [theirs, folder]))
except Exception:
    pass
"""


def pth(folder: str) -> str:
    """The content of the .pth file, in ASCII, because versions of Python read it in different encodings.

    Args:
        folder: a Python expression. Its value, when Python starts, is the folder with our trainers.
    """
    return f"import os; exec({PTH_CODE.format(folder=folder)!a})\n"


# `sitedir`, a local of site.addpackage, is the site-packages that the .pth lies in: wheels can be moved.
WHEEL_PTH = pth("os.path.join(sitedir, 'nnunet_semiseg', 'nnunet_ext')")
EDITABLE_PTH = pth(ascii(str(Path("nnunet_semiseg", "nnunet_ext").resolve())))


class BuildPy(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            Path(self.build_lib, PTH_NAME).write_text(WHEEL_PTH, encoding="utf-8")

    def get_outputs(self, include_bytecode=True):
        pth_file = [] if self.editable_mode else [str(Path(self.build_lib, PTH_NAME))]
        return super().get_outputs(include_bytecode) + pth_file


class EditableWheel(editable_wheel):
    def _run_build_commands(self, dist_name, unpacked_wheel, *args):
        # All that lies in unpacked_wheel goes into the wheel and its RECORD, so uninstalling removes it.
        Path(unpacked_wheel, PTH_NAME).write_text(EDITABLE_PTH, encoding="utf-8")
        return super()._run_build_commands(dist_name, unpacked_wheel, *args)


if __name__ == "__main__":  # the tests read this file
    outer = {f"nnunet_semiseg.{folder}": folder for folder in ("trainers", "planners", "dataset_conversion")}
    # A namespace search, for nnunet_ext is no package: nnU-Net imports what is in it by its bare name.
    inner = find_namespace_packages(include=["nnunet_semiseg", "nnunet_semiseg.*"], exclude=["*.__pycache__"])
    setup(
        packages=[*inner, *outer],
        package_dir=outer,
        package_data={
            "nnunet_semiseg": ["py.typed"],
            "nnunet_semiseg.dataset_conversion": ["splits/*.json"],
            "nnunet_semiseg.evaluation": ["templates/*.html"],
            "nnunet_semiseg.review": ["templates/*.html"],
        },
        cmdclass={"build_py": BuildPy, "editable_wheel": EditableWheel},
    )

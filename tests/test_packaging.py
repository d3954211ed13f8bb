"""What pip installs shows nnU-Net our trainers, keeps what the user has set, and goes without a trace."""

import ast
import os
import runpy
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import nnunetv2
import pytest

from nnunet_semiseg.discovery import ext_folder

ROOT = Path(__file__).parents[1]
FOLDERS = ("nnunet_semiseg", "trainers", "planners", "dataset_conversion")
VARIABLE = "nnUNet_extTrainer"
CLEAN = {k: v for k, v in os.environ.items() if k not in (VARIABLE, "PYTHONPATH")}

# Runs in the fresh environment, far from the checkout.
FIND_TRAINERS = """
import os, pickle, sys
import nnunet_semiseg
from nnunet_semiseg.discovery import ext_folder, iter_classes
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find

assert nnunet_semiseg.__file__.startswith(sys.argv[1]), nnunet_semiseg.__file__
assert os.environ["nnUNet_extTrainer"] == ext_folder(), os.environ["nnUNet_extTrainer"]
trainers = list(iter_classes("trainers"))
assert "StubTrainer" in [t.__name__ for t in trainers]
for trainer in trainers:
    assert find(trainer.__name__) is trainer
    assert pickle.loads(pickle.dumps(trainer)) is trainer
"""


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, env=CLEAN, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def setup_py():
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture(params=["WHEEL_PTH", "EDITABLE_PTH"])
def pth(request, setup_py, tmp_path, monkeypatch):
    """A folder with the .pth in it, and the folder which that is to add to the variable."""
    monkeypatch.setenv(VARIABLE, "to be restored")
    (tmp_path / "ours.pth").write_text(setup_py[request.param])
    in_wheel = str(tmp_path / "nnunet_semiseg" / "nnunet_ext")
    return tmp_path, in_wheel if request.param == "WHEEL_PTH" else ext_folder()


@pytest.mark.parametrize("theirs", [None, "", "/theirs", f"/theirs{os.pathsep}/too"])
def test_pth_appends_once_to_what_is_set(pth, monkeypatch, theirs):
    folder, added = pth
    monkeypatch.delenv(VARIABLE)
    if theirs is not None:
        monkeypatch.setenv(VARIABLE, theirs)
    for _ in range(2):
        site.addsitedir(str(folder))
        assert os.environ[VARIABLE] == (theirs + os.pathsep if theirs else "") + added


def test_pth_never_fails(pth, monkeypatch):
    """Here `sitedir` is missing, then the whole environment."""
    line = next(pth[0].glob("*.pth")).read_text()
    exec(line, {})
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", None)
        exec(line, {})


def test_pth_is_one_ascii_line_that_imports_os_only(pth):
    text = next(pth[0].glob("*.pth")).read_text()
    assert text.isascii() and text.count("\n") == 1
    imports, call = ast.parse(text).body
    assert ast.unparse(imports) == "import os"
    assert "import" not in ast.literal_eval(call.value.args[0])


def test_package_itself_is_cheap_to_import():
    code = "import sys, nnunet_semiseg.discovery; assert not {'torch', 'nnunetv2'} & set(sys.modules)"
    run(sys.executable, "-c", code, cwd=ROOT)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what is packed, with a trainer added: nothing stale, and nothing left in the real one."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, copy)
    (copy / "trainers" / "stub.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n\n\n"
        "class StubTrainer(nnUNetTrainer):\n    pass\n"
    )
    (copy / "trainers" / "needy.py").write_text("import no_such_package\n")
    (copy / "nnunet_semiseg" / "new_folder").mkdir()
    (copy / "nnunet_semiseg" / "new_folder" / "module.py").touch()
    return copy


@pytest.fixture(scope="module")
def wheels(checkout, tmp_path_factory):
    """The wheel as built from the checkout, and from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation"]
    run(*build, "--outdir", out / "sdist", cwd=checkout)
    shutil.rmtree(checkout / "build", ignore_errors=True)
    run(*build, "--wheel", "--outdir", out / "checkout", cwd=checkout)
    return {way: next((out / way).glob("*.whl")) for way in ("checkout", "sdist")}


@pytest.mark.slow
def test_wheel_holds_every_module_under_one_name(wheels, checkout):
    files, of_sdist = (
        {file.filename: file.CRC for file in zipfile.ZipFile(wheels[way]).infolist()} for way in ("checkout", "sdist")
    )
    assert of_sdist == files  # so that only one of them has to be installed below
    names = list(files)
    assert {n.partition("/")[0] for n in names if ".dist-info/" not in n} == {
        "nnunet_semiseg",
        "nnunet_semiseg.pth",
    }
    modules = {f.relative_to(checkout) for folder in FOLDERS for f in (checkout / folder).rglob("*.py")}
    packed = {str(m) if m.parts[0] == "nnunet_semiseg" else f"nnunet_semiseg/{m}" for m in modules}
    assert {n for n in names if n.endswith(".py")} == packed
    assert any(n.endswith("LICENSE") for n in names)
    assert "nnunet_semiseg/py.typed" in names  # or type checkers pass over our annotations


@pytest.mark.slow
@pytest.mark.parametrize("way", ["sdist", "editable"])
def test_installed_trainers_are_found_and_uninstalled(wheels, checkout, tmp_path, way):
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    purelib = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip())
    before = set(purelib.rglob("*"))

    # A path line shows the new environment our dependencies; the .pth files beside them do not run.
    borrowed = purelib / "borrowed.pth"
    borrowed.write_text(str(Path(nnunetv2.__file__).parents[1]))
    pip = [sys.executable, "-m", "pip", "--python", python]
    what = ["-e", checkout] if way == "editable" else [wheels[way]]
    run(*pip, "install", "--no-deps", "--no-build-isolation", "--ignore-installed", *what, cwd=tmp_path)
    where = checkout if way == "editable" else purelib
    run(python, "-c", FIND_TRAINERS, where, cwd=tmp_path)
    assert (venv / "bin" / "nnunet_semiseg").exists()

    borrowed.unlink()  # or pip would see the installation of this environment, too
    run(*pip, "uninstall", "-y", "nnunet_semiseg", cwd=tmp_path)
    assert set(purelib.rglob("*")) == before
    run(python, "-c", f"import os; assert '{VARIABLE}' not in os.environ", cwd=tmp_path)

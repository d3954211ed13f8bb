"""The tutorial runs, and shows what it prints today."""

import sys
from pathlib import Path

import nbformat
import pytest

from nnunet_semiseg.devices import may_have_gpu

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def outputs_of(notebook, kind: str) -> list[str]:
    """What each code cell printed (`stream`), or returned as text (`execute_result`)."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = [[o for o in cell.outputs if o.output_type == kind] for cell in cells]
    return ["".join(o.get("text") or o["data"]["text/plain"] for o in outputs) for outputs in found]


def test_the_page_has_the_output_of_every_cell():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    silent = [cell.source for cell in cells if not cell.outputs]
    assert len(silent) == 1 and "os.environ" in silent[0]
    pictures = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 2
    assert not any(place in NOTEBOOK.read_text(encoding="utf-8") for place in ("/tmp/", "/home/", "/root/"))


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    sys.modules.pop("make_tutorial", None)
    from make_tutorial import SHOWN_AS, execute

    shown, made = nbformat.read(NOTEBOOK, as_version=4), execute(NOTEBOOK, tmp_path)
    small = "" if may_have_gpu() else " -pl SemiSegPlannerSmall"  # what the conversion proposes on this computer
    printed = [text.replace(str(tmp_path), SHOWN_AS) for text in outputs_of(made, "stream")]
    proposed = [text.replace(" -pl SemiSegPlannerSmall\n", f"{small}\n") for text in outputs_of(shown, "stream")]
    dry_run, converted = (next(i for i, text in enumerate(printed) if end in text) for end in ("--dry-run", "next: "))
    for i in (dry_run, converted):
        assert printed[i] == proposed[i], "run make tutorial"
    (decisions,) = (i for i, text in enumerate(printed) if "(leave_out)" in text)
    assert printed[decisions].split("Epoch 0")[0] == proposed[decisions].split("Epoch 0")[0], "run make tutorial"
    assert "report.html" in "".join(printed) and "ts_003.nii.gz" in "".join(printed)
    *_, table = filter(None, outputs_of(made, "execute_result"))
    words = table.split()
    assert {"SupervisedTrainer", "SemiSegTrainer", "ts_000", "ts_003"} <= set(words)
    dice = [float(word) for word in words if word[:2] in ("0.", "1.")]
    assert len(dice) == 8 and all(0 <= value <= 1 for value in dice)

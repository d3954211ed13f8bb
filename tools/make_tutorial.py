"""Run docs/tutorial.ipynb in a new folder, and save it with its output and pictures.

Run `python tools/make_tutorial.py`, or `make tutorial`.
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs" / "tutorial.ipynb"
SHOWN_AS = "/data"
"""The saved notebook shows this path in place of that of the new folder, whose name differs each time."""


def execute(notebook: Path, folder: Path) -> nbformat.NotebookNode:
    """Run the notebook in this folder and return it with its output. A cell that fails raises CellExecutionError."""
    content = nbformat.read(notebook, as_version=4)
    # the commands of this environment, which need not be activated
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    client = NotebookClient(
        content, timeout=3600, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": str(folder)}}
    )
    return client.execute(env={**os.environ, "PATH": path})


def main() -> None:
    """Run the tutorial and save it."""
    with tempfile.TemporaryDirectory() as folder:
        content = execute(NOTEBOOK, Path(folder))
        text = nbformat.writes(content).replace(json.dumps(folder)[1:-1], SHOWN_AS)
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()

"""Preprocessed cases as nnU-Net reads them in a training. If one cannot be read, the error has one line."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunet_semiseg.data.image_problems import one_line_of
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.parallel import end_with_parent


class ReadableCases:
    """Makes datasets like nnU-Net's dataset class, which it replaces. Their errors say how to fix a damaged case.

    Args:
        dataset_class: nnU-Net's dataset class.
        fixes: for each folder of preprocessed cases, how to fix a damaged case.
        reasons: a queue. A process of batchgenerators puts its error into this queue and ends; the main process reports
            the error. None if PyTorch's DataLoader loads the data: it passes on errors itself.
    """

    def __init__(self, dataset_class: Any, fixes: Mapping[str, str], reasons: Any = None):
        self._class, self._fixes, self._reasons = dataset_class, fixes, reasons

    def __call__(self, folder: str, *args, **kwargs) -> _Dataset:
        return _Dataset(self._class(folder, *args, **kwargs), self._fixes.get(folder, ""), self._reasons)

    def __getattr__(self, name: str):  # static methods of the class
        return getattr(self._class, name)


class _Dataset:
    """A dataset of nnU-Net, with clear errors.

    Raises:
        UserError: a file cannot be read, by `load_case` or later by the array that it returned.
    """

    def __init__(self, dataset: Any, fix: str, reasons: Any):
        self.dataset, self.fix, self.reasons = dataset, fix, reasons
        self.identifiers, self.source_folder = dataset.identifiers, dataset.source_folder

    def load_case(self, identifier: str) -> tuple:
        if self.reasons is not None:
            end_with_parent()  # batchgenerators' processes would outlive a killed training and keep its memory
        with self.naming(Path(self.source_folder, identifier)):
            *arrays, properties = self.dataset.load_case(identifier)
        return *(None if a is None else _Array(a, self, identifier) for a in arrays), properties

    @contextmanager
    def naming(self, case: Path) -> Iterator[None]:
        """Turn any error of a damaged file into an error of one line.

        Without it, a process that loads data ends silently.
        """
        try:
            yield
        except Exception as e:
            error = UserError(f"{case}.*: one of these files cannot be read ({one_line_of(e)}): {self.fix}")
            if self.reasons is None or multiprocessing.parent_process() is None:
                raise error from None
            self.reasons.put(str(error))
            raise SystemExit(1) from None


class _Array:
    """An array on the disk, of which nnU-Net reads a part at a time."""

    def __init__(self, array: Any, dataset: _Dataset, case: str):
        self.array, self.dataset, self.case = array, dataset, case
        self.shape, self.ndim, self.dtype = array.shape, array.ndim, array.dtype

    def __getitem__(self, part):
        with self.dataset.naming(Path(self.dataset.source_folder, self.case)):
            return self.array[part]

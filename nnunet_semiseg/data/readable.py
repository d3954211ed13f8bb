"""Preprocessed cases as nnU-Net reads them in a training: one that cannot be read is named in one line."""

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
    """In the place of nnU-Net's dataset class: makes its datasets, and knows what to do where a case is damaged.

    Args:
        dataset_class: nnU-Net's.
        fixes: what to do, by folder of preprocessed cases.
        reasons: a queue, in which a process of batchgenerators leaves the error for the main one, and ends; None
            where other processes load data, which hand errors on.
    """

    def __init__(self, dataset_class: Any, fixes: Mapping[str, str], reasons: Any = None):
        self._class, self._fixes, self._reasons = dataset_class, fixes, reasons

    def __call__(self, folder: str, *args, **kwargs) -> _Dataset:
        return _Dataset(self._class(folder, *args, **kwargs), self._fixes.get(folder, ""), self._reasons)

    def __getattr__(self, name: str):  # the class's static methods
        return getattr(self._class, name)


class _Dataset:
    """One of nnU-Net's datasets.

    Raises:
        UserError: by `load_case` and by the arrays that it gives, where a file cannot be read.
    """

    def __init__(self, dataset: Any, fix: str, reasons: Any):
        self.dataset, self.fix, self.reasons = dataset, fix, reasons
        self.identifiers, self.source_folder = dataset.identifiers, dataset.source_folder

    def load_case(self, identifier: str) -> tuple:
        if self.reasons is not None:
            end_with_parent()  # batchgenerators' processes outlive a training that is killed, and keep its memory
        with self.naming(Path(self.source_folder, identifier)):
            *arrays, properties = self.dataset.load_case(identifier)
        return *(None if a is None else _Array(a, self, identifier) for a in arrays), properties

    @contextmanager
    def naming(self, case: Path) -> Iterator[None]:
        """A line for what a damaged file raises, which is nearly anything; a loader's process ends without a word."""
        try:
            yield
        except Exception as e:
            error = UserError(f"{case}.*: a preprocessed file cannot be read ({one_line_of(e)}): {self.fix}")
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

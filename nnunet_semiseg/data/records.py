"""Records of labelled cases. A record says from which files something was made, and lies beside it.

`dataset_fingerprint__labeled.json` belongs to nnU-Net's fingerprint. `<data_identifier>__labeled.json` belongs to a
folder of preprocessed cases; it also has the stamps of the preprocessed files and the spread of their values.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median_high

from nnunet_semiseg.data.stamps import STAMP, Stamp, all_renewed
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import read_json, write_json
from nnunet_semiseg.schema import check

FINGERPRINT = "dataset_fingerprint"
STAMPS = list[list[str | int]]
ENTRY = {"files": STAMPS, "made": STAMPS | None, "spread": list[float] | None}
_ENDING = "__labeled.json"


def record_file(preprocessed: Path, name: str) -> Path:
    """The path of the record with this name."""
    return preprocessed / (name + _ENDING)


def read_record(preprocessed: Path, name: str) -> dict:
    """Read a record: a dictionary of `plans_hash` and `cases`. Each case has `files`, `made` and `spread`.

    `files` are the stamps of its images and its label, see `stamps.py`. `made` are the stamps of its preprocessed files
    and of nnU-Net's copy of the label. `spread` has a number for each channel, see `image_problems.spread`. In the
    record of the fingerprint `made`, `spread` and `plans_hash` are None. If the record is missing or damaged,
    `plans_hash` is None and there are no cases, so that everything is checked again.
    """
    try:
        record = read_json(record_file(preprocessed, name), "")
        cases = {c: {key: e[key] for key in ENTRY} for c, e in record["cases"].items()}
        for entry in cases.values():
            check(entry, ENTRY, record_file(preprocessed, name), "")
            if any(len(stamp) != len(STAMP) for stamp in (*entry["files"], *(entry["made"] or ()))):
                raise KeyError
        return {"plans_hash": record["plans_hash"], "cases": cases}
    except (UserError, KeyError, TypeError, AttributeError):
        return {"plans_hash": None, "cases": {}}


def write_record(preprocessed: Path, name: str, cases: dict[str, dict], plans_hash: str | None = None) -> None:
    """Write a record; see `read_record`."""
    write_json({"plans_hash": plans_hash, "cases": dict(sorted(cases.items()))}, record_file(preprocessed, name))


def known_stamps(preprocessed: Path, cases: dict[str, list[str]]) -> dict[str, list[Stamp]]:
    """The stamps of all cases whose files have not changed since a record of them was written.

    It reads all records in `preprocessed`. The cases in them were checked before.
    """
    names = [file.name.removesuffix(_ENDING) for file in preprocessed.glob(f"*{_ENDING}")]
    stamps = {}
    for record in (read_record(preprocessed, name)["cases"] for name in names):
        for case, files in cases.items():
            if case not in stamps and case in record and (now := all_renewed(record[case]["files"], files)):
                stamps[case] = now
    return stamps


def contents(stamps: list[Stamp]) -> list[str]:
    """The hashes of the files of a case."""
    return [stamp[-1] for stamp in stamps]


def usual_spread(record: dict) -> list[float] | None:
    """For each channel, the median spread over the labelled cases that have the channel; 0 if none has it.

    None if no spread is known.

    If there are two middle values, the larger one is taken. A wrong spread is mostly too small, because one voxel is
    much larger than the others.
    """
    spreads = [e["spread"] for e in record["cases"].values() if e["spread"]]
    return [median_high([s for s in channel if s] or [0.0]) for channel in zip(*spreads, strict=True)] or None


def why_fingerprint_is_old(preprocessed: Path, stamps: dict[str, list[Stamp]]) -> str | None:
    """The reason why nnU-Net's fingerprint does not belong to these labelled cases.

    None if it does, or does not exist.
    """
    file = preprocessed / f"{FINGERPRINT}.json"
    if not file.is_file():
        return None
    try:
        count = len(read_json(file, "")["shapes_after_crop"])
    except (UserError, KeyError, TypeError):
        return "is damaged"
    then = {case: contents(e["files"]) for case, e in read_record(preprocessed, FINGERPRINT)["cases"].items()}
    if then:
        now = {case: contents(files) for case, files in stamps.items()}
        changed = [case for case in then.keys() | now.keys() if then.get(case) != now.get(case)]
    elif count != len(stamps):
        return f"was made from {count} labelled cases, but there are {len(stamps)}"
    else:  # made by nnU-Net's own command: newer files may be different
        made = file.stat().st_mtime_ns
        changed = [case for case, files in stamps.items() if max(max(s[2:4]) for s in files) > made]
    return f"was made before labelled case {min(changed)} was added, changed or removed" if changed else None

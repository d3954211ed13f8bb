"""Find the patient of each case, and make splits that keep all cases of a patient together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from sklearn.model_selection import GroupKFold

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.raw_datasets.names import some

_LAST_NUMBER = re.compile(
    r"(?i)(.*\d.*?)[_-](?:(?:ses|session|visit|scan|time|tp|day|week|month|frame|fu|baseline|bl|t|v)[-_]?)?\d[\d-]*"
)


def find_patients(cases: Iterable[str], known: Mapping[str, str], group_by: str) -> dict[str, str]:
    """The patient of each case.

    Args:
        known: the patients of cases, as the names of folders say them.
        group_by: the word `patient`, if folders or names say it (`BraTS-GLI-00005-001` is a scan of BraTS-GLI-00005).
            Or a regular expression: its first group, or the whole match, is the patient in the name of a case.

    Raises:
        UserError: the expression is wrong, or does not match a name; names do not show patients.
    """
    cases = list(cases)
    if group_by == "patient":
        if known:
            return {case: known.get(case, case) for case in cases}
        matches = {case: _LAST_NUMBER.fullmatch(case) for case in cases}
        patients = {case: match[1] if match else case for case, match in matches.items()}
        if not any(matches.values()) or len(set(patients.values())) == 1:
            raise UserError(
                f"--group-by patient: names like {cases[0]} do not show patients: give a regular expression whose group"
                r" is the patient, for example --group-by '(.+)_\d+'"
            )
        return patients
    try:
        expression = re.compile(group_by)
    except re.error as e:
        raise UserError(
            f"--group-by {group_by}: is not a regular expression ({e}): give a valid one, or the word patient"
        ) from None
    found = {case: expression.search(case) for case in cases}
    if lost := [case for case, match in found.items() if match is None]:
        raise UserError(f"--group-by {group_by}: does not match the case name {some(lost)}: correct the expression")
    return {case: match[1] if expression.groups else match[0] for case, match in found.items() if match}


def refuse_shared(patients: Mapping[str, str], part: str, held_out: Iterable[str], others: Iterable[str]) -> None:
    """Raise UserError if a patient has cases both in a part that is held out of training and elsewhere.

    Args:
        part: the name of that part, for the message.
    """
    of_part = {patients[case]: case for case in held_out}
    shared = {patients[case]: case for case in others if patients[case] in of_part}
    if shared:
        patient, case = next(iter(shared.items()))
        raise UserError(
            f"--group-by: {len(shared)} patients have scans both in {part} and in training, for example {patient}"
            f" ({of_part[patient]} and {case}): move all scans of a patient to one of the two"
        )


def folds_by_patient(cases: Sequence[str], patients: Mapping[str, str], num_folds: int = 5) -> list[dict]:
    """Make folds for `splits_final.json`, with all cases of a patient in one fold.

    With fewer patients than `num_folds`, each patient is a fold. Empty if there is only one patient.
    """
    cases = sorted(cases)
    groups = [patients[case] for case in cases]
    folds = min(num_folds, len(set(groups)))
    if folds < 2:
        return []
    return [
        {"train": [cases[i] for i in train], "val": [cases[i] for i in val]}
        for train, val in GroupKFold(folds).split(cases, groups=groups)
    ]

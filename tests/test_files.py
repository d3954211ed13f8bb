import locale

import pytest

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import read_json, write_json


def test_json_is_utf8_in_every_locale(tmp_path):
    file = tmp_path / "dataset.json"
    file.write_bytes('{"prompts": "tumeur à gauche"}'.encode())
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")  # as after SimpleITK has read a DICOM series
    try:
        assert read_json(file, "fix it") == {"prompts": "tumeur à gauche"}
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    write_json({"a": 1}, file)
    with pytest.raises(TypeError):
        write_json({"a": object()}, file)
    assert read_json(file, "fix it") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    file.write_bytes(b"{,")
    with pytest.raises(UserError, match=r"a.json: not valid JSON .*: fix it"):
        read_json(file, "fix it")

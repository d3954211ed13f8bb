import errno
import locale
import os
import re
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import SimpleITK as sitk

from nnunet_semiseg import files
from nnunet_semiseg.data.written_images import write_image
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import (
    BusyError,
    DiskError,
    disk_errors,
    folder_for,
    make_folder,
    only_one,
    put_back,
    read_json,
    reading,
    rewriting,
    write_json,
    written_whole,
)


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


# ------------------------------------------------------------------------------------------------------------- disks


def test_a_full_disk_is_one_line_and_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "a.json"
    write_json({"a": 1}, file)
    with pytest.raises(DiskError) as error, written_whole(file) as temporary:
        temporary.write_text("{", encoding="utf-8")
        Path("/dev/full").write_text("no room", encoding="utf-8")
    assert str(error.value).startswith(f"{file}: cannot be written (No space left on device): make room")
    assert "\n" not in str(error.value)
    assert read_json(file, "fix it") == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_folder_that_cannot_be_made_or_is_none(tmp_path):
    with pytest.raises(DiskError, match="^/proc/x: cannot be written .No such file or directory.: make room"):
        make_folder(Path("/proc/x/logs"))
    with pytest.raises(UserError, match="^-o is empty: name a folder$"):
        folder_for("")
    make_folder(tmp_path / "a" / "b")
    assert folder_for(tmp_path / "a") == tmp_path / "a" and (tmp_path / "a" / "b").is_dir()


def test_a_read_only_disk_is_named_with_its_path(tmp_path):
    with pytest.raises(DiskError, match="^/a/b: cannot be written .Read-only file system."), disk_errors(tmp_path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/a/b")
    with pytest.raises(DiskError, match="^/new: cannot be written .No space"), disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/old", None, "/new")
    with pytest.raises(DiskError, match=f"^{tmp_path}: cannot be written .No space left"), disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):  # this is no fault of the disk
        Path(tmp_path / "missing").read_bytes()


def test_an_image_that_cannot_be_written_says_why(tmp_path):
    """SimpleITK only says that it cannot."""
    image, taken = sitk.Image(2, 2, sitk.sitkUInt8), tmp_path / "a.nii.gz"
    taken.mkdir()
    with pytest.raises(DiskError, match=r"a\.nii\.gz: cannot be written .Is a directory"):
        write_image(image, taken)
    with pytest.raises(RuntimeError, match="no ImageIO|determine ImageIO"):  # this is no fault of the disk
        write_image(image, tmp_path / "a.unknown")
    assert os.listdir(tmp_path) == ["a.nii.gz"]


def test_each_writer_has_a_name_of_its_own(tmp_path):
    with written_whole(tmp_path / "a") as one, written_whole(tmp_path / "a") as two:
        assert one != two
        one.write_bytes(b"1")
        two.write_bytes(b"2")
    assert (tmp_path / "a").read_bytes() == b"1" and os.listdir(tmp_path) == ["a"]


def test_what_fails_to_write_a_file_leaves_it_as_it_was(tmp_path):
    """nnU-Net writes its plans into the file itself."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("1", encoding="utf-8")
    for file in (old, new):
        with pytest.raises(KeyError), put_back(file):
            file.write_text("half", encoding="utf-8")
            raise KeyError
    assert old.read_text(encoding="utf-8") == "1" and os.listdir(tmp_path) == ["old.json"]
    with put_back(old):
        old.write_text("2", encoding="utf-8")
    assert old.read_text(encoding="utf-8") == "2" and os.listdir(tmp_path) == ["old.json"]


# ------------------------------------------------------------------------------------------------------------- locks


def leave_lock(lock: Path, **owner) -> None:
    """A lock as a killed process leaves it, with these entries in place of its own."""
    with only_one(lock, "works"):
        content = lock.read_text(encoding="utf-8")
    for key, value in owner.items():
        content = re.sub(rf"(?m)^{key}=.*$", f"{key}={value}", content)
    lock.write_text(content, encoding="utf-8")


def test_the_second_is_told_who_is_there_and_a_lock_ends_with_the_work(tmp_path):
    lock = tmp_path / "training.lock"
    with only_one(lock, "trains this model"):
        assert f"pid={os.getpid()}\n" in lock.read_text(encoding="utf-8")
        with pytest.raises(BusyError) as error, only_one(lock, "trains this model"):
            pytest.fail("two at once")
        assert str(error.value).startswith(f"{lock}: process {os.getpid()} on {os.uname().nodename} trains this model")
    assert not lock.exists()
    with only_one(lock, "trains this model"):
        assert lock.exists()


def test_one_who_waits_comes_next(tmp_path):
    lock, order = tmp_path / "a.lock", []

    def first():
        with only_one(lock, "writes"):
            started.set()
            time.sleep(0.3)
            order.append(1)

    started = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    started.wait()
    with only_one(lock, "writes", wait=30):
        order.append(2)
    thread.join()
    assert order == [1, 2]


def test_a_dead_process_of_this_computer_blocks_nobody(tmp_path):
    lock = tmp_path / "a.lock"
    process = subprocess.Popen(["true"])
    process.wait()
    leave_lock(lock, pid=process.pid)
    with only_one(lock, "works"):
        assert f"pid={os.getpid()}\n" in lock.read_text(encoding="utf-8")


def test_nor_does_a_dead_process_of_another_computer_for_ever(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "LEASE", 0.6)
    lock = tmp_path / "a.lock"
    leave_lock(lock, host="elsewhere", pid=7)
    with only_one(lock, "works"):
        assert f"pid={os.getpid()}\n" in lock.read_text(encoding="utf-8")
    assert f"{lock}: left by process 7 on elsewhere: looking for a sign of life" in capsys.readouterr().out


def test_but_one_that_lives_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LEASE", 30.0)
    lock, stop, begun = tmp_path / "a.lock", threading.Event(), time.monotonic()
    leave_lock(lock, host="elsewhere", pid=7)

    def live():
        while not stop.wait(0.2):
            os.utime(lock)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(BusyError, match="process 7 on elsewhere works"), only_one(lock, "works"):
            pytest.fail("two at once")
    finally:
        stop.set()
        thread.join()
    assert time.monotonic() - begun < 20  # a sign of life is enough: it does not wait for the lease to end


def test_many_use_preprocessed_data_at_once_and_nobody_rewrites_it_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAIT", 0.0)
    folder = tmp_path / "P_3d.fullres"
    with reading(folder), reading(folder):
        assert len(list(tmp_path.glob(".P_3d.fullres.*.reading.lock"))) == 2
        with pytest.raises(BusyError) as error, rewriting(folder):
            pytest.fail("it is used")
        assert f"process {os.getpid()} on {os.uname().nodename} uses these preprocessed cases: wait" in str(error.value)
    with rewriting(folder), rewriting(tmp_path / "P_3d"):
        with pytest.raises(BusyError, match=r"/.P_3d.fullres.lock: process .* rewrites these"), reading(folder):
            pytest.fail("it is rewritten")
        with pytest.raises(BusyError, match="rewrites these"), rewriting(folder):
            pytest.fail("two at once")
    assert not list(tmp_path.iterdir())


def test_who_was_killed_while_using_data_blocks_nobody_and_its_lock_goes(tmp_path):
    process = subprocess.Popen(["true"])
    process.wait()
    for use, left in ((rewriting, [".P.lock"]), (reading, [])):
        leave_lock(tmp_path / ".P.12345678.reading.lock", pid=process.pid)
        with use(tmp_path / "P"):
            assert [name for name in os.listdir(tmp_path) if "reading" not in name] == left
            assert not (tmp_path / ".P.12345678.reading.lock").exists()


def test_data_on_a_read_only_disk_can_be_used(tmp_path, monkeypatch):
    @contextmanager
    def refuses(lock, does, wait=0.0):
        raise DiskError(f"{lock}: cannot be written (Read-only file system)")
        yield

    monkeypatch.setattr(files, "only_one", refuses)
    with reading(tmp_path / "P"):
        pass
    with pytest.raises(DiskError), rewriting(tmp_path / "P"):
        pytest.fail("nothing can be written")

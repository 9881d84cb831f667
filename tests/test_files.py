"""Files appear complete or not at all, folders have one writer, and errors of the file system are one line."""

import errno
import os
import subprocess
import sys
import types
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import patchnetvlad.files as files
from patchnetvlad.errors import UserError
from patchnetvlad.files import (
    duration,
    free_disk,
    locked,
    make_folder,
    read_text,
    remove_temporary_files,
    replacing,
    some_of,
    temporary_path,
    write_text,
    writing,
    writing_hdf5,
    writing_with_torch,
)


def refused(path: Path, message: str):
    return pytest.raises(UserError, match=rf"^{path}: [^\n]*{message}[^\n]*$")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0.0 s"), (12.34, "12.3 s"), (99.94, "99.9 s"), (100, "2 min"), (5999, "100 min"), (7560, "2.1 h")],
)
def test_durations_are_told_in_one_way(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_free_disk_of_a_folder_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    usage = types.SimpleNamespace(free=7)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: asked.append(folder) or usage)
    assert free_disk(tmp_path / "not" / "there") == 7 and asked == [tmp_path]


def save_torch(path: Path) -> None:
    with writing_with_torch(path) as file:
        torch.save({"weights": torch.zeros(100_000)}, file)


def save_hdf5(path: Path) -> None:
    with writing_hdf5(path) as file:
        file.create_dataset("numbers", data=np.arange(100_000))


def save_arrays(path: Path) -> None:
    with writing(path) as file:
        np.savez(file, numbers=np.arange(100_000))


def save_text(path: Path) -> None:
    write_text(path, (f"{number}\n" for number in range(100_000)))


WRITERS = {"torch": save_torch, "hdf5": save_hdf5, "arrays": save_arrays, "text": save_text}


def test_what_is_written_is_there(tmp_path):
    for name, write in WRITERS.items():
        write(tmp_path / "new" / name)
    assert len(torch.load(tmp_path / "new/torch")["weights"]) == 100_000
    with h5py.File(tmp_path / "new/hdf5") as file:
        assert file["numbers"][99_999] == 99_999
    assert np.load(tmp_path / "new/arrays")["numbers"][7] == 7
    assert (tmp_path / "new/text").read_bytes().startswith(b"0\n1\n2\n")
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(WRITERS)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a file size limit")
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file(tmp_path, name):
    import resource

    path = tmp_path / "file"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with refused(path, "cannot be written .*File too large"):
            WRITERS[name](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", WRITERS)
def test_places_where_nothing_can_be_written(tmp_path, name):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    with refused(tmp_path / "file/new", "a file is in the place of a folder"):
        WRITERS[name](tmp_path / "file" / "new")
    with refused(tmp_path / "folder", "a folder is in its place"):
        WRITERS[name](tmp_path / "folder")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"} and not list(
        (tmp_path / "folder").iterdir()
    )


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_file_that_cannot_be_replaced(tmp_path, monkeypatch, code):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def refuse(self: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "replace", refuse)
    with refused(path, f"{os.strerror(code)}; "):
        write_text(path, "new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_other_errors_stay_errors_and_leave_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), writing(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="bug"), writing_hdf5(path):
        raise RuntimeError("bug")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_bytes(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        done.append("sync")
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        done.append("replace")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    write_text(tmp_path / "file", "text")
    with replacing(tmp_path / "file", durable=False) as temporary:
        temporary.write_bytes(b"")
    assert done == ["sync", "replace", "replace"]


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs devices")
def test_a_device_is_written_in_place(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    write_text(tmp_path / "pipe", "text")
    assert reader.communicate(timeout=10)[0] == "text"
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_temporary_names_carry_the_process_and_fit_long_names(tmp_path):
    long = "ü" * 126 + ".x"
    write_text(tmp_path / long, "text")
    assert (tmp_path / long).read_text() == "text"
    name = temporary_path(tmp_path / long).name
    assert str(os.getpid()) in name and name.endswith(".x")
    assert temporary_path(tmp_path / "a").name != temporary_path(tmp_path / "b").name
    temporary_path(tmp_path / "a").write_text("half")
    remove_temporary_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [long]


def test_reading_text(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa\r\nb\rc\nü".encode())
    assert read_text(path) == "a\nb\nc\nü"
    for content, complaint in ((b"\xff\xfe", r"is it a list\?"), (b"a\0b", r"binary data \(is it a list\?")):
        path.write_bytes(content)
        with refused(path, complaint):
            read_text(path, "a list")
    with refused(tmp_path / "absent", "cannot be read .No such file"):
        read_text(tmp_path / "absent")
    with refused(tmp_path, "cannot be read .Is a directory"):
        read_text(tmp_path)


def test_making_folders(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "within"):
        with refused(folder, "a file is in the place of a folder"):
            make_folder(folder)


# --- one writer --------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from patchnetvlad.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    return holder


def test_a_folder_has_one_writer(tmp_path):
    holder = hold(tmp_path)
    for _ in range(2):
        with refused(tmp_path, "another process writes there"), locked(tmp_path):
            raise AssertionError
    holder.communicate(b"")
    with locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".writing.lock"]
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_the_folder_free(tmp_path):
    holder = hold(tmp_path)
    holder.kill()
    holder.communicate()
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    real, calls = files._lock, []

    def lock(file) -> bool:
        if not calls:  # the process before removes its file between the opening and the lock
            (tmp_path / ".writing.lock").unlink()
        calls.append(file)
        return real(file)

    monkeypatch.setattr(files, "_lock", lock)
    with locked(tmp_path):
        assert len(calls) == 2 and calls[0].closed and (tmp_path / ".writing.lock").exists()


def test_the_lock_of_windows(tmp_path, monkeypatch):
    held: set[int] = set()

    def locking(descriptor: int, mode: int, count: int) -> None:
        assert (mode, count) == (2, 1)
        if held:
            raise PermissionError(errno.EACCES, "Permission denied")
        held.add(descriptor)

    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(files, "sys", types.SimpleNamespace(platform="win32"))
    with locked(tmp_path):
        with refused(tmp_path, "another process"), locked(tmp_path):
            raise AssertionError
        assert len(held) == 1
    assert not list(tmp_path.iterdir())


def test_file_systems_without_locks(tmp_path, monkeypatch):
    import fcntl

    def lockf(file, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with locked(tmp_path), locked(tmp_path):
        pass


# --- names in messages -------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(codec="ascii", categories=("L",)), min_size=1), max_size=9), st.integers(1, 6))
def test_some_names(names, shown):
    text = some_of(names, shown)
    if len(names) <= shown:
        assert text == ", ".join(names)
    else:
        assert text == ", ".join(names[:shown]) + f" and {len(names) - shown} more"


def test_some_sentences():
    assert some_of(["a: b, c", "d", "e"], 2, "; ") == "a: b, c; d; and 1 more"

"""Folders that appear whole or not at all, with the kernel's exchange and without it."""

import errno
import os
from pathlib import Path

import pytest

from kvcalib import folders
from kvcalib.errors import InputError
from kvcalib.files import claim
from kvcalib.folders import recover, replacing_folder

CALLED = folders._renameat2


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(folders, "_renameat2", lambda *_: False)
    return request.param


def put(folder: Path, text: str, may_replace=lambda: True) -> None:
    with replacing_folder(folder, may_replace) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "a").write_text(text)


def state(parent: Path) -> dict[str, str]:
    return {str(p.relative_to(parent)): p.read_text() for p in sorted(parent.rglob("*")) if p.is_file()}


def test_appears_and_is_replaced(tmp_path, way):
    put(tmp_path / "x" / "f", "one")
    assert state(tmp_path) == {"x/f/deep/a": "one"}
    put(tmp_path / "x" / "f", "two")
    assert state(tmp_path) == {"x/f/deep/a": "two"}
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["f"]


def test_empty_folder_is_used(tmp_path, way):
    (tmp_path / "f").mkdir()
    put(tmp_path / "f", "one", may_replace=lambda: pytest.fail("asked about nothing"))
    assert state(tmp_path) == {"f/deep/a": "one"}


def test_exchange_is_one_step(tmp_path):
    """The kernel's own call, where this machine has it: two names swap what they name."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    if not CALLED(tmp_path / "a", tmp_path / "b"):
        pytest.skip("no renameat2 here")
    assert state(tmp_path) == {"a/x": "b", "b/x": "a"}
    with pytest.raises(FileNotFoundError):
        CALLED(tmp_path / "missing", tmp_path / "a")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_file_system_without_the_call(tmp_path, monkeypatch, code):
    class Libc:
        @staticmethod
        def renameat2(*_):
            folders.ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(folders.ctypes, "CDLL", lambda *_, **__: Libc)
    assert not CALLED(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(folders.ctypes, "CDLL", lambda *_, **__: object)
    assert not CALLED(tmp_path / "a", tmp_path / "b")


def test_what_came_meanwhile_is_asked_about(tmp_path, way):
    with replacing_folder(tmp_path / "f", lambda: False) as temporary:
        (temporary / "a").write_text("late")
        (tmp_path / "f").mkdir()
        (tmp_path / "f" / "a").write_text("early")
    assert state(tmp_path) == {"f/a": "early"}
    with pytest.raises(ZeroDivisionError):
        put(tmp_path / "f", "late", may_replace=lambda: 1 // 0)
    assert state(tmp_path) == {"f/a": "early"}


def test_link_stays_a_link(tmp_path, way):
    put(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to("real")
    put(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "deep" / "a").read_text() == "two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_killed_between_two_renames(tmp_path):
    """What the old one is hidden as is brought back; once a new one is there it is removed."""
    put(tmp_path / "f", "one")
    (tmp_path / "f").rename(tmp_path / ".f.0123abcd.old")
    recover(tmp_path / "f")
    assert state(tmp_path) == {"f/deep/a": "one"}
    (tmp_path / ".f.0123abcd.old").mkdir()
    put(tmp_path / "f", "two")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_leftovers_of_the_dead_go_and_of_the_living_stay(tmp_path):
    (tmp_path / ".f.0123abcd.tmp" / "deep").mkdir(parents=True)
    (tmp_path / ".g.0123abcd.tmp").mkdir()
    living, handle = claim(tmp_path / "f", folder=True)
    put(tmp_path / "f", "one")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([living.name, ".g.0123abcd.tmp", "f"])
    os.close(handle)
    put(tmp_path / "f", "two")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".g.0123abcd.tmp", "f"]


def test_second_rename_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_renameat2", lambda *_: False)
    put(tmp_path / "f", "one")
    rename = Path.rename

    def full(self, target):
        if self.suffix == ".tmp" and not Path(target).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(InputError, match="the disk is full, nothing was changed"):
        put(tmp_path / "f", "two")
    assert state(tmp_path) == {"f/deep/a": "one"}
    assert [p.name for p in tmp_path.iterdir()] == ["f"]

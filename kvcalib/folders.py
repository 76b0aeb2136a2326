"""Folders that appear whole or not at all: artifacts, adaptive widths.

A folder is filled under a temporary name and put in its place by one rename. Where another one stands there the two
are exchanged by one call of the kernel (Linux, `renameat2`), so at every moment the old one or the new one is there.
File systems without that call take two renames; who is killed between them leaves the old one hidden beside its place,
and the next reader or writer brings it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from kvcalib.files import claim, leftovers, remove_leftovers, sync_folder, write_error

_AT_FDCWD, _EXCHANGE = -100, 2
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
_NO_SUCH_CALL = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


@contextlib.contextmanager
def replacing_folder(folder: Path, may_replace: Callable[[], bool], size: int | None = None) -> Iterator[Path]:
    """An empty folder beside `folder` to fill; put in its place if all goes well, else removed.

    Args:
        may_replace: asked when something stands there: False leaves it as it is, an error of it is raised.

    Raises:
        NotWritable: the block, or putting it in its place, met an error of the system.
    """
    temporary, handle = None, -1
    try:
        place = Path(os.path.realpath(folder))  # a link stays one, and what it names is replaced
        place.parent.mkdir(parents=True, exist_ok=True)
        recover(folder)
        temporary, handle = claim(place, folder=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        try:
            temporary.rename(place)  # nothing is there, or an empty folder
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            if may_replace():
                _exchange(temporary, place)
        sync_folder(place.parent)
    except OSError as error:
        raise write_error(folder, error, size) from error
    finally:
        if temporary is not None:  # by now it may be what stood there before
            shutil.rmtree(temporary, ignore_errors=True)
        if handle >= 0:
            os.close(handle)


def recover(folder: Path) -> None:
    """Remove what killed writers of `folder` left beside it; bring it back if one was killed between two renames."""
    place = Path(os.path.realpath(folder))
    remove_leftovers(place.parent, place.name)
    if not os.path.lexists(place):
        for old in leftovers(place.parent, place.name, "old")[:1]:
            with contextlib.suppress(OSError):
                old.rename(place)
    remove_leftovers(place.parent, place.name, "old")


def _exchange(new: Path, place: Path) -> None:
    """Swap two folders; `new` names the old one afterwards, or is gone."""
    if _renameat2(new, place):
        return
    old = new.with_suffix(".old")
    handle = os.open(place, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # while it is hidden nobody takes it for a leftover
        place.rename(old)
        try:
            new.rename(place)
        except BaseException:
            old.rename(place)
            raise
    finally:
        os.close(handle)
    shutil.rmtree(old, ignore_errors=True)


def _renameat2(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or its file system cannot do that."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_SUCH_CALL:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

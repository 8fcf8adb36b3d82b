"""Files that are whole or not there, one writer at a time, and nothing left behind by one that was killed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # no such locks on this platform: names that differ must do
    fcntl = None  # type: ignore[assignment]

__all__ = ["InUseError", "held", "require_room", "unfinished_folder", "write_text", "writing"]

_LOCK = ".ropex.lock"
_PARTIAL, _UNFINISHED, _ROOM = ".ropex-partial-", ".ropex-unfinished-", ".ropex-room"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of some network file systems


class InUseError(ValueError):
    """Another process holds a lock file."""


@contextmanager
def held(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock file, which says the owner's process id; it is let go at the end, or when the process dies.

    Raises:
        InUseError: another one holds it, and this one shall not wait.
        OSError: the file cannot be made.
    """
    file = _locked(path, wait=wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is let go: who has waited for it sees that, and makes a new one
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing would not do where a forked process has a copy
        os.close(file)


def _locked(path: Path, *, wait: bool) -> int:
    """The file, locked, with the process id in it."""
    while True:
        file = -1
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            if not _lock(file, wait=wait):
                owner = os.pread(file, 20, 0).decode(errors="replace") or "unknown"
                place = str(path.parent)
                raise InUseError(
                    f"{place!r}: is in use by process {owner}; wait until it has ended, or pass another folder"
                )
            if os.fstat(file).st_nlink:
                _sign(file, path)
                return file
        except BaseException as error:
            if file >= 0:
                os.close(file)
            if isinstance(error, OSError):
                error.filename = str(path.parent)
            raise
        os.close(file)  # its owner has let it go in the meantime


def _lock(file: int, *, wait: bool) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    return True


def _sign(file: int, path: Path) -> None:
    try:
        os.ftruncate(file, 0)
        os.write(file, str(os.getpid()).encode())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextmanager
def writing(folder: Path) -> Iterator[Callable[[str, Callable[[Path], object]], None]]:
    """The only writer in a folder; gives a function that writes one file in it.

    The function takes the file's name, and what writes to a path. The file takes its place when it is complete and on
    the disk. What a killed writer has left goes.
    """
    with held(folder / _LOCK):
        for left in folder.glob(f"{_PARTIAL}*"):
            with contextlib.suppress(OSError):
                left.unlink()

        def put(name: str, write: Callable[[Path], object]) -> None:
            partial = folder / f"{_PARTIAL}{secrets.token_hex(8)}"
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            try:
                write(partial)
                with partial.open("rb+") as file:
                    os.fsync(file.fileno())
                partial.replace(folder / name)
            except BaseException as error:
                partial.unlink(missing_ok=True)
                if (
                    isinstance(error, OSError) and error.errno
                ):  # which may not know of which file it is, or knows the hidden one
                    error.filename = str(folder / name)
                raise

        yield put


def require_room(folder: Path) -> None:
    """Raise `OSError` unless a folder can be written, and has room for results."""
    with writing(folder) as put:
        put(_ROOM, lambda partial: partial.write_bytes(bytes(2**20)))
        (folder / _ROOM).unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is never seen half written."""
    with writing(path.parent) as put:
        put(path.name, lambda partial: partial.write_text(text, encoding="utf-8"))


@contextmanager
def unfinished_folder(parent: Path) -> Iterator[Path]:
    """A new hidden folder in another one, to make things in before they get their names; it goes at the end.

    Those of processes that were killed go, too.
    """
    with contextlib.ExitStack() as stack:
        with held(parent / _LOCK):
            for left in parent.glob(f"{_UNFINISHED}*"):
                with contextlib.suppress(InUseError, OSError), held(left / _LOCK, wait=False):
                    shutil.rmtree(left, ignore_errors=True)
            made = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=parent))
            stack.callback(shutil.rmtree, made, ignore_errors=True)
            stack.enter_context(held(made / _LOCK))
        yield made

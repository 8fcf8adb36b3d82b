"""Files that are whole or not there, one writer at a time, and nothing left behind by one that was killed."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ModuleNotFoundError:  # no such locks on this platform: names that differ must do
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "InUseError",
    "held",
    "make_folder",
    "read_object",
    "require_room",
    "unfinished_folder",
    "write_text",
    "writing",
]

_LOCK = ".ropex.lock"
_PARTIAL, _UNFINISHED = ".ropex-partial-", ".ropex-unfinished-"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of some network file systems


class InUseError(ValueError):
    """Another process holds a lock file."""


@contextmanager
def held(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file, which says the owner's process id; it is let go at the end, or when the process dies.

    Gives whether it is really held: some file systems and platforms have no locks.

    Raises:
        InUseError: another one holds it, and this one shall not wait.
        OSError: the file cannot be made.
    """
    file, alone = _locked(path, wait=wait)  # whose end lets the lock go, too, where an interrupt prevents what follows
    try:
        yield alone
    finally:
        try:
            if fcntl is not None:  # before it is let go: who has waited for it sees that, and makes a new one
                _remove(path)
                fcntl.flock(file, fcntl.LOCK_UN)  # closing would not do where a forked process has a copy
        finally:
            file.close()
            if fcntl is None:
                _remove(path)


def _remove(path: Path) -> None:
    """Remove a lock file, unless it is another user's."""
    with contextlib.suppress(PermissionError, FileNotFoundError):
        path.unlink()


def _locked(path: Path, *, wait: bool) -> tuple[io.FileIO, bool]:
    """The file, with the process id in it, and whether it is locked."""
    try:
        while True:
            file = _opened(path)
            try:
                locked = _lock(file, path, wait=wait)
                if os.fstat(file.fileno()).st_nlink:
                    _sign(file, path)
                    return file, locked
            except BaseException:
                file.close()
                raise
            file.close()  # its owner has let it go in the meantime
    except OSError as error:
        error.filename = str(path if error.errno == errno.ELOOP else path.parent)
        raise


def _opened(path: Path) -> io.FileIO:
    """The lock file, which another user may have left; never one behind a link."""
    no_link = getattr(os, "O_NOFOLLOW", 0)
    try:
        return io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | no_link, 0o666), "r+")
    except PermissionError:
        if not path.exists():
            raise
        return io.FileIO(os.open(path, os.O_RDONLY | no_link), "r")


def _lock(file: io.FileIO, path: Path, *, wait: bool) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        owner = os.pread(file.fileno(), 20, 0).decode(errors="replace") or "unknown"
        raise InUseError(
            f"{str(path.parent)!r}: is in use by process {owner}; wait until it has ended, or pass another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _sign(file: io.FileIO, path: Path) -> None:
    if not file.writable():  # another user's
        return
    try:
        file.truncate(0)
        file.write(str(os.getpid()).encode())
    except BaseException:
        _remove(path)
        raise


@contextmanager
def writing(folder: Path) -> Iterator[Callable[[str, Callable[[Path], object]], None]]:
    """The only writer in a folder; gives a function that writes one file in it.

    The function takes the file's name, and what writes to a path. The file takes its place when it is complete and on
    the disk. What a killed writer has left goes.
    """
    with held(folder / _LOCK) as alone:
        for left in folder.glob(f"{_PARTIAL}*") if alone else ():
            with contextlib.suppress(OSError):
                left.unlink()

        def put(name: str, write: Callable[[Path], object]) -> None:
            with _partial(folder, name) as partial:
                write(partial)
                _sync(partial)
                partial.replace(folder / name)

        yield put


@contextmanager
def _partial(folder: Path, name: str) -> Iterator[Path]:
    """A new file under a hidden name, which goes at the end unless it has another by then."""
    partial = folder / f"{_PARTIAL}{secrets.token_hex(8)}"
    try:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield partial
    except OSError as error:
        if error.errno:  # which may not know of which file it is, or knows the hidden one
            error.filename = str(folder / name)
        raise
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file is on the disk, which may be full only then."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def require_room(folder: Path) -> None:
    """Raise `OSError` unless a folder can be written, and has room for results."""
    with writing(folder), _partial(folder, "") as partial:
        partial.write_bytes(bytes(2**20))
        _sync(partial)


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it is in.

    Raises:
        ValueError: a file is in the way.
        OSError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{str(folder)!r}: must be a folder, and a file is in the way; pass another one") from error


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
        with held(parent / _LOCK) as alone:
            for left in parent.glob(f"{_UNFINISHED}*") if alone else ():
                if not left.is_symlink():
                    with contextlib.suppress(InUseError, OSError), held(left / _LOCK, wait=False):
                        _remove_folder(left)
            made = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=parent))
            stack.callback(_remove_folder, made)
            stack.enter_context(held(made / _LOCK))
        yield made


def _remove_folder(folder: Path) -> None:
    """Remove a folder, with folders in it that may not be written."""
    for inner, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            Path(inner).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file of somebody else.

    Raises:
        ValueError: it holds no such object, or cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{str(path)[:300]!r}: must be a file with {what}; {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r}: must hold {what} as JSON, and does not ({error}); write it anew") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r}: must hold {what}, a JSON object, and holds another value; write it anew")
    return content

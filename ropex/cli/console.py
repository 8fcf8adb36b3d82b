"""What all commands share: the application, the two consoles, errors, and words split at commas."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ropex._checks import first_line
from ropex._version import __version__

__all__ = ["app", "clear_errors", "log", "out", "progress_bar", "say", "split"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
out = Console() if sys.stdout.isatty() else Console(width=160)
log = Console(stderr=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(__version__)
        raise typer.Exit


@app.callback()
def ropex_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Longer contexts for models with rotary position embeddings."""


def clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose every failure is a message and exit code 2.

    With the environment variable ROPEX_TRACEBACK it shows where a failure comes from.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if os.environ.get("ROPEX_TRACEBACK"):
                raise
            message = _message(error).encode("utf-8", "replace").decode()
            log.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None

    return run


_REMEDIES = {
    errno.ENOSPC: "free some space, or pass another place; what was finished is kept",
    errno.EDQUOT: "free some space, or pass another place; what was finished is kept",
    errno.EROFS: "pass a place that can be written",
    errno.EACCES: "pass a place that you have the rights to",
    errno.EPERM: "pass a place that you have the rights to",
    errno.ELOOP: "remove this link",
    errno.ENAMETOOLONG: "pass a shorter name",
}


def _message(error: Exception) -> str:
    """What failed, and what to do."""
    if isinstance(error, OSError):
        if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):  # of a copied folder
            source, _, why = error.args[0][0]
            return f"{_short(source)}: cannot be copied: {why}"
        remedy = _REMEDIES.get(error.errno or 0, "check the path and what it leads to")
        return f"{_short(error.filename or 'a file')}: {error.strerror or first_line(error)}; {remedy}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in ("not enough memory", "can't allocate memory")
    ):
        return (
            f"out of memory: {first_line(error)}; pass a smaller length, --dtype bfloat16, or another --device; what "
            "was finished is kept"
        )
    if isinstance(error, ValueError):
        return str(error)
    return (
        f"{type(error).__name__}: {first_line(error)}; this is a fault of ropex: run it again with ROPEX_TRACEBACK=1, "
        "and report what it shows"
    )


def _short(path: object) -> str:
    text = repr(str(path))
    return text if len(text) < 300 else f"{text[:200]}... ({len(text) - 2} characters)"


def say(message: object) -> None:
    """A line of output, as it is."""
    out.print(str(message), highlight=False, soft_wrap=True, markup=False)


def split(names: str, what: str = "methods") -> list[str]:
    """What stands between commas, nothing twice."""
    found = [name.strip() for name in names.split(",")]
    if len(set(found)) < len(found):
        one = what.removesuffix("s")
        raise ValueError(f"{what}={names!r}: must not repeat a {one}; remove the second one")
    return found


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """One bar over all parts, which names the one at hand."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=log) as progress:
        whole = progress.add_task("", total=1.0)

        def report(title: str, done: float) -> None:
            progress.update(whole, description=title, completed=done)

        yield report

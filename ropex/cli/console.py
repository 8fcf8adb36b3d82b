"""What all commands share: the application, the two consoles, errors, and words split at commas."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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
    """A command whose ValueError is a message and exit code 2."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ValueError as error:
            log.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None

    return run


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

"""The `ropex` command."""

from __future__ import annotations

import os
import sys

try:
    import matplotlib  # noqa: F401  # needed at the very end, missed at the very beginning
    import platformdirs  # noqa: F401
    import rich  # noqa: F401
    import typer  # noqa: F401
except ModuleNotFoundError as error:
    raise SystemExit(f"ropex: the command needs the package {error.name}; run `pip install 'ropex[eval]'`") from None

from ropex.cli import measuring, models  # noqa: F401  # each adds its commands
from ropex.cli.console import app

__all__ = ["app", "main"]


def main() -> None:
    """The entry point of the `ropex` command."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough
        os._exit(1)
    except OSError as error:
        sys.stderr.write(f"error: the output cannot be written: {error.strerror}\n")
        os._exit(2)

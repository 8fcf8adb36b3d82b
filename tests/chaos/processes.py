"""Child processes that do something with ropex, and die when they are told to."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ropex.cli import app
from tests.oracles import byte_tokenizer, tiny_model


class Child:
    """A forked process that runs a function; what it prints lands in `output`."""

    def __init__(self, function: Callable[[], object], output: Path | None = None) -> None:
        self.process = os.fork()
        if self.process:
            return
        code = 70
        try:
            if output is not None:
                file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, 1)
                os.dup2(file, 2)
            code = int(function() or 0)  # type: ignore[call-overload]
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def kill(self) -> bool:
        """SIGKILL; whether it was still running."""
        os.kill(self.process, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def wait(self) -> int:
        """Its exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def ended(self) -> bool:
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def command(*arguments: Any, folder: Path | None = None) -> Callable[[], int]:
    """The `ropex` command with these arguments, as a function of a child."""

    def run() -> int:
        if folder is not None:
            os.chdir(folder)
        app([str(argument) for argument in arguments])
        return 0

    return run


class Bench:
    """A tiny model with its tokenizer and a text on disk, to measure and to export."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ropex-chaos-"))
        self.model = self.folder / "model"
        self.text = self.folder / "text.txt"
        tiny_model("llama", vocab_size=260).save_pretrained(self.model)
        byte_tokenizer().save_pretrained(self.model)
        self.text.write_text("the meadow is green, and the sky is wide; " * 400, encoding="utf-8")
        self.random = random.Random(0)
        self.made = 0

    def new(self) -> Path:
        """The path of a folder that is not there."""
        self.made += 1
        return self.folder / f"new-{self.made}"

    def measuring(self, kind: str, out: Path) -> list[Any]:
        """The arguments of one of the measuring commands."""
        common = ["--model", self.model, "--methods", "none,yarn", "--device", "cpu", "--out", out]
        text = ["--text", self.text, "--length", 700, "--bins", 3, "--documents", 3]
        if kind == "perplexity":
            return [kind, *text, *common]
        if kind == "retrieval":
            return [kind, "passkey", "--lengths", "500", "--samples", 2, "--depths", "0.1,0.9", *common]
        return [kind, *text, "--tasks", "passkey", "--lengths", "500", "--depths", "0.5", *common]


def nap(low: float, high: float, chance: random.Random) -> None:
    time.sleep(chance.uniform(low, high))


def traceback_in(output: Path) -> bool:
    return "Traceback" in output.read_text(errors="replace")


def result_of(folder: Path, kind: str) -> Any:
    """What was measured, without when and how fast."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "environment")}
        return [timeless(each) for each in value] if isinstance(value, list) else value

    return timeless(json.loads((folder / f"{kind}.json").read_text()))

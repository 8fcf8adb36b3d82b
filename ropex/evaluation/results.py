"""Results on disk: what they were measured on, whole files only, and what a killed run had finished."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ropex._version import __version__

__all__ = ["Cells", "environment", "fingerprint", "write_csv", "write_json"]


def environment(parameter: Tensor | None = None) -> dict[str, Any]:
    """What a measurement ran on: processor, versions, commit, and a parameter's dtype and device."""
    stamp: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers")},
        "ropex": __version__,
        "commit": _commit(),
    }
    if parameter is not None:
        stamp["dtype"] = str(parameter.dtype).removeprefix("torch.")
        stamp["device"] = parameter.device.type
        if parameter.device.type == "cuda":
            stamp["gpu"] = torch.cuda.get_device_name(parameter.device)
    return stamp


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result so that the file is never seen half written."""
    _write(path, json.dumps(result, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same keys, the same way."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(path, text.getvalue())


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def fingerprint(model: nn.Module) -> str:
    """A short hash of a model's config and of its weights, by some of each, their dtype and device."""
    config = getattr(model, "config", None)
    digest = hashlib.sha256(b"" if config is None else config.to_json_string(use_diff=False).encode())
    for name, parameter in model.named_parameters():
        sample = parameter.detach().flatten()[:: max(parameter.numel() // 64, 1)].to("cpu", torch.float64)
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype} {parameter.device.type} ".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


class Cells:
    """Finished parts of a measurement, in a file that is written anew after each.

    Args:
        path: of the file; None keeps them in memory alone.
        about: what all parts have in common.

    Raises:
        ValueError: the file is about something else, or no such file.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self._path = path
        self._about = dict(about)
        self._finished: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            before, self._finished = known["about"], dict(known["cells"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(path)!r}: must hold the finished parts of a measurement; remove it or pass another folder"
            ) from error
        if before != self._about:
            changed = [name for name in {**before, **self._about} if before.get(name) != self._about.get(name)]
            what = ", ".join(f"{n} {before.get(n)!r}, now {self._about.get(n)!r}" for n in changed)
            raise ValueError(f"{str(path)!r}: holds parts of another measurement ({what}); pass another folder")

    def __contains__(self, key: str) -> bool:
        return key in self._finished

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """The finished part of this name, measured now if there is none."""
        if key not in self._finished:
            self._finished[key] = measure()
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._path, {"about": self._about, "cells": self._finished})
        return self._finished[key]


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _commit() -> str | None:
    """The commit of the checkout that ropex runs from, -dirty where files differ; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    # Results of earlier runs are no difference in what is measured.
    outside = [".", ":!benchmarks/results", ":!docs", ":!*.md"]
    try:
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "-C", root, "diff", "--quiet", "HEAD", "--", *outside], check=False)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if changed.returncode else "")

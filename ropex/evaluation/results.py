"""Results on disk: what they were measured on, whole files only, and what a killed run had finished."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import itertools
import json
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ropex._disk import make_folder, read_object, write_text, writing
from ropex._version import __version__

__all__ = ["Cells", "contents", "environment", "fingerprint", "write_csv", "write_json"]


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
    write_text(path, json.dumps(result, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same keys, the same way."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def fingerprint(model: nn.Module) -> str:
    """A short hash of a model's config, and of the names, shapes, dtypes and devices of its weights and buffers."""
    config = getattr(model, "config", None)
    digest = hashlib.sha256(b"" if config is None else config.to_json_string(use_diff=False).encode())
    digest.update(str(getattr(config, "_attn_implementation", None)).encode())
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} {tensor.device.type} ".encode())
    return digest.hexdigest()[:16]


def contents(model: nn.Module, tokenizer: Any = None) -> str:
    """A hash of all weights and buffers of a model, on all ranks, of its modules' settings, and of its tokenizer.

    Every byte is read once; `docs/reliability.md` says how long that takes.
    """
    digest = hashlib.sha256()
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        local = getattr(tensor, "to_local", lambda tensor=tensor: tensor)().detach().to("cpu")
        dense = (local if local.layout is torch.strided else local.to_dense()).resolve_conj().resolve_neg()
        digest.update(memoryview(dense.contiguous().flatten().view(torch.uint8).numpy()))
    for module in model.modules():
        digest.update(repr([*_settings(module)]).encode())
    if tokenizer is not None:
        digest.update(_described(tokenizer).encode())
    if _distributed():
        digests: list[str] = [""] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(digests, digest.hexdigest())
        return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
    return digest.hexdigest()[:16]


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module computes with besides tensors, such as its scale, or which of its adapters are in use."""
    for name, value in vars(module).items():
        values = [*value, *value.values()] if isinstance(value, dict) else value
        plain = all(isinstance(each, int | float | str) for each in (values if isinstance(values, list) else [values]))
        if plain and name not in ("training", "name_or_path", "warnings_issued"):
            yield name, value


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _described(tokenizer: Any) -> str:
    """All that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = getattr(tokenizer, "get_vocab", dict)
    rules = {"vocabulary": vocabulary()} if backend is None else json.loads(backend.to_str())
    for per_call in ("truncation", "padding"):  # which each call sets
        rules.pop(per_call, None)
    special = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
    return json.dumps([type(tokenizer).__name__, rules, special], sort_keys=True)


class Cells:
    """Finished parts of a measurement, in a file that is written anew after each.

    Several processes may measure into one file: each keeps what the others have finished, and measures nothing that
    it finds finished. Among the ranks of `torch.distributed` the first one reads and writes, and the others wait.

    Args:
        path: of the file; None keeps them in memory alone. It is written at once, so that a place that cannot be
            written is found before the first measurement.
        about: what all parts have in common.
        state: what the parts at hand are measured in, such as a digest of the weights; those of another are kept, and
            measured anew.

    Raises:
        ValueError: the file is about something else, or no such file.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any], state: str = "") -> None:
        self._path = path
        self._about = dict(about)
        self._state = state
        self._finished: dict[str, Any] = {}
        if path is not None:
            self._on_first_rank(self._write)

    def __contains__(self, key: str) -> bool:
        return key + self._state in self._finished

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """The finished part of this name, measured now if there is none."""
        key += self._state
        if key not in self._finished and self._path is not None:
            self._on_first_rank(self._read)  # another process may have finished it
        if key not in self._finished:
            self._finished[key] = measure()
            if self._path is not None:
                self._on_first_rank(self._write)
        return self._finished[key]

    def _on_first_rank(self, do: Callable[[Path], None]) -> None:
        """Do it on the first rank, and have what it found, or its error, on all."""
        path = self._path
        assert path is not None
        if not _distributed():
            do(path)
            return
        outcome: list[Any] = [None, None]
        if torch.distributed.get_rank() == 0:
            try:
                do(path)
            except Exception as error:
                outcome[1] = error
            outcome[0] = self._finished
        torch.distributed.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        self._finished = outcome[0]

    def _write(self, path: Path) -> None:
        """Write what is finished here and what is finished in the file."""
        make_folder(path.parent)
        with writing(path.parent) as put:
            self._read(path)
            text = json.dumps({"about": self._about, "cells": self._finished}, indent=2, allow_nan=False) + "\n"
            put(path.name, functools.partial(Path.write_text, data=text, encoding="utf-8"))

    def _read(self, path: Path) -> None:
        """Take what is finished in the file."""
        if not path.exists():
            return
        known = read_object(path, "the finished parts of a measurement; remove it or pass another folder")
        before, finished = known.get("about"), known.get("cells")
        if not isinstance(before, dict) or not isinstance(finished, dict):
            raise ValueError(
                f"{str(path)!r}: must hold the finished parts of a measurement; remove it or pass another folder"
            )
        if before != self._about:
            changed = [name for name in {**before, **self._about} if before.get(name) != self._about.get(name)]
            what = ", ".join(f"{n} {before.get(n)!r}, now {self._about.get(n)!r}" for n in changed)
            raise ValueError(f"{str(path)!r}: holds parts of another measurement ({what}); pass another folder")
        self._finished = {**finished, **self._finished}


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

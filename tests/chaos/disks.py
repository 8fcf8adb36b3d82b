"""Disks that are full, or become full, or cannot be written; and whatever else makes a command fail."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import ropex
from ropex.evaluation.results import Cells
from ropex.patching import files
from tests.chaos.processes import Bench, Child, command, traceback_in
from tests.oracles import tiny_model

MIB = 2**20
_NAMESPACE = ("unshare", "--mount", "--map-root-user")


def can_mount() -> bool:
    """Whether this machine lets us make small file systems, in a namespace of their own."""
    if shutil.which("unshare") is None:
        return False
    mount = "mount -t tmpfs -o size=1m tmpfs /mnt"
    return subprocess.run([*_NAMESPACE, "sh", "-c", mount], capture_output=True).returncode == 0


def full_disks() -> dict[str, Any]:
    """On small file systems where they are allowed, and with a writer that fails elsewhere."""
    if not can_mount():
        return {"file system": "a writer that fails", **failing_writer()}
    code = "from tests.chaos.disks import small_disks; import json; print(chr(10) + json.dumps(small_disks()))"
    done = subprocess.run([*_NAMESPACE, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    import json

    return {"file system": "tmpfs", **json.loads(done.stdout.splitlines()[-1])}


@contextmanager
def disk(size: int, *, read_only: bool = False) -> Iterator[Path]:
    """A small file system, mounted."""
    folder = Path(tempfile.mkdtemp(prefix="ropex-disk-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def fill(folder: Path) -> Path:
    """A file that takes all the room that is left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (MIB // 4, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return filler


def small_disks() -> dict[str, Any]:
    """Each scenario once; what was there before must be there afterwards, and every command must say what is wrong."""
    scenarios = (
        _command_on_a_full_disk,
        _command_on_a_read_only_disk,
        _fills_while_measuring,
        _save,
        _export,
        _picture,
    )
    lost = {scenario.__name__[1:]: scenario(Bench()) for scenario in scenarios}
    return {"tried": len(lost), "lost": sum(lost.values()), "which": [name for name, failed in lost.items() if failed]}


def _refused(arguments: list[Any], log: Path, *words: str) -> bool:
    """Whether a command ends with exit code 2 and a message with these words."""
    code = Child(command(*arguments), log).wait()
    text = log.read_text()
    return code == 2 and not traceback_in(log) and all(word in text for word in words)


def _command_on_a_full_disk(bench: Bench) -> bool:
    log = bench.folder / "log"
    with disk(2 * MIB) as folder:
        (folder / "out").mkdir()
        fill(folder)
        arguments = bench.measuring("compare", folder / "out")
        # Before the model is loaded: there is none of this name.
        arguments[arguments.index("--model") + 1] = "/no/such/model"
        refused = _refused(
            bench.measuring("compare", folder / "out"), log, "No space left on device", "free some space"
        )
        early = Child(command(*arguments), log).wait() == 2 and "No space left on device" in log.read_text()
        return not (refused and early and not list((folder / "out").iterdir()))


def _command_on_a_read_only_disk(bench: Bench) -> bool:
    with disk(2 * MIB, read_only=True) as folder:
        return not _refused(
            bench.measuring("perplexity", folder / "out"), bench.folder / "log", "Read-only file system"
        )


def _fills_while_measuring(bench: Bench) -> bool:
    with disk(3 * MIB) as folder:
        cells = Cells(folder / "cells.json", {"model": "m"})
        for i in range(5):
            cells.get(f"part {i}", lambda: [1.0] * 1000)
        filler = fill(folder)
        try:
            cells.get("part 5", lambda: [1.0] * 100_000)
        except OSError as error:
            told = error.errno == errno.ENOSPC and str(error.filename).startswith(str(folder))
        else:
            told = False
        kept = len(Cells(folder / "cells.json", {"model": "m"})._finished) if filler.unlink() is None else 0
        return not (told and kept == 5 and [path.name for path in folder.iterdir()] == ["cells.json"])


def _save(bench: Bench) -> bool:
    patch = ropex.patch(tiny_model("llama", hidden_size=512), "clex", factor=4)
    learned = list(patch.rotary.parameters())
    with disk(2 * MIB) as folder:
        patch.save(folder)
        before = files.read(folder).weights
        filler = fill(folder)
        with torch.no_grad():
            for parameter in learned:
                parameter.add_(1.0)
        try:
            patch.save(folder)
        except OSError as error:
            told = error.errno == errno.ENOSPC
        else:
            told = False
        after = files.read(folder).weights
        filler.unlink()
        same = all(torch.equal(before[name], after[name]) for name in before)
        return not (told and same and len(list(folder.iterdir())) == 2)


def _export(bench: Bench) -> bool:
    ropex.patch(tiny_model("llama", vocab_size=260), "yarn", factor=4).save(bench.model)
    (bench.model / "large.bin").write_bytes(bytes(2 * MIB))
    with disk(MIB) as folder:
        arguments = ["export", bench.model, "--to", "transformers", "--out", folder / "out"]
        refused = _refused(arguments, bench.folder / "log", "No space left on device")
        return not (refused and not list(folder.iterdir()))


def _picture(bench: Bench) -> bool:
    with disk(MIB) as folder:
        (folder / "old.png").write_bytes(b"old")
        fill(folder)
        arguments = ["methods", "--plot", folder / "old.png"]
        refused = _refused(arguments, bench.folder / "log", "No space left on device")
        return not (refused and (folder / "old.png").read_bytes() == b"old")


def failing_writer() -> dict[str, Any]:
    """The same promises with an `fsync` that finds the disk full, at each call in turn."""
    patch = ropex.patch(tiny_model("llama", hidden_size=512), "clex", factor=4)
    tried = lost = 0
    for at in range(1, 4):
        folder = Bench().new()
        patch.save(folder)
        before = sorted(path.name for path in folder.iterdir())
        calls = 0

        def full(file: int, at: int = at) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with mock.patch("os.fsync", full), torch.no_grad():
            for parameter in patch.rotary.parameters():
                parameter.add_(1.0)
            try:
                patch.save(folder)
            except OSError:
                lost += files.read(folder) is None or before != sorted(path.name for path in folder.iterdir())
        tried += 1
    return {"tried": tried, "lost": lost}


def broken_inputs(every: int = 1) -> dict[str, Any]:
    """Commands that cannot work: each must say so in a line, with exit code 2. All, or each so many'th."""
    bench = Bench()
    ropex.patch(tiny_model("llama", vocab_size=260), "clex", factor=2).save(bench.model)
    cases = dict(_broken_models(bench)) | dict(_broken_files(bench)) | dict(_absurd(bench))
    failed = []
    for name, arguments in [*cases.items()][::every]:
        log = bench.folder / "log"
        code = Child(command(*arguments, folder=bench.folder), log).wait()
        text = " ".join(log.read_text(errors="replace").split())
        if code != 2 or traceback_in(log) or "error:" not in text.lower() or "fault of ropex" in text:
            failed.append(f"{name}: exit code {code}: {text[-300:]}")
    return {"tried": len(cases) // every, "failed": len(failed), "which": failed}


def _broken_models(bench: Bench) -> Iterator[tuple[str, list[Any]]]:
    """A model's files, each broken in several ways, read by each command that reads them."""

    def edits(name: str) -> Iterator[tuple[str, Callable[[Path], object]]]:
        yield "missing", lambda path: path.unlink()
        yield "empty", lambda path: path.write_bytes(b"")
        yield "cut", lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        yield "binary", lambda path: path.write_bytes(bytes(range(256)) * 4)
        yield "directory", lambda path: (path.unlink(), path.mkdir())
        if name.endswith(".json"):
            yield "list", lambda path: path.write_text("[1, 2]")
            yield "number", lambda path: path.write_text("7")
            yield "deep", lambda path: path.write_text("[" * 100_000)
            yield "nothing", lambda path: path.write_text("{}")

    readers = {
        "config.json": ("perplexity", "inspect", "export"),
        "ropex.json": ("inspect", "export"),
        "model.safetensors": ("perplexity",),
        "tokenizer.json": ("perplexity",),
        "tokenizer_config.json": ("export",),
        "generation_config.json": ("export",),
        "model.safetensors.index.json": ("export",),
    }
    for name, kinds in readers.items():
        for how, edit in edits(name):
            for kind in kinds:
                needed = name in ("config.json", "ropex.json", "model.safetensors", "tokenizer.json")
                if (name, how, kind) == ("ropex.json", "missing", "inspect"):
                    continue  # it is a model that is not patched
                if not needed and how in ("missing", "directory", "nothing") and "index" not in name:
                    continue  # it can be done without
                if "index" in name and how in ("missing", "directory"):
                    continue
                folder = bench.new()
                shutil.copytree(bench.model, folder)
                if not (folder / name).exists():
                    (folder / name).write_text('{"weight_map": {}}')
                edit(folder / name)
                arguments = {
                    "perplexity": ["perplexity", "--model", folder, "--text", bench.text, "--length", 100, "--bins", 2],
                    "inspect": ["inspect", folder],
                    "export": ["export", folder, "--to", "vllm", "--out", bench.new(), "--length", 900],
                }[kind]
                yield f"{name} {how}, {kind}", arguments


def _broken_files(bench: Bench) -> Iterator[tuple[str, list[Any]]]:
    texts = {
        "deep": "a: " + "[" * 5000,
        "odd keys": "? [1, 2]\n: 3\n",
        "a null key": "null: 3\n",
        "a number as a key": "3: 3\n",
        "twice": "length: 700\nlength: 800\n",
        "twice below": "methods: {yarn: {factor: 2, factor: 3}}\n",
        "a list": "- 1\n",
        "no YAML": "a: [1\n",
        "a tag": "methods: !!python/object/apply:os.system ['true']\n",
        "an alias bomb": "methods: &a [*a]\n",
        "zero": "methods: \0\n",
        "options that are no text": "methods: {yarn: {1: 2}}\n",
        "infinite lengths": "tasks: passkey\nlengths: [.inf]\n",
        "infinite bins": "bins: [0, .inf]\n",
        "a method that is a list": "methods: [[yarn]]\n",
        "length that is a list": "length: []\n",
        "length that is false": "length: false\n",
        "length that is a text": "length: 1e400\n",
        "a date": "seed: 2026-01-01\n",
        "a broken timestamp": "seed: !!timestamp x\n",
        "a broken int": "seed: !!int ''\n",
        "a broken bool": "seed: !!bool x\n",
        "a name with a zero": 'out: "a\\0b"\n',
        "a name with half a character": 'text: "a\\uD800b"\n',
        "a number and a text": "methods: {1: {method: yarn}, '1': {method: ntk}}\n",
        "a depth that is true": "tasks: passkey\nlengths: 500\ndepths: [true]\n",
        "aliases of aliases": "".join(
            f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]\n" for i in range(9)
        ),
    }
    for name, text in texts.items():
        path = bench.folder / f"{len(name)}-{name.replace(' ', '-')}.yaml"
        path.write_text(text)
        yield f"YAML {name}", ["compare", path]
    contents = {
        "UTF-16": "text".encode("utf-16"),
        "UTF-16 without a mark": ("text " * 100).encode("utf-16-le"),
        "zeros": bytes(5000),
        "Latin-1": "Käse".encode("latin-1"),
        "nothing": b"",
        "blanks": b" \n" * 9000,
        "a mark alone": b"\xef\xbb\xbf",
    }
    for name, content in contents.items():
        path = bench.folder / f"{name.replace(' ', '-')}.txt"
        path.write_bytes(content)
        yield f"text of {name}", ["perplexity", "--model", bench.model, "--text", path, "--length", 100, "--bins", 2]
    lines = bench.folder / "lines.jsonl"
    lines.write_text('{"text": "a"}\n')
    yield "JSON lines", ["perplexity", "--model", bench.model, "--text", lines]


def _absurd(bench: Bench) -> Iterator[tuple[str, list[Any]]]:
    long = "a" * 5000
    measure = ["perplexity", "--model", bench.model, "--text", bench.text]
    short = [*measure, "--length", 100, "--bins", 2]
    yield "a target of 1e9", [*measure, "--length", 100, "--bins", 2, "--factor", 1e9]
    yield "a length of 1e9", [*measure, "--length", 10**9]
    yield "bins", [*measure, "--length", 700, "--bins", 20_000_000_000]
    yield "a stride beyond 2**63", [*measure, "--length", 700, "--protocol", "press", "--stride", 2**70]
    yield "a seed beyond 2**63", ["retrieval", "passkey", "--model", bench.model, "--seed", 2**70]
    yield "lengths", ["retrieval", "passkey", "--model", bench.model, "--lengths", 10**12]
    yield "a picture at factor 1e5", ["methods", "--plot", bench.new() / "x.png", "--factor", 1e5]
    yield "a picture of many pairs", ["methods", "--plot", "x.png", "--dim", 2**34]
    yield "a long name of a model", ["perplexity", "--model", f"/{long}"]
    yield "a long name of a text", ["perplexity", "--model", bench.model, "--text", long]
    yield "a long name of a folder", [*short, "--out", long]
    yield "a long name of a config", ["compare", f"{long}.yaml"]
    yield "a long name to inspect", ["inspect", long]
    yield "a long name to export", ["export", bench.model, "--to", "vllm", "--length", 900, "--out", long]
    yield "a long name of a picture", ["methods", "--plot", f"{long}.png"]
    yield "the meta device", [*short, "--device", "meta"]
    yield "no device", [*short, "--device", "toaster"]
    yield "a home that is not there", ["perplexity", "--model", "~nobody-of-this-name/model"]
    yield "an out that is a file", [*short, "--out", bench.text]
    yield "an out in a file", [*short, "--out", bench.text / "x"]
    yield (
        "an export into its source",
        ["export", bench.model, "--to", "vllm", "--length", 900, "--out", bench.model / "x"],
    )
    yield "an export onto its source", ["export", bench.model, "--to", "vllm", "--length", 900, "--out", bench.model]
    yield "a value that nests", [*short, "--methods", "yarn:factor=" + "[" * 3000]
    yield "a value that is no date", [*short, "--methods", "yarn:factor=2024-13-45"]
    yield "a device of another package", [*short, "--device", "hpu"]
    yield (
        "shifts",
        ["probe", "--model", bench.model, "--text", bench.text, "--length", 50, "--shifts", "99999999999999999999"],
    )

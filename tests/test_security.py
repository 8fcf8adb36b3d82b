"""What SECURITY.md promises of other people's files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ropex
from ropex.cli import app
from ropex.evaluation.loading import load_model
from ropex.patching import empty_model
from tests.oracles import byte_tokenizer, tiny_model


class Runs:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.mark, "it ran")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model, its tokenizer, and a patch that has learned something."""
    folder = tmp_path / "model"
    model = tiny_model("llama", vocab_size=260)
    with ropex.patch(model, "clex", factor=2) as patch:
        patch.save(folder)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def every_reader(directory: Path, out: Path) -> dict[str, Any]:
    """All that reads a directory of somebody else."""
    return {
        "load": lambda: ropex.load(tiny_model("llama", vocab_size=260), directory),
        "inspect": lambda: empty_model(directory),
        "export": lambda: ropex.export(directory, "transformers", out, length=900),
        "measure": lambda: load_model(str(directory)),
    }


def test_no_pickle_is_read(directory: Path, tmp_path: Path) -> None:
    """In the place of what was learned, and of the weights."""
    mark = tmp_path / "mark"
    (learned,) = directory.glob("ropex.*.safetensors")
    weights = directory / "model.safetensors"
    for path in (learned, weights):
        kept = path.read_bytes()
        path.write_bytes(pickle.dumps(Runs(mark)))
        for name, read in every_reader(directory, tmp_path / "out").items():
            reads = {"load", "export"} if path is learned else {"export", "measure"}
            if name in reads:
                with pytest.raises(ValueError, match=r".{20}"):
                    read()
        path.write_bytes(kept)
    torch.save({"weight": Runs(mark)}, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: must hold tensors and nothing else"):
        ropex.export(directory, "transformers", tmp_path / "out", length=900)
    weights.unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded"):
        load_model(str(directory))
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_no_code_of_a_model_is_run(directory: Path, tmp_path: Path) -> None:
    """A config that names classes in files beside it, of a known type and of one that only they know."""
    mark = tmp_path / "mark"
    (directory / "modeling_own.py").write_text(f"open({str(mark)!r}, 'w').write('it ran')\nOwn = None\n")
    config = json.loads((directory / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    for model_type, refused in (("llama", False), ("own", True)):
        changed = {**config, "model_type": model_type, "auto_map": names}
        (directory / "config.json").write_text(json.dumps(changed))
        for name, read in every_reader(directory, tmp_path / f"out-{model_type}").items():
            if refused and name != "load":
                with pytest.raises(ValueError, match=r"cannot be loaded"):
                    read()
            else:
                read()
    assert not mark.exists()
    assert "modeling_own" not in str(os.environ)


def test_a_schedule_is_a_name_and_numbers(directory: Path) -> None:
    """No file makes ropex import or call what it names."""
    for method in ("os.system", "builtins.exec", "__import__", "torch.load", "FrequencySchedule"):
        with pytest.raises(ValueError, match=r"method='.*': must be one of none, linear"):
            ropex.scaling.from_dict({"method": method, "options": {}})


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "job.yaml"
    for tag in ("object/apply:os.system", "object/new:subprocess.Popen", "name:os.system", "module:os"):
        path.write_text(f"methods: !!python/{tag} ['touch {mark}']\n")
        done = CliRunner().invoke(app, ["compare", str(path)])
        assert done.exit_code == 2
        assert "must be a YAML file" in " ".join(done.stderr.split())
    assert not mark.exists()


def test_nothing_is_downloaded_for_a_local_directory(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is missing there, or names a repository; the hub is online."""
    asked: list[Any] = []

    def no_network(*args: Any, **kwargs: Any) -> None:
        asked.append(args)
        raise OSError("no network in this test")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "_name_or_path": "somebody/model"}))
    for missing in (
        "nothing",
        "tokenizer.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ):
        (directory / missing).unlink(missing_ok=True)
        for name, read in every_reader(directory, tmp_path / f"out-{missing}").items():
            try:
                read()
            except ValueError:
                assert name == "measure", "which needs its tokenizer and weights"
    assert asked == []


def test_an_export_of_files_that_cannot_be_written_can(directory: Path, tmp_path: Path) -> None:
    """As a shared store of models has them."""
    (directory / "onnx").mkdir()
    (directory / "onnx" / "model.onnx").write_text("kept")
    for path in (*directory.iterdir(), directory / "onnx" / "model.onnx", directory):
        path.chmod(0o555 if path.is_dir() else 0o444)
    ropex.export(directory, "transformers", tmp_path / "out", length=900)
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o200, path
    directory.chmod(0o755)


def test_an_export_follows_no_link_out_of_its_place(directory: Path, tmp_path: Path) -> None:
    """A model directory whose files are links, as a cache of the hub has them, becomes one of files."""
    store = tmp_path / "store"
    store.mkdir()
    for path in [*directory.iterdir()]:
        if not path.name.startswith("ropex"):
            shutil.move(path, store / path.name)
            path.symlink_to(store / path.name)
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    ropex.export(directory, "transformers", tmp_path / "out", length=900)
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())

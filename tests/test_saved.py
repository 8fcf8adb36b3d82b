"""Saved patches of other people: each field is checked, and nothing on disk is followed or trusted."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

import ropex
from ropex.patching import files
from tests.families import model_of
from tests.test_export import saved


def resealed(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change what `ropex.json` says, and give it a hash that fits."""
    path = directory / "ropex.json"
    content = json.loads(path.read_text())
    edit(content)
    content["hash"] = files._hash(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schedule", 3, r"schedule is 3: must be of the type dict"),
        ("schedule", {"method": "yarnn", "options": {}}, r"ropex\.json: schedule: method='yarnn'"),
        ("schedule", {"method": "clex", "options": {"factor": "4"}}, r"ropex\.json: schedule: factor='4'"),
        ("schedule", {"method": ["clex"], "options": {}}, r"ropex\.json: schedule: method=\['clex'\]"),
        ("settings", [], r"settings is \[\]: must be of the type dict"),
        ("settings.seed", "0", r"settings\.seed is '0': must be of the type int"),
        ("settings.seed", True, r"settings\.seed is True: must be of the type int"),
        ("settings.color", "red", r"settings\.color is 'red': must be left out"),
        ("settings.angles", None, r"settings\.angles is None: must be of the type str"),
        ("ropes", [], r"ropes is \[\]: must be of the type dict"),
        ("ropes", {}, r"ropes is \{\}: must be one that is scaled, or more"),
        ("ropes.scaled", 4, r"ropes\.scaled is 4: must be an object"),
        ("ropes.scaled.geometry", {"dim": 16}, r"ropes\.scaled\.geometry: .*missing"),
        ("ropes.scaled.geometry.dim", 7, r"ropes\.scaled\.geometry: dim=7: must be even"),
        ("ropes.scaled.geometry.base", "1e4", r"ropes\.scaled\.geometry: base='1e4': must be a finite number"),
        (
            "ropes.scaled.turning",
            [True],
            r"ropes\.scaled\.turning is \[True\]: must be a list of 8 times true or false",
        ),
        ("ropes.scaled.scaled", 1, r"ropes\.scaled\.scaled is 1: must be of the type bool"),
        ("channels", "quarter", r"channels is 'quarter': must be a layout of channels"),
        ("softmax_factor", -1.0, r"softmax_factor is -1\.0: must be a finite number > 0"),
        ("softmax_factor", float("nan"), r"softmax_factor is nan: must be a finite number > 0"),
        ("model_type", 3, r"model_type is 3: must be of the type str or null"),
        ("weights", 3, r"weights is 3: must be of the type str or null"),
        ("dtype", "float64", r"the dtype of the learned \S+ is 'float32': must be float64"),
        ("torch", None, r"torch is None: must be of the type str"),
    ],
)
def test_a_malformed_field_is_named(field: str, value: Any, message: str, tmp_path: Path) -> None:
    """Its hash fits, as that of a file that another program wrote does."""
    saved("llama", "clex", tmp_path)

    def edit(content: Any) -> None:
        *parents, last = field.split(".")
        for parent in parents:
            content = content[parent]
        content[last] = value

    resealed(tmp_path, edit)
    model = model_of("llama")
    with pytest.raises(ValueError, match=message):
        ropex.load(model, tmp_path)
    assert not ropex.inspect(model).patched


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: torch.full_like(x, math.nan), r"the learned \S+ is \[nan, .*: must be finite"),
        (lambda x: torch.full_like(x, -math.inf), r"the learned \S+ is \[-inf, .*: must be finite"),
        (lambda x: x.double(), r"the dtype of the learned \S+ is 'float64': must be float32"),
        (lambda x: x.half(), r"the dtype of the learned \S+ is 'float16': must be float32"),
        (lambda x: x.to(torch.int32), r"the dtype of the learned \S+ is 'int32': must be float32"),
        (lambda x: x[..., :1].contiguous(), r"what was learned has .*, and the patch needs"),
    ],
)
def test_learned_weights_that_are_none(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    saved("llama", "clex", tmp_path)
    (path,) = tmp_path.glob("ropex.*.safetensors")
    data = to_bytes({name: change(value) for name, value in load_file(path).items()})
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / f"ropex.{digest[:16]}.safetensors").write_bytes(data)
    resealed(tmp_path, lambda content: content.update(weights=digest))
    model = model_of("llama")
    with pytest.raises(ValueError, match=message):
        ropex.load(model, tmp_path)
    assert not ropex.inspect(model).patched


def test_a_save_of_the_first_format_loads(tmp_path: Path) -> None:
    """It has one name for all weights, and does not say their dtype."""
    saved("llama", "clex", tmp_path)
    (path,) = tmp_path.glob("ropex.*.safetensors")
    path.rename(tmp_path / "ropex.safetensors")
    resealed(tmp_path, lambda content: (content.update(format=1), content.pop("dtype")))
    model = model_of("llama")
    patch = ropex.load(model, tmp_path)
    patch.save(tmp_path)
    assert not (tmp_path / "ropex.safetensors").exists()
    ropex.unpatch(model)
    ropex.load(model, tmp_path)


def test_a_bfloat16_patch_loads_again(tmp_path: Path) -> None:
    """What is learned is rounded with the model's weights, and its dtype is that of the save."""
    model = model_of("llama")
    patch = ropex.patch(model, "clex", factor=2)
    model.to(torch.bfloat16)
    patch.save(tmp_path)
    learned = [parameter.clone() for parameter in patch.rotary.parameters()]
    again = ropex.load(model_of("llama"), tmp_path)
    assert all(torch.equal(a, b.float()) for a, b in zip(again.rotary.parameters(), learned, strict=True))


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    """In the place of what a save writes, or of what it holds while it does."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    patch = ropex.patch(model_of("llama"), "clex", factor=2)
    patch.save(out)
    for path in [*out.iterdir()]:
        path.unlink()
        path.symlink_to(victim)
    patch.save(out)
    (out / ".ropex.lock").symlink_to(victim)
    with pytest.raises(OSError, match=r"symbolic links"):
        patch.save(out)
    assert victim.read_text() == "mine"
    assert not any(path.is_symlink() for path in out.iterdir() if path.name != ".ropex.lock")

"""Saved patches come back, and exported ones need no ropex."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import ropex
from ropex.cli import app
from tests.conftest import thinned
from tests.families import FIVE, logits_of, model_of, tokens

SIX = ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gpt_neox"]
OPTIONS: dict[str, dict[str, Any]] = {
    "abf": {"base": 50_000.0},
    "proportional": {"fraction": 0.5},
    "none": {},
    "drope": {},
}
TYPES = {"none": "default", "linear": "linear", "yarn": "yarn", "llama3": "llama3"}
BESIDE = [
    ("gpt_neox", "yarn"),
    ("gpt_neox", "ntk"),
    ("qwen3_moe", "truncated"),
    ("qwen2", "linear"),
    ("qwen3", "llama3"),
]
STATIC = sorted(set(ropex.methods()) - {"clex", "dynamic_ntk", "dynamic_yarn", "longrope"})
LENGTHS = (300, 1500)  # below and above the trained length of 512


def saved(family: str, method: str, directory: Path, **options: Any) -> nn.Module:
    model = model_of(family)
    patch = ropex.patch(model, method, **(options or OPTIONS.get(method, {"factor": 4})))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".learned." in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(directory)
    patch.save(directory)
    return model


def plain(directory: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


# --- plain transformers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(*pair, marks=[] if "llama" in pair or pair in BESIDE else pytest.mark.slow)
        for pair in itertools.product(SIX, STATIC)
    ],
)
def test_static_methods_in_plain_transformers(family: str, method: str, tmp_path: Path) -> None:
    """By save_pretrained alone, and by an export."""
    model = saved(family, method, tmp_path / "saved")
    done = ropex.export(tmp_path / "saved", "transformers", tmp_path / "out")
    assert done.rope_type == TYPES.get(method, "longrope")
    assert done.lost == ()
    for directory in ("saved", "out"):
        other = plain(tmp_path / directory)
        for length in LENGTHS:
            ids = tokens(length)
            assert (logits_of(other, ids) - logits_of(model, ids)).abs().max() < 1e-5


@pytest.mark.parametrize("family", thinned(SIX, "llama", "gpt_neox"))
@pytest.mark.parametrize("length", [1024, 1536])
def test_a_learned_schedule_at_a_length(family: str, length: int, tmp_path: Path) -> None:
    model = saved(family, "clex", tmp_path / "saved", max_factor=4)
    with pytest.raises(ValueError, match=r"pass the length in tokens that they shall be frozen at"):
        ropex.export(tmp_path / "saved", "transformers", tmp_path / "out")
    done = ropex.export(tmp_path / "saved", "transformers", tmp_path / "out", length=length)
    assert (done.rope_type, done.length) == ("longrope", length)
    other = plain(tmp_path / "out")
    assert other.config.max_position_embeddings == length
    patched = ropex.Patch(model, next(m for m in model.modules() if type(m).__name__ == "PatchedRotary"))
    for tokens_used in (200, length):
        ids = tokens(tokens_used)
        with patched.pin_length(length):
            assert (logits_of(other, ids) - logits_of(model, ids)).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["dynamic_ntk", "dynamic_yarn", "longrope"])
def test_methods_that_depend_on_the_length(method: str, tmp_path: Path) -> None:
    model = saved(
        "llama", method, tmp_path / "saved", **({"factor": 2} if method != "dynamic_yarn" else {"floor": 1024})
    )
    done = ropex.export(tmp_path / "saved", "transformers", tmp_path / "frozen", length=1024)
    assert done.rope_type == "longrope"
    ids = tokens(1024)
    assert (logits_of(plain(tmp_path / "frozen"), ids) - logits_of(model, ids)).abs().max() < 1e-5
    if method == "dynamic_ntk":
        done = ropex.export(tmp_path / "saved", "transformers", tmp_path / "own")
        assert (done.rope_type, len(done.lost)) == ("dynamic", 1)
        assert (logits_of(plain(tmp_path / "own"), ids) - logits_of(model, ids)).abs().max() < 1e-5


def test_both_spellings_are_written(tmp_path: Path) -> None:
    saved("llama", "truncated", tmp_path / "saved")
    ropex.export(tmp_path / "saved", "transformers", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    parameters = config["rope_parameters"]
    assert parameters["rope_theta"] == config["rope_theta"] == 10_000.0
    assert config["rope_scaling"] == {key: value for key, value in parameters.items() if key != "rope_theta"}
    assert max(parameters["long_factor"]) == 1e30, "a pair that does not turn; JSON has no infinity"
    assert parameters["short_factor"] == parameters["long_factor"]
    assert parameters["attention_factor"] == 1.0
    assert type(config["max_position_embeddings"]) is int
    assert not list((tmp_path / "out").glob("ropex.*"))


def test_an_export_stays_out_of_what_it_copies(tmp_path: Path) -> None:
    """Into its own source, by a link, or under a name that stands for files of the model."""
    saved("llama", "yarn", tmp_path / "saved")
    (tmp_path / "link").symlink_to(tmp_path / "saved", target_is_directory=True)
    for out, message in (
        (tmp_path / "saved" / "served", r"lies in .*saved', which stays as it is"),
        (tmp_path / "link" / "served", r"lies in .*saved', which stays as it is"),
        (tmp_path / "saved" / ".." / "saved" / "x", r"lies in .*saved', which stays as it is"),
        (tmp_path / "link", r"is a link; pass the path of a new directory"),
        (tmp_path / "saved", r"must be a new or empty directory"),
    ):
        with pytest.raises(ValueError, match=message):
            ropex.export(tmp_path / "saved", "transformers", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "saved"]
    (tmp_path / "saved" / "onnx").mkdir()
    (tmp_path / "saved" / "onnx" / "model.onnx").write_text("kept")
    ropex.export(tmp_path / "saved", "transformers", tmp_path / "onnx")
    assert (tmp_path / "onnx" / "onnx" / "model.onnx").read_text() == "kept"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"head_dim": 32}),
        ("llama", {"max_position_embeddings": 1024}),
        ("gpt2", {}),
        ("qwen2", {"head_dim": 32}),
    ],
)
def test_an_export_fits_the_model_that_it_is_written_onto(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """As `load` checks it: a patch of one model is not written onto another."""
    saved("llama", "yarn", tmp_path / "saved")
    model_of(family, **options).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"was saved from a model of|has no rotary embedding module|dim"):
        ropex.export(tmp_path / "saved", "transformers", tmp_path / "out", model=tmp_path / "other")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not FIVE, reason="the words of transformers 5")
@pytest.mark.parametrize("method", ["yarn", "ntk", "truncated"])
def test_an_older_config_with_both_copies(method: str, tmp_path: Path) -> None:
    """A release whose `rope_scaling` stands beside `rope_parameters`, and is preferred by who reads both."""
    saved("llama", method, tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    stale = {"rope_theta": 10_000.0, "rope_scaling": {"rope_type": "linear", "factor": 9.0}}
    path.write_text(json.dumps({**config, **stale}))
    ropex.export(tmp_path / "saved", "vllm", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    legacy = {key: value for key, value in written["rope_parameters"].items() if key != "rope_theta"}
    assert written["rope_scaling"] == legacy
    if method != "yarn":
        assert written["rope_scaling"]["long_mscale"] == written["rope_scaling"]["attention_factor"]


def test_what_was_learned_leaves_the_weights(tmp_path: Path) -> None:
    saved("llama", "clex", tmp_path / "saved")
    ropex.export(tmp_path / "saved", "transformers", tmp_path / "out")
    from safetensors import safe_open

    names = {d: list(safe_open(tmp_path / d / "model.safetensors", "pt").keys()) for d in ("saved", "out")}
    assert any("rotary_emb" in name for name in names["saved"])
    assert not any("rotary_emb" in name for name in names["out"])


@pytest.mark.skipif(not FIVE, reason="written in words of transformers 5")
def test_what_is_not_scaling_stays(tmp_path: Path) -> None:
    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    parameters |= {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
    model = model_of("qwen3_5_text", rope_parameters=parameters)
    patch = ropex.patch(model, "yarn", factor=4)
    model.save_pretrained(tmp_path / "saved")
    patch.save(tmp_path / "saved")
    ropex.export(tmp_path / "saved", "vllm", tmp_path / "out")
    for directory in ("saved", "out"):
        written = json.loads((tmp_path / directory / "config.json").read_text())["rope_parameters"]
        assert written["mrope_section"] == [3, 3, 2]
        assert written["mrope_interleaved"] is True
    path = tmp_path / "saved" / "config.json"  # as older checkpoints say it
    config = json.loads(path.read_text())
    moved = {k: v for k, v in config.pop("rope_parameters").items() if k.startswith("mrope")}
    older = {"rope_theta": 1e4, "partial_rotary_factor": 1.0, "rope_scaling": {**moved, "rope_type": "default"}}
    path.write_text(json.dumps({**config, **older}))
    ropex.export(tmp_path / "saved", "vllm", tmp_path / "old")
    assert json.loads((tmp_path / "old" / "config.json").read_text())["rope_parameters"].items() >= moved.items()


def test_lengths_of_tokenizer_and_generation(tmp_path: Path) -> None:
    saved("llama", "yarn", tmp_path / "saved")
    files = {"tokenizer_config.json": {"model_max_length": 512}, "generation_config.json": {"max_length": 2048}}
    for name, content in files.items():
        (tmp_path / "saved" / name).write_text(json.dumps(content))
    ropex.export(tmp_path / "saved", "transformers", tmp_path / "out")
    for name, key in (("tokenizer_config.json", "model_max_length"), ("generation_config.json", "max_length")):
        assert json.loads((tmp_path / "out" / name).read_text())[key] == 2048
    (tmp_path / "saved" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": None}))
    ropex.export(tmp_path / "saved", "transformers", tmp_path / "none")
    assert json.loads((tmp_path / "none" / "tokenizer_config.json").read_text())["model_max_length"] is None


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    saved("llama", "clex", tmp_path / "saved")
    (tmp_path / "saved" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(Exception, match=r"."):
        ropex.export(tmp_path / "saved", "transformers", tmp_path / "out", length=1024)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_weights_in_the_old_format(tmp_path: Path) -> None:
    model = saved("llama", "clex", tmp_path / "saved")
    (tmp_path / "saved" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "saved" / "pytorch_model.bin")
    ropex.export(tmp_path / "saved", "transformers", tmp_path / "out", length=1024)
    state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert set(state) == set(model_of("llama").state_dict())


def test_layer_types_are_written_apart(tmp_path: Path) -> None:
    model = saved("gemma3_text", "yarn", tmp_path / "saved")
    if not hasattr(model.config, "rope_parameters"):
        pytest.skip("transformers 4 spells it otherwise")
    ropex.export(tmp_path / "saved", "transformers", tmp_path / "out")
    for directory in ("saved", "out"):
        ids = tokens(1500)
        assert (logits_of(plain(tmp_path / directory), ids) - logits_of(model, ids)).abs().max() < 1e-5


def test_what_no_config_can_say(tmp_path: Path) -> None:
    saved("llama", "longrope", tmp_path / "first", factor=4, keep_first=4)
    with pytest.raises(ValueError, match=r"gives tokens other positions or frequencies.*keep_first=0"):
        ropex.export(tmp_path / "first", "transformers", tmp_path / "out", length=2048)
    model = saved("gpt_oss", "yarn", tmp_path / "mixed")
    assert ropex.inspect(model).written is None
    with pytest.raises(ValueError, match=r"some layers keep the model's own angles and share their parameters"):
        ropex.export(tmp_path / "mixed", "transformers", tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is left half written"


@pytest.mark.skipif(not FIVE, reason="transformers 4 takes others, too")
def test_a_config_class_that_takes_one_type_only(tmp_path: Path) -> None:
    model = saved("phi3", "yarn", tmp_path / "saved")
    assert ropex.inspect(model).written == "longrope"
    done = ropex.export(tmp_path / "saved", "transformers", tmp_path / "out")
    assert done.rope_type == "longrope"
    ids = tokens(1500)
    assert (logits_of(plain(tmp_path / "out"), ids) - logits_of(model, ids)).abs().max() < 1e-5


# --- vLLM -------------------------------------------------------------------------------------------------------------


def test_vllm(tmp_path: Path) -> None:
    saved("llama", "ntk", tmp_path / "ntk")
    done = ropex.export(tmp_path / "ntk", "vllm", tmp_path / "out")
    assert done.command == f"vllm serve {tmp_path / 'out'} --max-model-len 2048"
    parameters = json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]
    assert parameters["short_mscale"] == parameters["long_mscale"] == parameters["attention_factor"]
    saved("cohere", "ntk", tmp_path / "cohere")
    with pytest.raises(
        ValueError, match=r"pairs interleaved channels, and vLLM takes one divisor per pair only for hal"
    ):
        ropex.export(tmp_path / "cohere", "vllm", tmp_path / "cohere-out")
    saved("cohere", "yarn", tmp_path / "yarn")
    assert ropex.export(tmp_path / "yarn", "vllm", tmp_path / "yarn-out").rope_type == "yarn"
    saved("llama", "yarn", tmp_path / "warm", factor=4, amplitude=1.2)
    assert ropex.export(tmp_path / "warm", "transformers", tmp_path / "warm-own").rope_type == "yarn"
    assert ropex.export(tmp_path / "warm", "vllm", tmp_path / "warm-out").rope_type == "longrope"
    saved("llama", "dynamic_ntk", tmp_path / "dynamic", factor=2)
    with pytest.raises(ValueError, match=r"vLLM and SGLang know one length alone.* pass length="):
        ropex.export(tmp_path / "dynamic", "vllm", tmp_path / "dynamic-out")
    assert ropex.export(tmp_path / "dynamic", "vllm", tmp_path / "at", length=1024).rope_type == "longrope"


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def gguf_file(
    path: Path,
    arch: str = "llama",
    dim: int = 16,
    *,
    base: float | None = None,
    shards: int | None = None,
    kind: str | None = "linear",
    factor: float | None = None,
    trained: int | None = None,
    warmth: float | None = None,
    divisors: list[float] | None = None,
) -> Path:
    """A small file with the words of llama.cpp's converter."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, arch=arch)
    writer.add_context_length(512)
    writer.add_rope_dimension_count(dim)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    for add, value in (
        (writer.add_rope_freq_base, base),
        (writer.add_rope_scaling_factor, factor),
        (writer.add_rope_scaling_orig_ctx_len, trained),
        (writer.add_rope_scaling_attn_factors, warmth),
        (lambda count: writer.add_uint16("split.count", count), shards),
        (lambda name: writer.add_rope_scaling_type(gguf.RopeScalingType(name)), kind),
    ):
        if value is not None:
            add(value)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", torch.tensor(divisors).numpy())
    writer.add_tensor("token_embd.weight", torch.arange(12, dtype=torch.float32).reshape(3, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("method", "amplitude"), [("yarn", 1.1386294), ("truncated", 1.0)])
def test_gguf(method: str, amplitude: float, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = saved("llama", method, tmp_path / "saved")
    source = gguf_file(tmp_path / "saved" / "model.gguf")
    done = ropex.export(tmp_path / "saved", "gguf", tmp_path / "out.gguf")
    assert done.command == f"llama-server -m {tmp_path / 'out.gguf'} -c 2048"
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    geometry = ropex.inspect(model).geometry
    rotation = ropex.inspect(model).schedule.at(geometry, length=1)
    want = geometry.inv_freq() / tensors["rope_freqs.weight"].double()
    torch.testing.assert_close(want, rotation.inv_freq.flatten(), rtol=1e-6, atol=1e-25)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["llama.context_length"] == 2048
    assert fields.get("llama.rope.scaling.attn_factor", 1.0) == pytest.approx(amplitude)
    assert "llama.rope.scaling.type" not in fields, "the old scaling is gone"
    assert fields["tokenizer.ggml.tokens"] == ["a", "b", "c"]
    assert torch.equal(tensors["token_embd.weight"], torch.arange(12, dtype=torch.float32).reshape(3, 4))
    assert source.exists()


def test_a_gguf_file_of_another_base_or_in_parts(tmp_path: Path) -> None:
    saved("llama", "yarn", tmp_path / "saved")
    other = gguf_file(tmp_path / "other.gguf", base=500_000.0)
    with pytest.raises(ValueError, match=r"has the base 500000, and the patch 10000: convert the model"):
        ropex.export(tmp_path / "saved", "gguf", tmp_path / "out.gguf", model=other)
    part = gguf_file(tmp_path / "part.gguf", shards=3)
    with pytest.raises(ValueError, match=r"is one of 3 files; join them with llama-gguf-split --merge"):
        ropex.export(tmp_path / "saved", "gguf", tmp_path / "out.gguf", model=part)
    same = gguf_file(tmp_path / "same.gguf", base=10_000.0)
    ropex.export(tmp_path / "saved", "gguf", tmp_path / "out.gguf", model=same)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({}, {}),
        ({"kind": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"kind": "linear", "factor": 1.0}, {}),
        ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # the default of llama.cpp
        (
            {"kind": "yarn", "factor": 4.0, "trained": 128},
            {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.138629436111989}
            | {"original_max_position_embeddings": 128},
        ),
        (
            {"divisors": [1.0, 2.0, 4.0, 8.0], "warmth": 1.1},
            {"rope_type": "longrope", "factor": 1.0, "short_factor": [1.0, 2.0, 4.0, 8.0]}
            | {"long_factor": [1.0, 2.0, 4.0, 8.0], "attention_factor": 1.1, "original_max_position_embeddings": 512},
        ),
        ({"kind": "longrope", "factor": 4.0}, r"carries a scaling \(scaling\.factor=4\.0, scaling\.type=longrope\)"),
        ({"warmth": 1.1}, r"carries a scaling \(scaling\.attn_factor=1\.1"),
        (
            {"divisors": [1.0], "kind": "linear", "factor": 2.0},
            r"rope_freqs\.weight, scaling\.factor=2\.0, scaling\.type=linear",
        ),
    ],
)
def test_a_gguf_file_is_never_loaded_unscaled(written: dict[str, Any], read: Any, tmp_path: Path) -> None:
    from ropex.evaluation.loading import _gguf_scaling

    path = gguf_file(tmp_path / "model.gguf", **{"kind": None, **written})
    if isinstance(read, str):
        with pytest.raises(ValueError, match=read):
            _gguf_scaling(path)
    else:
        found = _gguf_scaling(path)
        assert {k: pytest.approx(v, rel=1e-6) if not isinstance(v, str) else v for k, v in read.items()} == found


def test_gguf_of_what_the_loader_would_ignore(tmp_path: Path) -> None:
    saved("qwen2", "ntk", tmp_path / "saved")
    with pytest.raises(ValueError, match=r"holds 0 GGUF files; pass model=, the file that .*convert_hf_to_gguf"):
        ropex.export(tmp_path / "saved", "gguf", tmp_path / "out.gguf")
    source = gguf_file(tmp_path / "qwen2.gguf", arch="qwen2")
    with pytest.raises(ValueError, match=r'architecture "qwen2", whose loader in llama.cpp does not read rope_freqs'):
        ropex.export(tmp_path / "saved", "gguf", tmp_path / "out.gguf", model=source)
    other = gguf_file(tmp_path / "other.gguf", dim=64)
    with pytest.raises(ValueError, match=r"rotates 64 channels, and the patch 16: convert the model that"):
        ropex.export(tmp_path / "saved", "gguf", tmp_path / "out.gguf", model=other)
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(ValueError, match=r"text\.gguf: must be a GGUF file"):
        ropex.export(tmp_path / "saved", "gguf", tmp_path / "out.gguf", model=tmp_path / "text.gguf")
    assert not (tmp_path / "out.gguf").exists()


# --- saved and loaded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(ropex.methods()))
def test_save_and_load(method: str, tmp_path: Path) -> None:
    options = OPTIONS.get(method, {"factor": 4} if method != "dynamic_yarn" else {"floor": 2048})
    model = saved("llama", method, tmp_path, **options)
    again, ids = model_of("llama"), tokens(700)
    patch = ropex.load(again, tmp_path)
    assert patch.schedule.to_dict() == ropex.inspect(model).schedule.to_dict()
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    patch.remove()
    assert torch.equal(logits_of(again, ids), logits_of(model_of("llama"), ids))


@pytest.mark.parametrize("factor", [None, 8])
def test_a_scaling_that_was_kept_is_kept_again(factor: int | None, tmp_path: Path) -> None:
    own = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10_000.0}
    model, again = (model_of("llama", rope_parameters=own) for _ in range(2))
    patch = ropex.patch(model, on_scaled="keep", factor=factor)
    patch.save(tmp_path)
    assert ropex.load(again, tmp_path).schedule == patch.schedule
    assert torch.equal(logits_of(again, tokens(600)), logits_of(model, tokens(600)))
    assert again.config.max_position_embeddings == model.config.max_position_embeddings == 128 * (factor or 4)


def test_a_checkpoint_whose_config_says_it_takes_its_sidecar_too(tmp_path: Path) -> None:
    for method in ("yarn", "linear", "ntk"):
        model = saved("llama", method, tmp_path / method)
        again = plain(tmp_path / method)
        ropex.load(again, tmp_path / method)
        assert torch.equal(logits_of(again, tokens(600)), logits_of(model, tokens(600)))


def test_settings_are_saved(tmp_path: Path) -> None:
    model = saved("gemma2", "yarn", tmp_path, factor=4, sliding="scale", precision="float32", angles="float32", seed=3)
    again = model_of("gemma2")
    ropex.load(again, tmp_path)
    assert ropex.inspect(again) == ropex.inspect(model)
    assert ropex.inspect(again).precision == ropex.inspect(again).angles == "float32"


def broken(change: str, directory: Path) -> None:
    path = directory / "ropex.json"
    content = json.loads(path.read_text())
    if change == "missing":
        path.unlink()
        return
    if change == "not json":
        path.write_text("{")
        return
    if change.startswith("weights"):
        (weights,) = directory.glob("ropex.*.safetensors")
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data) if change == "weights changed" else weights.unlink()
        return
    if change == "newer":
        content["format"] = 99
    if change == "foreign":
        content = {"version": 1}
    if change == "edited":
        content["schedule"]["options"]["factor"] = 5
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"must be a directory with ropex\.json"),
        ("not json", r"ropex\.json: must be JSON, and is not"),
        ("newer", r"has format 99, written by ropex .*update it"),
        ("foreign", r"was not written by ropex"),
        ("edited", r"ropex\.json: was changed after it was written \(its hash does not fit\)"),
        ("weights missing", r"ropex\.\w{16}\.safetensors: is missing"),
        ("weights changed", r"ropex\.\w{16}\.safetensors: was changed after it was written"),
    ],
)
def test_files_that_cannot_be_trusted(change: str, message: str, tmp_path: Path) -> None:
    saved("llama", "clex", tmp_path)
    broken(change, tmp_path)
    model, ids = model_of("llama"), tokens()
    want = logits_of(model, ids)
    with pytest.raises(ValueError, match=message):
        ropex.load(model, tmp_path)
    assert not ropex.inspect(model).patched
    assert torch.equal(logits_of(model, ids), want)


def test_a_model_of_another_geometry_is_refused(tmp_path: Path) -> None:
    saved("llama", "clex", tmp_path)
    for options in ({"head_dim": 32}, {"max_position_embeddings": 1024}):
        model = model_of("llama", **options)
        config = model.config.to_dict()
        with pytest.raises(
            ValueError, match=r"was saved from a model of .*load it into the model that it was made for|dim"
        ):
            ropex.load(model, tmp_path)
        assert not ropex.inspect(model).patched
        assert model.config.to_dict() == config


def test_a_schedule_of_ones_own_cannot_be_saved(tmp_path: Path) -> None:
    class Own(type(ropex.schedule("none"))):  # type: ignore[misc]
        method = "own"

    model = model_of("llama")
    patch = ropex.patch(model, Own())
    with pytest.raises(ValueError, match=r"must be one of ropex\.methods\(\), whose name a file can hold"):
        patch.save(tmp_path)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_commands(tmp_path: Path) -> None:
    saved("llama", "ntk", tmp_path / "saved")
    run = CliRunner().invoke
    done = run(app, ["export", str(tmp_path / "saved"), "--to", "vllm", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert f"wrote {tmp_path / 'out'}: longrope, 2048 tokens" in done.output
    assert f"vllm serve {tmp_path / 'out'} --max-model-len 2048" in done.output
    done = run(app, ["inspect", str(tmp_path / "saved")])
    assert done.exit_code == 0
    for part in ("NTKAware(factor=4", "2048 tokens, 4 x the trained 512", 'says "longrope"'):
        assert part in done.output
    done = run(app, ["inspect", str(tmp_path / "out")])
    assert "transformers' longrope" in done.output
    again = ["export", str(tmp_path / "saved"), "--to", "vllm", "--out", str(tmp_path / "out")]
    for arguments, message in (
        (again, "must be a new or empty directory"),
        (["inspect", str(tmp_path)], "must be a directory with config.json"),
        (
            ["export", str(tmp_path), "--to", "vllm", "--out", str(tmp_path / "x")],
            "must be a directory with ropex.json",
        ),
    ):
        done = run(app, arguments)
        assert done.exit_code != 0
        assert message in " ".join(done.output.split())


@pytest.mark.skipif(not FIVE, reason="reads what transformers 5 wrote")
def test_the_command_needs_no_weights(tmp_path: Path) -> None:
    saved("llama", "yarn", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert CliRunner().invoke(app, ["inspect", str(tmp_path)]).exit_code == 0

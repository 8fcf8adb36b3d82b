"""The recommendation, and `method="auto"`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ropex
from tests.oracles import TRAINED_LENGTH, logits, scaled_config, tiny_model, tiny_tokens

GEOMETRY = ropex.Geometry(dim=64, base=100_000.0, trained_length=8192)


@pytest.mark.parametrize("length", [1, 8191, 8192])
def test_within_the_trained_length_nothing_is_scaled(length: int) -> None:
    schedule, reason = ropex.recommend(GEOMETRY, length)
    assert schedule == ropex.schedule("none")
    assert reason == f"{length} tokens are within the trained length of 8192, where every scaling costs"


@pytest.mark.parametrize("length", [8193, 12288, 16384, 100_000])
def test_beyond_it_a_method_that_needs_no_training_and_leaves_short_texts_alone(length: int) -> None:
    schedule, reason = ropex.recommend(GEOMETRY, length)
    assert schedule.training_free
    assert torch.equal(schedule.at(GEOMETRY, length=8192).inv_freq, GEOMETRY.inv_freq())
    ratio = length / 8192
    alpha = ratio**2 - ratio + 1 if ratio <= 2 else 2 * ratio - 1
    want = ropex.schedule("ntk", factor=ratio, alpha=alpha).at(GEOMETRY, length=length).inv_freq
    torch.testing.assert_close(schedule.at(GEOMETRY, length=length).inv_freq, want, rtol=1e-9, atol=0)
    assert ("compare before you rely on it" in reason) == (length > 16384)
    assert reason.count(". ") == 0, "one sentence"


def test_a_model_is_no_geometry() -> None:
    with pytest.raises(ValueError, match=r"geometry of the type LlamaForCausalLM: must be one; pass inspect\(model\)"):
        ropex.recommend(tiny_model("llama"), 1000)


def test_auto_is_the_recommendation() -> None:
    model, ids = tiny_model("llama"), tiny_tokens(900)
    want = ropex.recommend(ropex.inspect(model).geometry, 900).schedule
    with ropex.patch(model, method="auto", length=900) as patch:
        assert patch.schedule == want
        assert model.config.max_position_embeddings == 900
        got = logits(model, ids)
    with ropex.patch(model, want):
        assert torch.equal(got, logits(model, ids))


def test_auto_within_the_trained_length_leaves_the_model_alone() -> None:
    model, ids = tiny_model("llama"), tiny_tokens(300)
    plain = logits(model, ids)
    with ropex.patch(model, method="auto", length=300) as patch:
        assert patch.schedule == ropex.schedule("none")
        assert model.config.max_position_embeddings == TRAINED_LENGTH
        assert (logits(model, ids) - plain).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r'method "auto" with length=None and factor=None: it needs the length and nothing else'),
        ({"factor": 2}, r'method "auto" with length=None and factor=2: it needs the length'),
        ({"factor": 2, "length": 1024}, r"it needs the length and nothing else; pass length= in tokens"),
        ({"length": 1024, "alpha": 2}, r'option alpha=2: method "auto" chooses its own options; leave alpha out'),
        ({"length": 0}, r"length=0: must be an int >= 1; pass the target length in tokens"),
        ({"length": 2.5}, r"length=2\.5: must be an int >= 1"),
    ],
)
def test_bad_auto(options: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        ropex.patch(model, method="auto", **options)
    assert not ropex.inspect(model).patched


def test_auto_and_a_scaling_that_is_kept() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        scaled_config("llama", rope_type="linear", factor=2.0, original_max_position_embeddings=512)
    )
    with pytest.raises(ValueError, match=r"method='auto' with on_scaled=\"keep\": .* keeps its own scaling"):
        ropex.patch(model, method="auto", length=2048, on_scaled="keep")
    with ropex.patch(model, method="auto", length=2048, on_scaled="replace") as patch:
        assert patch.schedule.method == "dynamic_ntk"
        assert model.config.max_position_embeddings == 2048

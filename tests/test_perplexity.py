"""Perplexity by position, against slow and obvious references on tiny models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config

import ropex
from ropex.evaluation import perplexity_by_length
from ropex.patching import depends_on_length
from tests.oracles import VOCABULARY, logits, scaled_config, tiny_model, tiny_tokens

LENGTH = 700
TOKENS = tiny_tokens(LENGTH)[0]
EDGES = (0, 64, 256, 512, 700)


def slow_nll(model: nn.Module, start: int, end: int, context: int = LENGTH) -> float:
    """All logits of one pass over `context` tokens, then the mean over the predicted tokens of the bin."""
    every = logits(model, TOKENS[None, :context])[0].double()
    losses = [F.cross_entropy(every[p - 1], TOKENS[p]).item() for p in range(max(start, 1), end)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("chunk", [37, 512, 10_000])
def test_one_pass_equals_the_obvious_way(family: str, chunk: int) -> None:
    model = tiny_model(family)
    with ropex.patch(model, "yarn", factor=2):
        measured = perplexity_by_length(model, TOKENS, bins=EDGES, chunk=chunk)
        want = [slow_nll(model, start, end) for start, end in measured.bins]
    assert measured.protocol == "binned"
    assert measured.bins == ((0, 64), (64, 256), (256, 512), (512, 700))
    assert measured.nll == pytest.approx(want, abs=1e-5)
    assert measured.perplexity == pytest.approx([math.exp(x) for x in want], rel=1e-5)
    assert measured.seconds > 0


@pytest.mark.parametrize("own", [True, False], ids=["ropex", "transformers"])
def test_a_length_dependent_schedule_is_run_once_per_length(own: bool) -> None:
    def fresh() -> nn.Module:
        # transformers' module keeps the frequencies of the longest pass it saw, so each pass needs a new model.
        if own:
            return ropex.patch(tiny_model("llama"), "dynamic_ntk", factor=4).model
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(scaled_config("llama", rope_type="dynamic", factor=4.0)).eval()

    assert depends_on_length(fresh())
    measured = perplexity_by_length(fresh(), TOKENS, bins=(0, 520, 600, 700))
    want = [slow_nll(fresh(), start, end, context=end) for start, end in measured.bins]
    assert measured.nll == pytest.approx(want, abs=1e-5)
    assert abs(measured.nll[0] - slow_nll(fresh(), 0, 520)) > 1e-5, "one pass would have been another number"
    model = fresh()
    first, again = (perplexity_by_length(model, TOKENS, bins=(0, 520, 600, 700)).nll for _ in range(2))
    assert first == again, "no pass leaves anything to the next"


def test_a_pinned_length_needs_one_pass_only() -> None:
    model = tiny_model("llama")
    with ropex.patch(model, "dynamic_ntk", factor=4) as patch, patch.pin_length(LENGTH):
        assert not depends_on_length(model)
        measured = perplexity_by_length(model, TOKENS, bins=EDGES)
        want = [slow_nll(model, start, end) for start, end in measured.bins]
    assert measured.nll == pytest.approx(want, abs=1e-5)


def test_the_logits_are_never_all_there() -> None:
    model = tiny_model("llama")
    most = 0

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal most
        most = max(most, output.numel() // VOCABULARY)

    handle = model.lm_head.register_forward_hook(watch)
    perplexity_by_length(model, TOKENS, chunk=50)
    assert most == 50
    handle.remove()
    assert not model.lm_head._forward_pre_hooks


def test_models_without_rotary_embeddings_can_be_measured() -> None:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=LENGTH, bos_token_id=1, eos_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    measured = perplexity_by_length(model, TOKENS, bins=2)
    assert measured.bins == ((0, 350), (350, 700))
    assert measured.nll == pytest.approx([slow_nll(model, 0, 350), slow_nll(model, 350, 700)], abs=1e-5)


def test_training_mode_and_gradients_are_left_as_they_were() -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    perplexity_by_length(model, TOKENS)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_a_compiled_model() -> None:
    torch.compiler.reset()
    model = tiny_model("llama")
    want = perplexity_by_length(model, TOKENS, bins=EDGES)
    compiled = torch.compile(model, backend="aot_eager")
    assert perplexity_by_length(compiled, TOKENS, bins=EDGES).nll == pytest.approx(want.nll, abs=1e-6)


def test_a_model_whose_forward_runs_under_autocast() -> None:
    """As trainers in mixed precision wrap it."""
    model = tiny_model("llama")
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    measured = perplexity_by_length(model, TOKENS, bins=EDGES)
    want = [slow_nll(model, start, end) for start, end in measured.bins]
    assert measured.nll == pytest.approx(want, abs=1e-4)
    assert measured.nll != pytest.approx(perplexity_by_length(tiny_model("llama"), TOKENS, bins=EDGES).nll, abs=1e-7)


@pytest.mark.parametrize("method", ["yarn", "dynamic_ntk"])
def test_progress_grows_to_one(method: str) -> None:
    seen: list[float] = []
    model = tiny_model("llama")
    with ropex.patch(model, method, factor=2):
        perplexity_by_length(model, TOKENS, bins=3, chunk=100, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[0] < 0.5
    assert seen[-1] == pytest.approx(1)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_loss_that_is_not_finite_names_its_position() -> None:
    model = tiny_model("llama")

    def overflow(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat((output[:, :300], output[:, 300:] * float("inf")), dim=1)

    model.model.norm.register_forward_hook(overflow)
    with pytest.raises(ValueError, match=r"the loss at position 301 is nan: must be finite, .* try float32"):
        perplexity_by_length(model, TOKENS)


def test_a_model_that_scales_its_logits_is_refused() -> None:
    model = tiny_model("cohere")
    with pytest.raises(ValueError, match=r"CohereForCausalLM computes its logits from more than its output embedding"):
        perplexity_by_length(model, TOKENS)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([3]), r"tokens int64 \[1\]: must be int64 \[n\] with n >= 2"),
        (torch.zeros(2, 9, dtype=torch.int64), r"tokens int64 \[2, 9\]: must be int64 \[n\]"),
        (torch.zeros(9), r"tokens float32 \[9\]: must be int64"),
        ({"input_ids": [3, 4]}, r'tokens of the type dict: must be token ids; pass tokenizer\(\.\.\.\)\["input_ids"\]'),
        (None, r"tokens of the type NoneType: must be token ids"),
        (["a", "b"], r"tokens of the type str: must be token ids"),
        ([3, 128], r"tokens from 3 to 128: must be in 0 \.\. 127; use the model's own tokenizer"),
        ([-1, 3], r"tokens from -1 to 3: must be in 0"),
    ],
)
def test_bad_tokens(tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity_by_length(tiny_model("llama"), tokens)


@pytest.mark.parametrize(
    "bins", [0, -1, 1000, (), (0,), (0, 0), (0, 800), (-1, 5), (100, 50), (0, 1, 50), True, None, 2.5, (0, 32.0)]
)
def test_bad_bins(bins: Any) -> None:
    with pytest.raises(ValueError, match=r"bins=.*: must be"):
        perplexity_by_length(tiny_model("llama"), TOKENS, bins=bins)


def test_bad_chunk_and_model() -> None:
    with pytest.raises(ValueError, match=r"chunk=0: must be an int >= 1"):
        perplexity_by_length(tiny_model("llama"), TOKENS, chunk=0)
    with pytest.raises(ValueError, match=r"Linear has no output embedding: must be a causal language model"):
        perplexity_by_length(nn.Linear(2, 2), TOKENS)

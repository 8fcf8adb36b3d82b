"""Hundreds of bad calls, drawn: always an error of ropex, and the model as it was."""

from __future__ import annotations

import copy
import functools
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import ropex
from tests.families import logits_of, model_of, tokens

FAMILIES = ("llama", "qwen2", "gpt_neox", "cohere", "gemma2", "phi3", "gpt2", "mamba")
EXAMPLES = 320
seen: list[str] = []


@functools.cache
def shared(family: str, state: str) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    """A model in a state, with its logits and all that a failed call might change."""
    model = model_of(family)
    if state == "patched":
        ropex.patch(model, "yarn", factor=2)
    if state == "bfloat16":
        model = model.to(torch.bfloat16)
    return model, logits_of(model, tokens(40)), snapshot(model)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "config": copy.deepcopy(model.config.to_dict()),
        "generation": model.generation_config.to_dict(),
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "classes": [type(module) for module in model.modules()],
        "names": [name for name, _ in model.named_modules()],
        "hooks": sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()),
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    states = before.pop("state"), after.pop("state")
    equal = before == after and states[0].keys() == states[1].keys()
    equal = equal and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    before["state"], after["state"] = states
    return equal


not_a_factor = st.sampled_from([0, 0.5, -1, float("nan"), float("inf"), "4", True, [2], 1j])
not_a_length = st.sampled_from([0, -5, 1.5, "2048", 100, True, float("nan"), 10**3 + 0.5])
not_an_option = st.sampled_from(["", "beta", "Factor", "rope_theta", "max_length", "scaling", "alpha_", "device"])
not_a_choice = st.sampled_from(["", "EXACT", "bf16", None, 3, "none"])
needs_factor = st.sampled_from(["yarn", "linear", "ntk", "llama3", "ntk_by_parts", "longrope", "resonance"])
KNOWN = {*ropex.methods(), "pi"}
turns_below_1, turns_above_1 = st.floats(0.1, 1, exclude_max=True), st.floats(1, 9)
FAULTS = {
    "method": st.fixed_dictionaries({"method": st.text(max_size=8).filter(lambda m: m not in KNOWN)}),
    "method type": st.fixed_dictionaries({"method": st.sampled_from([3, 2.5, ["yarn"], {"method": "yarn"}, object])}),
    "no factor": st.fixed_dictionaries({"method": needs_factor}),
    "factor": st.fixed_dictionaries({"method": needs_factor, "factor": not_a_factor}),
    "length": st.fixed_dictionaries({"method": needs_factor, "length": not_a_length}),
    "both": st.fixed_dictionaries({"method": needs_factor, "factor": st.just(3), "length": st.just(2048)}),
    "option": st.builds(
        lambda method, name, value: {"method": method, "factor": 4, name or "x": value},
        needs_factor, not_an_option, st.integers(),
    ),
    "angles": st.fixed_dictionaries({"factor": st.just(2), "angles": not_a_choice}),
    "precision": st.fixed_dictionaries({"factor": st.just(2), "precision": not_a_choice}),
    "sliding": st.fixed_dictionaries({"factor": st.just(2), "sliding": not_a_choice}),
    "on_scaled": st.fixed_dictionaries({"factor": st.just(2), "on_scaled": not_a_choice}),
    "seed": st.fixed_dictionaries({"method": st.just("clex"), "seed": st.sampled_from([-1, 1.5, "0", None])}),
    "rank": st.fixed_dictionaries({"method": st.just("pose"), "factor": st.just(2), "data_rank": st.just(-1)}),
    "tokenizer": st.fixed_dictionaries({"factor": st.just(2), "tokenizer": st.sampled_from(["llama", 3, object()])}),
    "schedule and more": st.fixed_dictionaries(
        {"method": st.just(ropex.schedule("yarn", factor=2)), "length": st.integers(513, 4096)}
    ),
    "betas": st.fixed_dictionaries({"factor": st.just(2), "beta_fast": turns_below_1, "beta_slow": turns_above_1}),
    "lists": st.fixed_dictionaries(
        {"method": st.just("longrope"), "factor": st.just(2), "long_factors": st.lists(turns_above_1, min_size=3)}
    ).filter(lambda call: len(call["long_factors"]) != 8),
}  # fmt: skip


@st.composite
def bad_calls(draw: st.DrawFn) -> tuple[str, str, str, dict[str, Any]]:
    family = draw(st.sampled_from(FAMILIES))
    state = draw(st.sampled_from(["fresh", "bfloat16"] + (["patched"] if family not in ("gpt2", "mamba") else [])))
    fault = draw(st.sampled_from(sorted(FAULTS)))
    return family, state, fault, draw(FAULTS[fault])


@hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True, print_blob=False)
@hypothesis.given(bad_calls())
def test_bad_calls(call: tuple[str, str, str, dict[str, Any]]) -> None:
    family, state, fault, arguments = call
    model, want, before = shared(family, state)
    with pytest.raises(ValueError, match=r".{20}") as caught:
        ropex.patch(model, **arguments)
    assert type(caught.value) in (ValueError, ropex.UnsupportedModelError)
    seen.append(fault)
    assert same(before, snapshot(model))
    if len(seen) % 8 == 0:  # what is cheap to compare is compared each time
        assert torch.equal(logits_of(model, tokens(40)), want)


def test_there_were_hundreds_of_every_kind() -> None:
    if not seen:
        pytest.skip("runs after the drawn calls")
    assert len(seen) >= 300
    assert set(seen) == set(FAULTS)
    for family in FAMILIES:
        model, want, before = shared(family, "fresh")
        assert torch.equal(logits_of(model, tokens(40)), want)
        assert same(before, snapshot(model))

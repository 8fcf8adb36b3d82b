"""`ropex.patch`: right on every family by detection, this instance only, undone bit for bit."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import ropex
from ropex.patching import cache_of
from ropex.patching.swap import Rotating
from tests.oracles import (
    FAMILIES,
    LOGIT_ERROR,
    MORE_FAMILIES,
    TRAINED_LENGTH,
    cached,
    logits,
    scaled_config,
    tiny_config,
    tiny_model,
    tiny_tokens,
)

every_family = pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
five_families = pytest.mark.parametrize("family", FAMILIES)
FACTOR = 8
LENGTH = FACTOR * TRAINED_LENGTH
EFFECT = 1e-3


def stock(model: nn.Module, family: str, **rope_parameters: Any) -> nn.Module:
    """The same weights under transformers' own scaling."""
    other = AutoModelForCausalLM.from_config(scaled_config(family, **rope_parameters)).eval()
    other.load_state_dict(model.state_dict())
    return other


def state(model: nn.Module) -> dict[str, Any]:
    """All that a patch might leave behind."""
    config = model.config.to_dict()
    return {
        "classes": [type(module) for module in model.modules()],
        "names": [name for name, _ in model.named_modules()],
        "keys": list(model.state_dict()),
        "buffers": {name: (buffer.dtype, buffer.tolist()) for name, buffer in model.named_buffers()},
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "config": config,
    }


# --- right ------------------------------------------------------------------------------------------------------------


@every_family
def test_none_is_the_identity(family: str) -> None:
    model, ids = tiny_model(family), tiny_tokens(300, batch=2)
    want = logits(model, ids)
    with ropex.patch(model, "none"):
        assert (logits(model, ids) - want).abs().max() < LOGIT_ERROR
    with ropex.patch(model, "none", angles="float32"):
        assert torch.equal(logits(model, ids), want)


@five_families
def test_equal_to_transformers_own(family: str) -> None:
    model, ids = tiny_model(family), tiny_tokens(LENGTH)
    unpatched = logits(model, ids)
    yarn = {"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": TRAINED_LENGTH}
    dim, base = ropex.inspect(model).geometry.dim, ropex.inspect(model).geometry.base
    own = {
        "yarn": yarn,
        "linear": {"rope_type": "linear", "factor": FACTOR},
        "ntk": {"rope_type": "default", "rope_theta": base * FACTOR ** (dim / (dim - 2))},
    }
    for method, rope_parameters in own.items():
        want = logits(stock(model, family, **rope_parameters), ids)
        with ropex.patch(model, method, factor=FACTOR):
            got = logits(model, ids)
        assert (got - want).abs().max() < LOGIT_ERROR
        assert (got - unpatched).abs().max() > EFFECT, "a test that the unpatched model would pass shows nothing"


@five_families
def test_dynamic_ntk_is_that_of_transformers_and_keeps_no_state(family: str) -> None:
    model = tiny_model(family)
    ids = tiny_tokens(LENGTH)
    short = logits(model, ids[:, :100])
    want = logits(stock(model, family, rope_type="dynamic", factor=2.0), ids)
    with ropex.patch(model, "dynamic_ntk", factor=2.0, angles="float32"):
        assert (logits(model, ids) - want).abs().max() < LOGIT_ERROR
        assert (logits(model, ids[:, :100]) - short).abs().max() < LOGIT_ERROR


@five_families
def test_bfloat16_models_rotate_in_float32(family: str) -> None:
    model, ids = tiny_model(family), tiny_tokens(200)
    with ropex.patch(model, "yarn", factor=4):
        exact = logits(model, ids)
        rope = rotary_of(model).rope
        frequencies = rope.inv_freq.clone()
        low = logits(model.to(torch.bfloat16), ids)
        assert low.dtype == torch.bfloat16
        assert (low - exact).abs().max() < 0.05
        assert torch.equal(rope.inv_freq, frequencies)
        cos, _ = rotary_of(model)(torch.zeros((), dtype=torch.bfloat16), torch.arange(9)[None])
        assert cos.dtype == torch.float32
        wide = logits(model.to(torch.float64), ids)
        assert wide.dtype == torch.float64


@every_family
def test_a_model_already_in_bfloat16_can_be_patched(family: str) -> None:
    """`.to(torch.bfloat16)` has rounded transformers' own frequencies by then; the patch brings the right ones."""
    model, ids = tiny_model(family).to(torch.bfloat16), tiny_tokens(200)
    before = logits(model, ids)
    with ropex.patch(model, "yarn", factor=4):
        assert torch.equal(rotary_of(model).rope.inv_freq, rotary_of(model).rope.geometry.inv_freq())
        assert not torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_patching_does_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    model, ids = tiny_model("llama"), tiny_tokens(200)
    with ropex.patch(model, "yarn", factor=4):
        want = logits(model, ids)
    torch.set_default_dtype(dtype)
    try:
        ropex.patch(model, "yarn", factor=4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(logits(model, ids), want)


def test_patching_does_not_depend_on_the_default_device() -> None:
    model, ids = tiny_model("llama"), tiny_tokens(200)
    seen = ropex.inspect(model)
    with ropex.patch(model, "yarn", factor=4):
        want = logits(model, ids)
    with torch.device("meta"):
        assert ropex.inspect(model) == seen
        ropex.patch(model, "yarn", factor=4)
    assert torch.equal(logits(model, ids), want)


@five_families
def test_position_ids_and_padding(family: str) -> None:
    model, ids = tiny_model(family), tiny_tokens(40)
    padded = torch.cat((torch.zeros(1, 10, dtype=torch.int64), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 10, dtype=torch.int64), torch.ones_like(ids)), dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with ropex.patch(model, "yarn", factor=4):
        alone = logits(model, ids)
        shifted = logits(model, ids, position_ids=torch.arange(40)[None] + 1_000_000)
        left_padded = logits(model, padded, attention_mask=mask, position_ids=positions)[:, 10:]
    assert (left_padded - alone).abs().max() < LOGIT_ERROR
    assert (shifted - alone).abs().max() < LOGIT_ERROR, "angles are exact at any position"


# --- in place, this instance only, and back ---------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("method", ["yarn", "dynamic_ntk"])
def test_remove_puts_everything_back(family: str, method: str) -> None:
    model, ids = tiny_model(family), tiny_tokens(TRAINED_LENGTH + 50)
    before, want = state(model), logits(model, ids)
    patch = ropex.patch(model, method, factor=4)
    assert patch.model is model
    assert state(model) != before
    assert list(model.state_dict()) == before["keys"]
    assert (logits(model, ids) - want).abs().max() > LOGIT_ERROR
    patch.remove()
    assert state(model) == before
    assert torch.equal(logits(model, ids), want)
    ropex.patch(model, method, factor=2)
    ropex.unpatch(model)
    assert state(model) == before


@five_families
def test_other_models_are_untouched_even_when_they_share_the_config(family: str) -> None:
    config = tiny_config(family)
    model, other = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    other.config = config
    for module in other.modules():
        if "config" in vars(module):
            module.config = config
    ids = tiny_tokens(100)
    before, want = state(other), logits(other, ids)
    with ropex.patch(model, "yarn", factor=4):
        assert state(other) == before
        assert torch.equal(logits(other, ids), want)
        assert model.config.max_position_embeddings == 4 * TRAINED_LENGTH
        assert config.max_position_embeddings == TRAINED_LENGTH
        assert not any(isinstance(module, Rotating) for module in other.modules())
    assert model.config.max_position_embeddings == TRAINED_LENGTH


def test_the_maximum_length_is_an_int_that_all_parts_share() -> None:
    model = tiny_model("llama")
    for target, want in (({"factor": 1.5}, 768), ({"length": 1000}, 1000)):
        with ropex.patch(model, "yarn", **target):
            configs = {id(module.config) for module in model.modules() if "config" in vars(module)}
            assert len(configs) == 1
            assert model.config.max_position_embeddings == want
            assert type(model.config.max_position_embeddings) is int
    with ropex.patch(model, "none"):
        assert model.config.max_position_embeddings == TRAINED_LENGTH


def test_what_a_user_changes_in_the_config_meanwhile_is_kept() -> None:
    model = tiny_model("llama")
    with ropex.patch(model, "yarn", factor=4):
        model.config.use_cache = False
    assert model.config.use_cache is False
    assert model.config.max_position_embeddings == TRAINED_LENGTH


@five_families
def test_copies_and_pickles_stay_patched_and_can_be_unpatched(family: str) -> None:
    model, ids = tiny_model(family), tiny_tokens(TRAINED_LENGTH + 50)
    plain = logits(model, ids)
    ropex.patch(model, "dynamic_ntk", factor=4)
    want = logits(model, ids)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for twin in twins:
        assert torch.equal(logits(twin, ids), want)
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
        ropex.unpatch(twin)
        assert torch.equal(logits(twin, ids), plain)
        assert not any(module._forward_pre_hooks for module in twin.modules())
        assert twin.config.max_position_embeddings == TRAINED_LENGTH
    assert torch.equal(logits(model, ids), want), "unpatching a copy leaves the model alone"


def test_a_context_manager_removes_the_patch_on_an_error_too() -> None:
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match="inside"), ropex.patch(model, "yarn", factor=4):
        raise RuntimeError("inside")
    assert not ropex.inspect(model).patched


def test_patch_keeps_no_model_alive() -> None:
    model = tiny_model("llama")
    reference = weakref.ref(model)
    ropex.patch(model, "yarn", factor=4)
    del model
    gc.collect()
    assert reference() is None


def test_meta_models_can_be_patched_and_materialised() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    weights = tiny_model("llama")
    ropex.patch(model, "yarn", factor=4)
    model.to_empty(device="cpu").load_state_dict(weights.state_dict())
    ids = tiny_tokens(50)
    with ropex.patch(weights, "yarn", factor=4):
        assert torch.equal(logits(model.eval(), ids), logits(weights, ids))


def test_two_models_in_one_are_patched_one_by_one() -> None:
    pair = nn.Module()
    pair.first, pair.second = tiny_model("llama"), tiny_model("llama")
    with pytest.raises(ropex.UnsupportedModelError, match=r"patch each of the models in it by itself"):
        ropex.patch(pair, "yarn", factor=4)
    want = logits(pair.second, tiny_tokens(50))
    with ropex.patch(pair.first, "yarn", factor=4):
        assert torch.equal(logits(pair.second, tiny_tokens(50)), want)
        assert not torch.equal(logits(pair.first, tiny_tokens(50)), want)


def test_an_inner_model_does_not_speak_for_the_outer_config() -> None:
    model = tiny_model("llama")
    with ropex.patch(model, "yarn", factor=4):
        assert ropex.inspect(model).written == "yarn"
    with ropex.patch(model.model, "yarn", factor=4):
        assert ropex.inspect(model.model).written == "yarn"
        assert ropex.inspect(model).written is None


def test_what_comes_back_is_in_the_mode_of_the_model() -> None:
    model = tiny_model("llama").train()
    patch = ropex.patch(model, "yarn", factor=4)
    model.eval()
    patch.remove()
    assert not any(module.training for module in model.modules())


def test_patching_leaves_the_global_random_state_alone() -> None:
    models = [tiny_model("llama") for _ in range(3)]
    before = torch.get_rng_state()
    for model, seed in zip(models, (0, 0, 1), strict=True):
        ropex.patch(model, "clex", factor=4, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_wrapped_model_can_be_patched() -> None:
    model = tiny_model("llama")
    wrapper = nn.Sequential(model)
    want = logits(model, tiny_tokens(50))
    with ropex.patch(wrapper, "yarn", factor=4):
        assert ropex.inspect(model).patched
        assert not torch.equal(logits(model, tiny_tokens(50)), want)
    assert torch.equal(logits(model, tiny_tokens(50)), want)


# --- training and generation ------------------------------------------------------------------------------------------


@five_families
def test_gradients_are_those_of_transformers(family: str) -> None:
    model, ids = tiny_model(family), tiny_tokens(200)
    other = stock(model, family, rope_type="linear", factor=4.0)
    ropex.patch(model, "linear", factor=4)
    for checkpointing in (False, True):
        if checkpointing:
            enable = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            getattr(model, f"{enable}_checkpointing_enable")()
        gradients = []
        for each in (model, other):
            each.train()
            each.zero_grad()
            each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            gradients.append({name: parameter.grad for name, parameter in each.named_parameters()})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6)


@five_families
def test_cached_generation_is_that_of_transformers(family: str) -> None:
    model, ids = tiny_model(family), tiny_tokens(TRAINED_LENGTH + 20, batch=2)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED_LENGTH}
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    want = stock(model, family, **yarn).generate(ids, **options)
    with ropex.patch(model, "yarn", factor=4):
        assert torch.equal(model.generate(ids, **options), want)
        assert torch.equal(model.generate(ids, use_cache=False, **options), want)


@five_families
def test_a_length_dependent_method_needs_a_pinned_length_for_its_cache(family: str) -> None:
    model, ids = tiny_model(family), tiny_tokens(TRAINED_LENGTH + 100)
    prompt, step = ids[:, :-1], ids[:, -1:]
    total = ids.shape[1]
    with ropex.patch(model, "dynamic_ntk", factor=4) as patch, torch.no_grad():
        cache = cache_of(model(input_ids=prompt, use_cache=True))
        with pytest.raises(ValueError, match=rf"cache with {total - 1} tokens filled under pin_length\(None\), now"):
            model(input_ids=step, **cached(model, cache))
        with patch.pin_length(total), pytest.raises(ValueError, match=r"pin_length\(None\), now pin_length\(\d+\)"):
            model(input_ids=step, **cached(model, cache))
        with patch.pin_length(total):
            assert ropex.inspect(model).pinned_length == total
            cache = cache_of(model(input_ids=prompt, use_cache=True))
            with patch.pin_length(total + 50), pytest.raises(ValueError, match=r"filled under pin_length\(612\), now"):
                model(input_ids=step, **cached(model, cache))
            stepped = model(input_ids=step, **cached(model, cache)).logits[:, -1]
            with pytest.raises(ValueError, match=rf"context of {total + 1} tokens under pin_length\({total}\)"):
                model(input_ids=step, **cached(model, cache))
        assert ropex.inspect(model).pinned_length is None
        whole = logits(model, ids)[:, -1]
    assert (stepped - whole).abs().max() < LOGIT_ERROR, "under a pin, cached decoding is the full pass"
    assert (whole - logits(model, ids)[:, -1]).abs().max() > 1e-4


def test_pinned_generation_with_every_cache_is_the_uncached_one() -> None:
    model, ids = tiny_model("llama"), tiny_tokens(TRAINED_LENGTH + 20)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    with ropex.patch(model, "dynamic_ntk", factor=4) as patch, patch.pin_length(ids.shape[1] + 8):
        want = model.generate(ids, use_cache=False, **options)
        assert torch.equal(model.generate(ids, **options), want)
        assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **options), want)


def test_a_patch_is_removed_once() -> None:
    model = tiny_model("llama")
    with ropex.patch(model, "yarn", factor=4) as first:
        first.remove()
    second = ropex.patch(model, "linear", factor=2)
    for stale in (first.remove, lambda: first.pin_length(9)):
        with pytest.raises(ValueError, match=r"Patch\(LlamaForCausalLM, YaRN.* is no longer in effect: it was removed"):
            stale()
    assert ropex.inspect(model).schedule == second.schedule == ropex.schedule("linear", factor=2)


def test_static_methods_need_no_pin() -> None:
    model, ids = tiny_model("llama"), tiny_tokens(60)
    with ropex.patch(model, "yarn", factor=4) as patch:
        want = logits(model, ids)
        patch.pin_length(2000)
        assert torch.equal(logits(model, ids), want)


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        *(pytest.param(f, "aot_eager", marks=[] if f in ("llama", "gpt_neox") else pytest.mark.slow) for f in FAMILIES),
        pytest.param("llama", "inductor", marks=pytest.mark.slow),
    ],
)
def test_two_differently_patched_models_compiled_in_one_process(family: str, backend: str) -> None:
    torch.compiler.reset()
    ids = tiny_tokens(TRAINED_LENGTH + 64)
    models = [tiny_model(family) for _ in range(4)]
    ropex.patch(models[0], "yarn", factor=4)
    ropex.patch(models[1], "linear", factor=2)
    ropex.patch(models[2], "dynamic_ntk", factor=2)  # and the fourth is not patched
    want = [logits(model, ids) for model in models]
    compiled = [torch.compile(model, fullgraph=True, backend=backend) for model in models]
    for _ in range(2):
        for model, expected in zip(compiled, want, strict=True):
            assert (logits(model, ids) - expected).abs().max() < LOGIT_ERROR
    assert min((a - b).abs().max() for i, a in enumerate(want) for b in want[:i]) > EFFECT / 4
    ropex.unpatch(models[0])
    assert (logits(compiled[0], ids) - want[3]).abs().max() < LOGIT_ERROR, "a compiled model sees that it was unpatched"


# --- inspect ----------------------------------------------------------------------------------------------------------


@every_family
def test_inspect(family: str) -> None:
    model = tiny_model(family)
    before = ropex.inspect(model)
    assert before.patched is False
    assert before.schedule is None
    assert before.length == before.geometry.trained_length == TRAINED_LENGTH
    assert before.attentions == 2
    assert before.scaling is None
    with ropex.patch(model, "yarn", factor=4):
        after = ropex.inspect(model)
    assert after.patched is True
    assert after.schedule == ropex.schedule("yarn", factor=4)
    assert after.geometry == before.geometry
    assert after.length == 4 * TRAINED_LENGTH
    assert (after.attentions, after.rotary) == (before.attentions, before.rotary)
    text = str(after)
    for part in ("YaRN(factor=4", "2048 tokens, 4 x the trained 512", after.rotary, "exact"):
        assert part in text
    assert "patched   no" in str(before)


def test_layouts_are_found_by_probing() -> None:
    found = {family: ropex.inspect(tiny_model(family)) for family in (FAMILIES | MORE_FAMILIES)}
    layouts = {family: (each.table_layout, each.channel_layout) for family, each in found.items()}
    assert layouts.pop("cohere") == ("interleaved", "interleaved")
    assert layouts.pop("glm") == ("half", "interleaved")
    assert set(layouts.values()) == {("half", "half")}
    assert found["gpt_neox"].geometry.dim == 4
    assert found["llama"].geometry.dim == 16


def rotary_of(model: nn.Module) -> Any:
    return model.get_submodule(ropex.inspect(model).rotary)

"""Bad calls of `ropex.patch`: a clear error, and the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

import ropex
from tests.oracles import TRAINED_LENGTH, logits, scaled_config, tiny_model, tiny_tokens
from tests.test_patch import state


def refuses(model: nn.Module, error: type[Exception], message: str, call: Callable[[], object]) -> None:
    """The call raises, and leaves the model bit for bit as it was."""
    ids = tiny_tokens(40)
    want = logits(model, ids)  # first: transformers' own modules may change in a pass
    before = state(model)
    with pytest.raises(error, match=message):
        call()
    assert state(model) == before
    assert torch.equal(logits(model, ids), want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "yarnn", "factor": 4}, r'method=\'yarnn\': must be one of .* did you mean "yarn"\?'),
        ({"factor": 0.5}, r"factor=0\.5: must be a finite number >= 1"),
        ({"factor": float("nan")}, r"factor=nan: must be a finite number >= 1"),
        ({"factor": "8"}, r"factor='8': must be a finite number >= 1"),
        ({}, r'method "yarn" without factor: it needs factor; pass factor= .*length='),
        ({"factor": 4, "length": 1024}, r"length=1024 and factor=4 disagree"),
        ({"length": 100}, r"length=100: must be an int >= the model's trained length of 512 tokens"),
        ({"method": "none", "factor": 4}, r'method "none" has no target length'),
        ({"factor": 4, "beta": 1}, r'option beta=1: method "yarn" accepts factor, beta_fast'),
        ({"factor": 4, "angles": "bf16"}, r'angles=\'bf16\': must be one of "exact", "float32"'),
        ({"factor": 4, "on_scaled": "no"}, r'on_scaled=\'no\': must be one of "error", "replace", "keep"'),
        ({"factor": 4, "sliding": "yes"}, r'sliding=\'yes\': must be one of "keep", "scale"'),
        ({"factor": 4, "precision": "bf16"}, r'precision=\'bf16\': must be one of "model", "float32"'),
        ({"factor": 4, "tokenizer": "llama"}, r"tokenizer='llama': must have a model_max_length"),
        ({"method": ropex.schedule("none"), "length": 1024}, r"length=1024 with the schedule Unscaled\(\)"),
        ({"method": 3}, r"method=3: must be one of"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    refuses(model, ValueError, message, lambda: ropex.patch(model, **arguments))


def test_already_patched() -> None:
    model = tiny_model("llama")
    ropex.patch(model, "yarn", factor=4)
    message = r"LlamaForCausalLM is already patched with YaRN\(factor=4.*call ropex\.unpatch\(model\) first"
    refuses(model, ValueError, message, lambda: ropex.patch(model, "linear", factor=2))


def test_not_patched() -> None:
    model = tiny_model("llama")
    refuses(model, ValueError, r"LlamaForCausalLM is not patched: .*ropex\.patch", lambda: ropex.unpatch(model))
    patch = ropex.patch(model, "yarn", factor=4)
    patch.remove()
    refuses(model, ValueError, r"is no longer in effect", patch.remove)
    refuses(model, ValueError, r"is no longer in effect", lambda: patch.pin_length(10))


def test_a_model_without_rotary_embeddings() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    message = r"GPT2LMHeadModel has no rotary embedding module: .* Llama, Mistral, Qwen or GPT-NeoX"
    refuses(model, ropex.UnsupportedModelError, message, lambda: ropex.patch(model, "yarn", factor=4))
    refuses(model, ropex.UnsupportedModelError, message, lambda: ropex.inspect(model))
    assert issubclass(ropex.UnsupportedModelError, ValueError)


def test_a_schedule_with_an_impossible_target() -> None:
    class Endless(type(ropex.schedule("none"))):  # type: ignore[misc]
        def target_length(self, trained_length: int) -> float:
            return float("inf")

    model = tiny_model("llama")
    message = r"target_length=inf: must be an int >= 1; pass a smaller factor or length, or mend Endless\.target_length"
    refuses(model, ValueError, message, lambda: ropex.patch(model, Endless()))


@pytest.mark.parametrize("call", [lambda x: ropex.patch(x, factor=4), ropex.unpatch, ropex.inspect])
@pytest.mark.parametrize("model", ["llama", None])
def test_not_a_model(call: Callable[[Any], object], model: Any) -> None:
    with pytest.raises(ValueError, match=rf"model={model!r}: must be a torch\.nn\.Module; pass the loaded model"):
        call(model)


class Shifted(type(ropex.schedule("none"))):  # type: ignore[misc]
    """An offset in positions, and frequencies per token: both are allowed."""

    def rotation(self, request: ropex.Request) -> ropex.Rotation:
        positions = request.positions + (5 if request.training else 3)
        per_token = request.inv_freq().expand(*positions.shape, -1)
        return ropex.Rotation(positions, per_token)


@pytest.mark.parametrize("training", [True, False])
def test_schedules_may_shift_positions_and_give_frequencies_per_token(training: bool) -> None:
    model, ids = tiny_model("llama").train(training), tiny_tokens(50)
    want = logits(model, ids)
    with ropex.patch(model, Shifted()):
        assert (logits(model, ids) - want).abs().max() < 1e-5, "a shift of all positions changes no score"


def scaled_model(**rope_parameters: Any) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(scaled_config("llama", **rope_parameters)).eval()


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize("rope_parameters", [YARN, LLAMA3, LONGROPE], ids=lambda p: p["rope_type"])
def test_a_config_that_already_carries_a_scaling(rope_parameters: dict[str, Any]) -> None:
    model = scaled_model(**rope_parameters)
    kind = rope_parameters["rope_type"]
    message = rf'already carries a scaling of the type "{kind}": .*on_scaled="replace".*, or remove the scaling'
    refuses(model, ValueError, message, lambda: ropex.patch(model, "yarn", factor=4))
    seen = ropex.inspect(model)
    assert (seen.scaling, seen.geometry.trained_length, seen.length) == (kind, 128, TRAINED_LENGTH)

    ids = tiny_tokens(500)
    own = logits(model, ids)
    plain = tiny_model("llama")
    plain.config.max_position_embeddings = 128
    for module in plain.modules():
        if "config" in vars(module):
            module.config.max_position_embeddings = 128
    with ropex.patch(model, "yarn", factor=4, on_scaled="replace"), ropex.patch(plain, "yarn", factor=4):
        assert model.config.max_position_embeddings == 512
        assert torch.equal(logits(model, ids), logits(plain, ids)), "the old scaling is replaced, not added to"
    assert torch.equal(logits(model, ids), own)


def test_a_dynamic_config_states_the_pretraining_length_as_the_maximum() -> None:
    model = scaled_model(rope_type="dynamic", factor=2.0)
    ids = tiny_tokens(600)
    own = logits(model, ids)
    with pytest.raises(ValueError, match=r'scaling of the type "dynamic"'):
        ropex.patch(model, "yarn", factor=4)
    with ropex.patch(model, "dynamic_ntk", factor=2, on_scaled="replace", angles="float32"):
        assert (logits(model, ids) - own).abs().max() < 1e-5
    assert torch.equal(logits(model, ids), own)


def test_a_linear_config_does_not_tell_its_pretraining_length() -> None:
    model = scaled_model(rope_type="linear", factor=2.0)
    assert ropex.inspect(model).scaling == "linear"
    refuses(
        model, ValueError, r'scaling of the type "linear": scaling tw', lambda: ropex.patch(model, "yarn", factor=4)
    )
    message = r'"linear" and does not tell the pretraining length, .*set config\.original_max_position_embeddings'
    refuses(model, ValueError, message, lambda: ropex.patch(model, "yarn", factor=4, on_scaled="replace"))
    model.config.original_max_position_embeddings = 256
    with ropex.patch(model, "yarn", factor=4, on_scaled="replace"):
        assert ropex.inspect(model).geometry.trained_length == 256
        assert model.config.max_position_embeddings == 1024


def test_a_model_that_does_not_do_what_its_config_says() -> None:
    model = tiny_model("llama")
    model.model.rotary_emb.inv_freq.mul_(0.5)
    message = r"LlamaForCausalLM's cos and sin are not those of its config: its frequencies were changed"
    refuses(model, ropex.UnsupportedModelError, message, lambda: ropex.patch(model, "yarn", factor=4))
    model = tiny_model("llama")
    config = model.model.rotary_emb.config
    if hasattr(config, "rope_parameters"):
        config.rope_parameters["rope_theta"] = 20_000.0
    else:
        config.rope_theta = 20_000.0
    refuses(model, ropex.UnsupportedModelError, message, lambda: ropex.patch(model, "yarn", factor=4))


def test_a_model_whose_attention_ignores_its_rotary_module() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn = NoRotation(layer.self_attn)
    message = r"LlamaForCausalLM has a rotary .*\(model\.rotary_emb\) but no attention .*a patch would change nothing"
    refuses(model, ropex.UnsupportedModelError, message, lambda: ropex.patch(model, "yarn", factor=4))


class NoRotation(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return self.o_proj(self.v_proj(hidden_states).repeat(1, 1, 2)), None


def test_every_rotary_module_of_a_text_model_is_replaced() -> None:
    model, ids = tiny_model("llama"), tiny_tokens(300)
    with ropex.patch(model, "yarn", factor=4):
        want = logits(model, ids)
    for layer in model.model.layers:
        layer.rotary_emb = type(model.model.rotary_emb)(model.config)
    with ropex.patch(model, "yarn", factor=4):
        assert torch.equal(logits(model, ids), want)
        assert len([m for m in model.modules() if type(m).__name__ == "PatchedRotary"]) == 3
    assert all(type(layer.rotary_emb).__name__ == "LlamaRotaryEmbedding" for layer in model.model.layers)


def test_tables_of_another_module_are_noticed() -> None:
    """Whatever puts a rotary module back behind the patch's back would change what it does without a word."""
    model = tiny_model("llama")
    ropex.patch(model, "yarn", factor=4)
    model.model.rotary_emb = model.model.rotary_emb.original
    with pytest.raises(RuntimeError, match=r"LlamaAttention was given cos \(1, 9, 16\), not the patch's \[\.\.\., 8\]"):
        logits(model, tiny_tokens(9))


def test_an_attention_whose_forward_was_replaced_on_the_instance() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.forward = lambda *args, **kwargs: type(attention).forward(attention, *args, **kwargs)
    message = r"LlamaAttention\.forward was replaced on the instance, which would hide the patch: .*patch before anoth"
    refuses(model, ropex.UnsupportedModelError, message, lambda: ropex.patch(model, "yarn", factor=4))


def test_attentions_that_never_look_at_cos_and_sin() -> None:
    """They call a rotary function in their code, but a flag keeps them from it: a patch would change nothing."""
    config = transformers.SmolLM3Config(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, no_rope_layers=[0, 0], pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    message = r"SmolLM3ForCausalLM has a rotary embedding module .* none of its attentions was seen to use its cos and"
    refuses(model, ropex.UnsupportedModelError, message, lambda: ropex.patch(model, "yarn", factor=4))


def test_a_rotary_module_of_another_kind() -> None:
    model = tiny_model("llama")
    del model.model.rotary_emb.config
    message = r"model\.rotary_emb \(LlamaRotaryEmbedding\): must hold inv_freq and a config"
    refuses(model, ropex.UnsupportedModelError, message, lambda: ropex.patch(model, "yarn", factor=4))


def test_a_rotary_function_that_does_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.models.llama.modeling_llama as modeling

    model = tiny_model("llama")
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", lambda q, k, cos, sin, unsqueeze_dim=1: (2 * q, 2 * k))
    message = r"apply_rotary_pos_emb pairs channels neither as halves nor interleaved: not supported"
    refuses(model, ropex.UnsupportedModelError, message, lambda: ropex.patch(model, "yarn", factor=4))
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", lambda q, k: (q, k))
    with pytest.raises(ropex.UnsupportedModelError, match=r"cannot be called with \(q, k, cos, sin\)"):
        ropex.patch(model, "yarn", factor=4)


def test_rotary_parameters_that_do_not_fit_the_module() -> None:
    model = tiny_model("llama")
    if not hasattr(model.config, "rope_parameters"):
        pytest.skip("transformers 4 has no rope_parameters")
    model.config.rope_parameters = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(
        ropex.UnsupportedModelError, match=r"LlamaRotaryEmbedding cannot be made from its config: 'rope_t"
    ):
        ropex.patch(model, "yarn", factor=4)
    model.config.rope_parameters = {"rope_type": "default"}
    with pytest.raises(ropex.UnsupportedModelError, match=r"cannot be made from its config: 'rope_theta'"):
        ropex.patch(model, "yarn", factor=4)

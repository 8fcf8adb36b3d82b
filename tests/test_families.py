"""Every family: patched right, or refused with the reason; the grid that docs/families.md shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import ropex
from tests import families as roster
from tests.families import ROPE, logits_of, model_of, results_of, tokens

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "families.json"
PUBLISHED = json.loads(RESULTS.read_text(encoding="utf-8"))
NAMED = [
    *("llama", "mistral", "mixtral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gpt_neox", "gemma"),
    *("gemma2", "gemma3_text", "gemma4_text", "phi", "phi3", "olmo", "olmo2", "olmo3", "granite", "cohere", "cohere2"),
    *("glm4", "deepseek_v2", "deepseek_v3", "stablelm", "falcon", "starcoder2", "nemotron", "smollm3", "exaone4"),
    *("ernie4_5", "minimax_m2", "gpt_oss", "llama4_text", "lfm2", "modernbert", "eurobert", "hunyuan_v1_dense"),
    *("nanochat", "qwen3_5_text"),
]
SAME_VERSION = PUBLISHED["environment"]["transformers"] == transformers.__version__

five = pytest.mark.skipif(not roster.FIVE, reason="transformers 4 spells it otherwise")


def require(family: str) -> None:
    known = family.removesuffix("_text") in CONFIG_MAPPING_NAMES or family in CONFIG_MAPPING_NAMES
    if not known or (not roster.FIVE and family == "modernbert"):  # whose attentions rotated in a function of theirs
        pytest.skip(f"transformers {transformers.__version__} has no {family}")


def check(family: str, result: dict[str, Any]) -> None:
    """What must hold wherever a patch works."""
    assert result["none"] < 1e-5, "none is the identity"
    exact = "complex" not in result["layout"]  # whose own product rounds in another order
    assert result["none_float32"] < (1e-12 if exact else 1e-6), "in transformers' arithmetic, bit for bit"
    assert result["effect"] > 1e-5, "a factor changes the logits"
    assert result.get("none_on_axes", 0.0) < 1e-5, "none is the identity wherever an image stands"
    assert result["removed"]
    assert result["isolated"]
    if result.get("yarn") is not None and not result["softmax"]:
        assert result["yarn"] < 1e-5, "yarn is transformers' own where it has one"


@pytest.mark.parametrize("family", NAMED)
def test_named_families(family: str) -> None:
    require(family)
    result = results_of(family)
    assert result["status"] == "works", result
    check(family, result)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in roster.families() if family not in NAMED])
def test_every_other_family(family: str) -> None:
    result = results_of(family)
    if result["status"] == "works":
        check(family, result)
    else:
        assert result["reason"]
    if SAME_VERSION:
        assert result["status"] == PUBLISHED["families"][family]["status"]


def test_the_published_grid() -> None:
    works = {family: result for family, result in PUBLISHED["families"].items() if result["status"] == "works"}
    assert len(works) >= 100
    for family, result in works.items():
        check(family, result)
    if SAME_VERSION:
        assert set(PUBLISHED["families"]) == set(roster.families())


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", r"GPT2LMHeadModel has no rotary embedding module: it adds learned position embeddings"),
        ("bloom", r"BloomForCausalLM has no rotary embedding module: it biases attention by distance \(ALiBi\)"),
        ("mamba", r"MambaForCausalLM has no rotary embedding module: it is a state-space model"),
        ("rwkv", r"RwkvForCausalLM has no rotary embedding module: it is a recurrent model"),
        ("gptj", r"GPTJForCausalLM has no rotary embedding module: its attentions look sines up in tables"),
        ("deepseek_v4", r"DeepseekV4ForCausalLM \(deepseek_v4\) cannot be patched: it also rotates blocks"),
    ],
)
def test_refused_by_name_with_the_reason(family: str, reason: str) -> None:
    require(family)
    with torch.device("meta"):
        model = model_of(family)
    with pytest.raises(ropex.UnsupportedModelError, match=reason):
        ropex.patch(model, "yarn", factor=4)


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss", "olmo3", "ministral", "modernbert"])
def test_sliding_layers_keep_their_angles(family: str) -> None:
    """Also where one rotary module serves both kinds. The first layer slides, the second does not."""
    require(family)
    model, ids = model_of(family), tokens()
    seen: list[torch.Tensor] = []
    layers = next(module for name, module in model.named_modules() if name.endswith("layers"))
    layers[0].register_forward_hook(lambda *call: seen.append(call[2][0] if isinstance(call[2], tuple) else call[2]))
    want = logits_of(model, ids)
    with ropex.patch(model, "yarn", factor=4, angles="float32"):
        kept = logits_of(model, ids)
        kinds = {kind.window: kind.schedule for kind in ropex.inspect(model).kinds}
    with ropex.patch(model, "yarn", factor=4, sliding="scale", angles="float32"):
        logits_of(model, ids)
    assert torch.equal(seen[1], seen[0]), "a sliding layer does what it did"
    assert not torch.equal(seen[2], seen[0])
    assert (kept - want).abs().max() > 1e-5, "and the other one is scaled"
    window = next(each for each in kinds if each is not None)
    assert kinds[window] == ropex.schedule("none")
    assert kinds[None] == ropex.schedule("yarn", factor=4)


def test_a_model_whose_layers_all_slide() -> None:
    """A default MistralConfig is one."""
    require("mistral")
    with torch.device("meta"):
        model = transformers.MistralForCausalLM(transformers.MistralConfig(num_hidden_layers=2))
    message = r'every layer of MistralForCausalLM that rotates slides over a window \(4096 tokens\).*sliding="scale"'
    with pytest.raises(ValueError, match=message):
        ropex.patch(model, "yarn", factor=2)
    with ropex.patch(model, "yarn", factor=2, sliding="scale") as patch:
        assert model.config.max_position_embeddings == 2 * 4096 * 32
        assert patch.schedule.factor == 2


def test_a_window_longer_than_what_was_trained_is_scaled() -> None:
    """Such a layer sees distances that it was not trained at."""
    model, ids = model_of("mistral", sliding_window=4096), tokens()
    want = logits_of(model, ids)
    with ropex.patch(model, "yarn", factor=16):
        assert (logits_of(model, ids) - want).abs().max() > 1e-5


def test_layers_that_do_not_rotate_are_left_alone() -> None:
    require("smollm3")
    model = model_of("smollm3", no_rope_layers=[1, 0])
    assert ropex.inspect(model).attentions == 1
    classes = [type(layer.self_attn) for layer in model.model.layers]
    with ropex.patch(model, "yarn", factor=4):
        swapped = [type(layer.self_attn) is not cls for layer, cls in zip(model.model.layers, classes, strict=True)]
    assert swapped == [True, False]


# --- norms after the rotation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["hunyuan_v1_dense", "nanochat", "llama4_text"])
def test_the_amplitude_goes_into_the_softmax_scale(family: str) -> None:
    """Where q and k are normalised after the rotation: in cos and sin it would be cancelled."""
    require(family)
    model, ids = model_of(family), tokens()
    attention = next(module for module in model.modules() if isinstance(getattr(module, "scaling", None), float))
    scaling = attention.scaling
    with ropex.patch(model, "ntk_by_parts", factor=8):
        plain = logits_of(model, ids)
        assert attention.scaling == scaling
    patch = ropex.patch(model, "yarn", factor=8)
    amplitude = patch.schedule.at(ropex.inspect(model).geometry, length=1).amplitude
    assert attention.scaling == pytest.approx(scaling * amplitude**2)
    warmed = logits_of(model, ids)
    assert (warmed - plain).abs().max() > 1e-5
    assert ropex.inspect(model).written is None, "plain transformers would cancel it"
    patch.remove()
    assert attention.scaling == scaling
    with pytest.raises(ropex.UnsupportedModelError, match=r"the norm cancels an amplitude.*use a static method"):
        ropex.patch(model, "dynamic_yarn")


# --- several geometries, several axes ---------------------------------------------------------------------------------


@five
def test_layer_types_have_geometries_of_their_own() -> None:
    seen = ropex.inspect(model_of("gemma3_text"))
    bases = {kind.name: kind.geometry.base for kind in seen.kinds}
    assert bases == {"sliding_attention": 10_000.0, "full_attention": 1_000_000.0}
    text = str(seen)
    assert "1 x sliding_attention a window of 128 tokens, base 10000" in text
    assert "1 x full_attention    all tokens, base 1e+06" in text


def test_positions_with_several_axes() -> None:
    """Images and video have three positions per token; each pair follows one of them."""
    require("qwen3_5_text")
    sections = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}
    sections["rope_parameters"] |= {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
    model, ids = model_of("qwen3_5_text", **sections), tokens(30)
    axes = torch.randint(40, (3, 1, 30), generator=torch.Generator().manual_seed(1))
    rotary = model.model.rotary_emb
    x = torch.zeros(())
    want = rotary(x, axes)
    with ropex.patch(model, "none"):
        cos, sin = model.model.rotary_emb(x, axes)
        assert model.model.rotary_emb.axes == (0, 1, 2, 0, 1, 2, 0, 1)
    torch.testing.assert_close(torch.cat((cos, cos), dim=-1), want[0])
    torch.testing.assert_close(torch.cat((sin, sin), dim=-1), want[1])
    with ropex.patch(model, "dynamic_ntk", factor=2):
        assert torch.isfinite(logits_of(model, ids)).all()


def test_pairs_that_do_not_turn_in_the_model_itself_stay_so() -> None:
    require("gemma4_text")
    parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    }
    model = model_of("gemma4_text", rope_parameters=parameters)
    rotary = model.model.rotary_emb
    still = rotary.full_attention_inv_freq == 0
    assert 0 < still.sum() < len(still)
    with ropex.patch(model, "yarn", factor=4):
        _, sin = model.model.rotary_emb(torch.zeros(()), torch.tensor([[1000]]), "full_attention")
    assert torch.equal(sin[0, 0] == 0, still)


# --- already scaled ---------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10_000.0}
SCALED = {
    "yarn": YARN,
    "yarn with options": YARN | {"beta_fast": 16.0, "attention_factor": 1.1, "truncate": False},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128, "rope_theta": 10_000.0,
    },
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "short_factor": [1.0 + i / 9 for i in range(8)],
        "long_factor": [1.0 + i for i in range(8)], "original_max_position_embeddings": 128, "rope_theta": 10_000.0,
    },
}  # fmt: skip


def scaled_model(kind: str) -> torch.nn.Module:
    config = roster.config_of("llama")
    if hasattr(config, "rope_parameters"):
        config.rope_parameters = dict(SCALED[kind])
    else:
        config.rope_scaling = {key: value for key, value in SCALED[kind].items() if key != "rope_theta"}
    if kind in ("linear", "longrope"):
        config.original_max_position_embeddings = 128
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", SCALED)
def test_a_scaling_that_is_kept_is_the_models_own(kind: str) -> None:
    model = scaled_model(kind)
    for length in (100, 500, 900) if kind == "dynamic" else (100, 500):
        ids = tokens(length)
        want = logits_of(model, ids)
        with ropex.patch(model, on_scaled="keep") as patch:
            assert (logits_of(model, ids) - want).abs().max() < 1e-5
            assert model.config.max_position_embeddings == 512
            assert ropex.inspect(model).geometry.trained_length == (512 if kind == "dynamic" else 128)
            assert patch.schedule.method in kind.replace("dynamic", "dynamic_ntk").replace("yarn with options", "yarn")
        assert torch.equal(logits_of(model, ids), want)


@five
@pytest.mark.parametrize("family", ["llama4_text", "nanochat", "hunyuan_v1_dense"])
@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_a_scaling_whose_amplitude_the_norm_cancels_is_kept_as_it_is(family: str, kind: str) -> None:
    """Queries and keys are normalised after the rotation; and Llama 4's layers that rotate are all chunked."""
    options = {"attention_chunk_size": 64} if family == "llama4_text" else {}
    model = model_of(family, rope_parameters=dict(SCALED[kind]), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    want = logits_of(model, tokens())
    with ropex.patch(model, on_scaled="keep"):
        assert (logits_of(model, tokens()) - want).abs().max() < 1e-5 * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("kind", ["yarn", "yarn with options", "llama3", "linear"])
def test_a_scaling_that_is_kept_can_be_widened(kind: str) -> None:
    model = scaled_model(kind)
    with ropex.patch(model, on_scaled="keep", factor=8) as patch:
        assert patch.schedule.factor == 8
        assert model.config.max_position_embeddings == 1024
        widened = patch.schedule
    with ropex.patch(model, widened.method, on_scaled="keep", length=1024) as patch:
        assert patch.schedule == widened
    with pytest.raises(ValueError, match=r"method='ntk' with on_scaled=\"keep\": .* keeps its own scaling"):
        ropex.patch(model, "ntk", factor=4, on_scaled="keep")


def test_lists_of_one_length_cannot_be_widened() -> None:
    with pytest.raises(ValueError, match=r"lists of LlamaForCausalLM's longrope were searched for one length"):
        ropex.patch(scaled_model("longrope"), on_scaled="keep", factor=8)


def test_keep_on_a_model_without_a_scaling_is_an_ordinary_patch() -> None:
    model = model_of("llama")
    with ropex.patch(model, "yarn", factor=4, on_scaled="keep") as patch:
        assert patch.schedule == ropex.schedule("yarn", factor=4)


@five
def test_a_softmax_scale_that_was_made_for_a_scaling() -> None:
    scaling = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
    model = model_of("deepseek_v3", rope_parameters=scaling, rope_scaling=None)
    plain = model_of("deepseek_v3", rope_parameters=ROPE | {"rope_type": "linear", "factor": 2.0}, rope_scaling=None)
    with ropex.patch(model, "linear", factor=2, on_scaled="replace"):
        assert (logits_of(model, tokens(300)) - logits_of(plain, tokens(300))).abs().max() < 1e-5
    want = logits_of(model, tokens(300))
    with ropex.patch(model, on_scaled="keep"):
        assert (logits_of(model, tokens(300)) - want).abs().max() < 1e-5


# --- the config and what goes with it ---------------------------------------------------------------------------------


class Tokenizer:
    model_max_length = 512


def test_lengths_everywhere_and_back() -> None:
    model, tokenizer = model_of("llama"), Tokenizer()
    model.generation_config.max_length = 512
    before = model.config.to_dict()
    with ropex.patch(model, "yarn", factor=4, tokenizer=tokenizer):
        assert tokenizer.model_max_length == model.generation_config.max_length == 2048
        assert model.config.max_position_embeddings == 2048
        assert model.config.ropex["trained_length"] == 512
        said = getattr(model.config, "rope_parameters", None) or model.config.rope_scaling
        assert (said["rope_type"], said["factor"]) == ("yarn", 4.0)
        if hasattr(model.config, "rope_parameters"):
            assert said["rope_theta"] == 10_000.0
    assert tokenizer.model_max_length == model.generation_config.max_length == 512
    assert model.config.to_dict() == before
    tokenizer.model_max_length = 10**30
    with ropex.patch(model, "yarn", factor=4, tokenizer=tokenizer):
        assert tokenizer.model_max_length == 10**30, "no limit stays none"


def test_the_trained_length_is_that_of_pretraining_however_often(tmp_path: Path) -> None:
    model = model_of("llama")
    for method, scaled in (("clex", "error"), ("yarn", "replace")):
        ropex.patch(model, method, factor=4)
        model.save_pretrained(tmp_path / method)
        ropex.unpatch(model)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / method)
        assert again.config.max_position_embeddings == (512 if method == "clex" else 2048), "no config can say clex"
        with ropex.patch(again, "yarn", factor=2, on_scaled=scaled):
            assert ropex.inspect(again).geometry.trained_length == 512
            assert again.config.max_position_embeddings == 1024

"""Detection looks at what a model does: who is given cos and sin, by what it is masked, and on which axes it stands."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from typer.testing import CliRunner

import ropex
from ropex.cli import app
from ropex.patching import explain
from ropex.patching.detect import examine
from tests.families import EXPERTS, FIVE, ROPE, config_of, logits_of, model_of, positions_of, tokens

five = pytest.mark.skipif(not FIVE, reason="families of transformers 5")


def require(family: str) -> None:
    if family not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")


# --- who is given cos and sin -----------------------------------------------------------------------------------------


@five
@pytest.mark.parametrize(
    ("family", "rotating", "options"),
    [
        ("lara_mini", ["sliding_attention"], {"layer_types": ["sliding_attention", "full_attention"]}),
        ("beam", ["sliding_attention"], {}),  # whose full layers have null for rotary parameters
        ("cohere2", ["sliding_attention"], {}),
        ("exaone4", ["sliding_attention"], {}),
        ("llama4_text", ["chunked_attention"], {"layer_types": ["chunked_attention", "full_attention"]}),
    ],
)
def test_layers_that_their_caller_gives_no_tables(family: str, rotating: list[str], options: dict[str, Any]) -> None:
    """Global layers without positions: the config's layer types do not tell, the pass does."""
    require(family)
    options = options | ({"no_rope_layers": [1, 0], "attention_chunk_size": 128} if family == "llama4_text" else {})
    model, ids = model_of(family, **options), tokens()
    seen = ropex.inspect(model)
    assert [kind.name for kind in seen.kinds] == rotating
    want = logits_of(model, ids)
    with pytest.raises(ValueError, match=r"every layer of \w+ that rotates slides over a window"):
        ropex.patch(model, "yarn", factor=4)
    with ropex.patch(model, "none", sliding="scale"):
        assert ropex.inspect(model).attentions == 1
        assert (logits_of(model, ids) - want).abs().max() < 1e-5


class Skipping(transformers.LlamaModel):
    """A runner that no weightless copy can be run through."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        int(input_ids.sum())  # asks for a value
        return super().forward(input_ids, **kwargs)


def test_the_first_real_pass_tells_where_a_dry_one_cannot_be_run() -> None:
    config = config_of("llama")
    model = Skipping(config).eval()
    assert any("could not be run" in step for step in explain(model))
    with ropex.patch(model, "yarn", factor=4), torch.no_grad():
        model(tokens(20))  # both layers are given tables
        hooks = [module for module in model.modules() if module._forward_pre_hooks]
        assert hooks == [], "the watch has ended"
    ropex.patch(model, "yarn", factor=4)
    model.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(
        ropex.UnsupportedModelError, match=r"1 attentions .* no cos and sin in their first.*layers\.1\.se"
    ):
        model(tokens(20))
    ropex.unpatch(model)


@five
def test_a_family_whose_experts_need_values_is_watched() -> None:
    require("jetmoe")
    model, ids = model_of("jetmoe"), tokens()
    assert examine(model).unseen is not None
    want = logits_of(model, ids)
    with ropex.patch(model, "yarn", factor=4):
        assert (logits_of(model, ids) - want).abs().max() > 1e-5
    assert torch.equal(logits_of(model, ids), want)


def test_looking_changes_nothing() -> None:
    for family in ("llama", "gemma3_text", "gpt_oss"):
        require(family)
        model = model_of(family)
        before = (model.config.to_dict(), model.config._attn_implementation, set(map(id, model.modules())))
        ropex.inspect(model)
        assert (model.config.to_dict(), model.config._attn_implementation, set(map(id, model.modules()))) == before


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt_neox", "phi"])
def test_a_stray_window_that_the_family_ignores(family: str) -> None:
    """Merged and converted checkpoints carry keys of the family that they were made from."""
    config = config_of(family)
    config.sliding_window = 16
    model = AutoModelForCausalLM.from_config(config).eval()
    assert [kind.window for kind in ropex.inspect(model).kinds] == [None]
    with ropex.patch(model, "yarn", factor=4) as patch:
        assert patch.schedule == ropex.schedule("yarn", factor=4)
    config.layer_types = ["sliding_attention", "sliding_attention"]
    model = AutoModelForCausalLM.from_config(config).eval()
    assert [kind.window for kind in ropex.inspect(model).kinds] == [None]


def test_a_window_that_is_used_is_seen() -> None:
    for options, windows in (({"sliding_window": 16}, [16]), ({"sliding_window": None}, [None])):
        assert [kind.window for kind in ropex.inspect(model_of("mistral", **options)).kinds] == windows


# --- positions with several axes --------------------------------------------------------------------------------------


@five
@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("glm4v", (0, 0, 1, 1, 1, 2, 2, 2)),  # neighbouring channels
        ("ernie4_5_vl_moe", (1, 2, 1, 2, 1, 2, 0, 0)),  # height and width take turns
        ("qwen2_vl", (0, 0, 1, 1, 1, 2, 2, 2)),  # halves
        ("qwen3_vl", (0, 1, 2, 0, 1, 2, 0, 1)),  # interleaved axes
    ],
)
def test_words_and_images(family: str, axes: tuple[int, ...]) -> None:
    require(family)
    model, ids = model_of(family), tokens(60)
    positions = positions_of(axes, 60)

    @torch.no_grad()
    def placed(**kwargs: Any) -> torch.Tensor:
        return model(input_ids=ids, **kwargs).logits

    want = placed(), placed(position_ids=positions)
    with ropex.patch(model, "none") as patch:
        assert patch.rotary.axes == axes
        got = placed(), placed(position_ids=positions)
    assert max((a - b).abs().max().item() for a, b in zip(got, want, strict=True)) < 1e-5
    assert (want[0] - want[1]).abs().max() > 1e-4
    with ropex.patch(model, "linear", factor=4) as patch:
        cos, sin = patch.rotary(torch.zeros(()), positions)
    inv_freq = patch.schedule.at(patch.rotary.rope.geometry, length=8).inv_freq
    angle = positions[list(axes), 0].T * inv_freq
    torch.testing.assert_close(cos[0].double(), angle.cos(), rtol=0, atol=2e-7)
    torch.testing.assert_close(sin[0].double(), angle.sin(), rtol=0, atol=2e-7)


@five
def test_all_axes_make_one_context() -> None:
    """An image's axes run ahead of or behind the words; what follows the length must not follow each by itself."""
    model = model_of("qwen2_vl")
    positions = torch.stack([torch.arange(40), torch.arange(40) % 7, torch.arange(40) * 30])[:, None]
    with ropex.patch(model, "dynamic_ntk", factor=2) as patch:
        cos, _ = patch.rotary(torch.zeros(()), positions)
        rotation = patch.schedule.rotation(
            ropex.Request(patch.rotary.rope.geometry, positions[0], torch.tensor([39 * 30 + 1]))
        )
        angle = positions[list(patch.rotary.axes), 0].T * rotation.inv_freq[0]
    assert 39 * 30 + 1 > 2 * 512, "beyond the trained length on one axis alone"
    torch.testing.assert_close(cos[0].double(), angle.cos(), rtol=0, atol=2e-7)


@five
def test_four_axes_are_told_apart_or_refused() -> None:
    """HunyuanOCR gives the two channels of a pair different axes, which is no rotation."""
    require("hunyuan_vl")
    model = model_of("hunyuan_vl")
    with pytest.raises(
        ropex.UnsupportedModelError, match=r"4 axes, and the two channels of its pairs do not follow one"
    ):
        ropex.patch(model, "yarn", factor=4)
    assert not hasattr(model.model.language_model.rotary_emb, "ropes")


@five
def test_what_model_code_reads_of_its_rotary_module_is_there() -> None:
    require("qwen3_vl")
    model = model_of("qwen3_vl")
    rotary = model.model.language_model.rotary_emb
    with ropex.patch(model, "yarn", factor=4) as patch:
        assert patch.rotary is model.model.language_model.rotary_emb
        for name in ("mrope_section", "rope_type", "attention_scaling", "config", "max_seq_len_cached"):
            assert getattr(patch.rotary, name) == getattr(rotary, name)
        with pytest.raises(AttributeError, match=r"nothing_of_that_name"):
            _ = patch.rotary.nothing_of_that_name


# --- refusals ---------------------------------------------------------------------------------------------------------


@five
def test_learned_frequencies_are_refused_as_what_they_are() -> None:
    require("mistral_large4")
    with pytest.raises(
        ropex.UnsupportedModelError, match=r"has parameters of its own \(alpha\): its frequencies are lea"
    ):
        ropex.patch(model_of("mistral_large4"), "yarn", factor=4)


def break_rotary(model: nn.Module) -> None:
    model.model.rotary_emb.config = types.SimpleNamespace(max_position_embeddings="many")


def break_attention(model: nn.Module) -> None:
    model.model.layers[0].self_attn.layer_idx = "first"
    model.config.layer_types = {"first": 3}


@pytest.mark.parametrize("change", [break_rotary, break_attention])
def test_a_foreign_exception_is_an_error_of_ours_with_its_cause(change: Callable[[nn.Module], None]) -> None:
    model = model_of("llama")
    change(model)
    with pytest.raises(ropex.UnsupportedModelError) as caught:
        ropex.patch(model, "yarn", factor=4)
    assert caught.value.__cause__ is not None
    assert not any(hasattr(module, "ropex_made_from") for module in model.modules())


def test_why(tmp_path: Any) -> None:
    """Each step says what it saw; the last one why not."""
    config_of("llama").save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["inspect", "--why", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for part in (
        "1. rotary module model.rotary_emb (LlamaRotaryEmbedding)",
        "dry pass: 2 of 2 attentions are given cos",
    ):
        assert part in done.output
    assert "read as Unscaled(), checked against its cos and sin at 64, 512, 1024 tokens" in " ".join(
        done.output.split()
    )
    refused = explain(model_of("gpt2"))
    assert refused[-1].startswith("refused: GPT2LMHeadModel has no rotary embedding module")


# --- what a config says, and the module does not do -------------------------------------------------------------------


@five
@pytest.mark.parametrize(
    "parameters",
    [
        ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ROPE | {"rope_type": "linear", "factor": 4.0},
        ROPE | {"rope_type": "dynamic", "factor": 2.0},
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_words_that_the_module_does_not_follow_are_not_read(parameters: dict[str, Any]) -> None:
    """As of custom code that has a rule of its own under a known name: transformers' word, another's frequencies."""

    class OtherRotaryEmbedding(transformers.models.llama.modeling_llama.LlamaRotaryEmbedding):  # type: ignore[name-defined]
        def __init__(self, config: Any, device: Any = None) -> None:
            super().__init__(config)
            if config.rope_parameters["rope_type"] != "default":
                self.inv_freq = self.inv_freq * 0.9
                self.original_inv_freq = self.inv_freq.clone()
                self.rope_type = "default"

    config = config_of("llama", rope_parameters=parameters)
    config.original_max_position_embeddings = 128
    model = AutoModelForCausalLM.from_config(config).eval()
    model.model.rotary_emb = OtherRotaryEmbedding(config)
    seen = ropex.inspect(model)
    assert (seen.scaling, seen.own) == (parameters["rope_type"], None)
    with pytest.raises(
        ropex.UnsupportedModelError, match=r"cannot keep: no reading of its rotary parameters .*factor="
    ):
        ropex.patch(model, on_scaled="keep")
    assert "which ropex does not read" in str(seen)


@five
def test_phimoe_is_read_as_it_is() -> None:
    """Two amplitudes, by length; and its module in transformers never takes the long factors."""
    scaling = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128, "factor": 4.0,
        "short_factor": [1.0 + i / 9 for i in range(8)], "long_factor": [1.0 + i for i in range(8)],
        "short_mscale": 1.05, "long_mscale": 1.243163121016122,
    }  # fmt: skip
    model = model_of("phimoe", **EXPERTS, rope_parameters=scaling, original_max_position_embeddings=128)
    assert ropex.inspect(model).own.amplitude == (1.05, 1.243163121016122)
    for length in (100, 300):
        want = logits_of(model, tokens(length))
        with ropex.patch(model, on_scaled="keep"):
            assert (logits_of(model, tokens(length)) - want).abs().max() < 1e-5
    with ropex.patch(model, "yarn", factor=8, on_scaled="replace"):
        assert ropex.inspect(model).written == "longrope", "with the words that this module reads"
        assert model.config.rope_parameters["long_mscale"] == pytest.approx(1.2079441541679836)


@five
def test_a_trained_length_that_no_config_tells() -> None:
    parameters = {
        "full_attention": ROPE | {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": ROPE,
    }
    model = model_of("gemma3_text", rope_parameters=parameters)
    seen = ropex.inspect(model)
    assert (seen.own, seen.length_known) == (ropex.schedule("linear", factor=8.0), False)
    assert "512 tokens, trained at fewer" in str(seen)
    for options in ({"on_scaled": "replace"}, {"on_scaled": "keep", "factor": 16}):
        with pytest.raises(ValueError, match=r"does not tell the pretraining length.*pass trained_length= in tokens"):
            ropex.patch(model, "linear", **{"factor": 4, **options})
    with ropex.patch(model, "yarn", factor=4, on_scaled="replace", trained_length=256) as patch:
        assert patch.rotary.target == model.config.max_position_embeddings == 1024
    with ropex.patch(model, on_scaled="keep", factor=16, trained_length=64) as patch:
        assert (patch.schedule, patch.rotary.target) == (ropex.schedule("linear", factor=16), 1024)
        assert model.config.rope_parameters["full_attention"]["factor"] == 16
        assert model.config.rope_parameters["sliding_attention"] == parameters["sliding_attention"]
    with pytest.raises(ValueError, match=r"trained_length=0: must be an int >= 1"):
        ropex.patch(model, "yarn", factor=4, trained_length=0)
    stated = model_of("llama", rope_parameters=ROPE | {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"trained_length=100: .* config says that it was trained at 128 tokens"):
        ropex.patch(stated, "yarn", factor=4, on_scaled="replace", trained_length=100)


@five
def test_dual_chunk_attention_is_named() -> None:
    """Qwen 2.5 1M: trained at 262,144 tokens, whatever the maximum says."""
    model = model_of("qwen2", dual_chunk_attention_config={"chunk_size": 64, "original_max_position_embeddings": 128})
    seen = ropex.inspect(model)
    assert (seen.geometry.trained_length, seen.length) == (128, 128)
    assert "dual chunk attention is not run by transformers" in str(seen)
    with ropex.patch(model, "yarn", factor=4):
        assert model.config.max_position_embeddings == 512


# --- what others put around layers ------------------------------------------------------------------------------------


def test_compiled_layers_are_looked_through() -> None:
    model = model_of("smollm3", no_rope_layers=[1, 0]) if "smollm3" in CONFIG_MAPPING_NAMES else model_of("llama")
    rotating = ropex.inspect(model).attentions
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend="eager")
    assert examine(model).unseen is None
    assert ropex.inspect(model).attentions == rotating


def test_sharded_layers_with_mixed_precision(tmp_path: Any) -> None:
    """FSDP casts what layers are given; the patch is seen all the same."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = model_of("llama")
        mesh, policy = init_device_mesh("cpu", (1,)), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for shard in (*model.model.layers, model):
            fully_shard(shard, mesh=mesh, mp_policy=policy)
        assert examine(model).unseen is None
        ropex.patch(model, "yarn", factor=4)
        model(input_ids=tokens(20))
    finally:
        distributed.destroy_process_group()


def test_heavy_attributes_are_not_copied() -> None:
    class Packed:
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("gigabytes of packed weights")

    model = model_of("llama")
    model.model.layers[0].mlp.packed = Packed()
    assert examine(model).unseen is None


def test_the_watch_ends_with_a_compiled_model() -> None:
    model = Skipping(config_of("llama")).eval()
    ropex.patch(model, "yarn", factor=4)
    watch = next(iter(model._forward_hooks.values())).__self__
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            compiled(tokens(20))
    assert len(watch.handed) <= 2

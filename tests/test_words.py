"""Words of a config that work outside cos and sin: softmax scales, and temperatures by position.

The oracle is transformers: a model made from the equivalent config, with the same weights.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import ropex
from tests.conftest import thinned
from tests.families import EXPERTS, FIVE, MLA, ROPE, config_of, tokens

pytestmark = pytest.mark.skipif(not FIVE, reason="families of transformers 5")

TRAINED = 128
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
PAIR = {"mscale": 1.0, "mscale_all_dim": 1.0}
# The kin of DeepSeek, those with a temperature by position, and one that has neither.
FAMILIES = [
    *("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
    *("hy_v4", "longcat_flash", "minicpm3", "ministral3", "mistral4", "llama"),
]
TEMPERED = ("ministral3", "mistral4")
# The config of the model, how it is patched, and the config of transformers' own model that does the same.
WISHES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]] = {
    "kept": (YARN | PAIR, {"on_scaled": "keep"}, YARN | PAIR, 4),
    "kept, half a pair": (YARN | {"mscale_all_dim": 0.7}, {"on_scaled": "keep"}, YARN | {"mscale_all_dim": 0.7}, 4),
    "widened": (YARN | PAIR, {"on_scaled": "keep", "factor": 8}, YARN | PAIR | {"factor": 8.0}, 8),
    "widened, half a pair": (
        YARN | {"mscale_all_dim": 0.7}, {"on_scaled": "keep", "factor": 8},
        YARN | {"mscale_all_dim": 0.7, "factor": 8.0}, 8,
    ),
    "replaced by linear": (
        YARN | PAIR, {"method": "linear", "factor": 8, "on_scaled": "replace"},
        ROPE | {"rope_type": "linear", "factor": 8.0}, 8,
    ),
    "replaced by yarn": (
        YARN | PAIR, {"method": "yarn", "factor": 8, "on_scaled": "replace"}, YARN | {"factor": 8.0}, 8,
    ),
    "yarn with a pair": (
        ROPE, {"method": "yarn", "factor": 4, "mscale": 1.0, "mscale_all_dim": 0.8},
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.8}, 4,
    ),
}  # fmt: skip


def own_model(family: str, parameters: dict[str, Any], factor: int, weights: Any = None) -> nn.Module:
    """transformers' model of a config, in which softmax scales and temperatures show."""
    parameters = copy.deepcopy(parameters)
    if family in TEMPERED:
        parameters |= {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": TRAINED}
    options = {
        "mistral4": {**MLA, **EXPERTS, "head_dim": 32},
        "hy_v4": {**MLA, "index_head_dim": 32, "index_n_heads": 4},
    }
    torch.manual_seed(0)
    config = config_of(
        family, rope_parameters=parameters, max_position_embeddings=factor * TRAINED, **options.get(family, {})
    )
    causal = type(config) in AutoModelForCausalLM._model_mapping
    model = (AutoModelForCausalLM if causal else AutoModel).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.6 / parameter.shape[-1] ** 0.5)
    if weights is not None:
        model.load_state_dict(weights)
    return model


@torch.no_grad()
def answers(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tokens(400))[0]


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).abs().max() < 1e-5 * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("family", thinned(FAMILIES, "deepseek_v2", "deepseek_v3", "glm4_moe_lite", *TEMPERED, "llama"))
def test_the_patched_model_is_transformers_own(family: str, wish: str, tmp_path: Path) -> None:
    if family not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    parameters, asked, equivalent, factor = WISHES[wish]
    if family == "mistral4" and parameters is ROPE:
        pytest.skip("transformers' own module makes tables of another width for this config")
    model = own_model(family, parameters, 4 if parameters is not ROPE else 1)
    before = answers(model)
    patch = ropex.patch(model, **asked)
    got = answers(model)
    assert close(got, answers(own_model(family, equivalent, factor, model.state_dict())))
    # What is written gives it back: by save_pretrained alone, by an export, and by Patch.save.
    model.save_pretrained(tmp_path / "saved")
    patch.save(tmp_path / "saved")
    ropex.export(tmp_path / "saved", "transformers", tmp_path / "out")
    for directory in ("saved", "out"):
        assert close(answers(type(model).__mro__[0].from_pretrained(tmp_path / directory).eval()), got)
    again = own_model(family, parameters, 4 if parameters is not ROPE else 1, model.state_dict())
    ropex.load(again, tmp_path / "saved")
    assert close(answers(again), got)
    patch.remove()
    assert torch.equal(answers(model), before)


def test_methods_that_no_config_can_say_have_the_plain_softmax() -> None:
    """dynamic_ntk in the place of DeepSeek's yarn: transformers' own `dynamic` has no mscale_all_dim."""
    model = own_model("deepseek_v3", YARN | PAIR, 4)
    plain = own_model("deepseek_v3", ROPE | {"rope_type": "dynamic", "factor": 2.0}, 1, model.state_dict())
    with ropex.patch(model, "dynamic_ntk", factor=2, on_scaled="replace"):
        assert ropex.inspect(model).written is None
        assert close(answers(model), answers(plain))


def test_a_softmax_scale_that_was_changed_by_hand_is_refused() -> None:
    model = own_model("deepseek_v3", YARN | PAIR, 4)
    model.model.layers[1].self_attn.scaling *= 2
    with pytest.raises(
        ropex.UnsupportedModelError, match=r"layers\.1\.self_attn\.scaling is .*changed after the model"
    ):
        ropex.patch(model, "linear", factor=8, on_scaled="replace")
    with ropex.patch(model, on_scaled="keep"):  # which leaves it as it is
        pass

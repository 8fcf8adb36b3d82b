"""Tiny random models of every family that transformers can build with sizes like these, and what a patch does there.

`benchmarks/families.py` writes the grid of `results_of` down; `docs/families.md` is made from it.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM
from transformers.models.auto import modeling_auto

import ropex
from ropex.patching.config import text_config

FIVE = int(transformers.__version__.partition(".")[0]) >= 5
VOCABULARY, TRAINED_LENGTH = 128, 512
LARGEST = 30_000_000  # parameters of a model that is still called tiny
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": TRAINED_LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
MLA |= {"head_dim": 16, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
BOTH_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 128}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
PLAIN = {"rope_parameters": ROPE}  # for families that are born scaled
SCALAR = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY}

# What a family needs besides: sizes that its config does not derive, and layers of both kinds where it has two.
OPTIONS: dict[str, dict[str, Any]] = {
    "apertus": PLAIN,
    "apertus1p5_text": PLAIN,
    "axk1": MLA | EXPERTS,
    "axk2": MLA | EXPERTS,
    "bailing_hybrid": HYBRID | EXPERTS | MLA,
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "cohere2": BOTH_KINDS,
    "cwm": PLAIN,
    "deepseek_v2": MLA | EXPERTS,
    "deepseek_v3": MLA | EXPERTS,
    "deepseek_v32": MLA | EXPERTS,
    "dots1": EXPERTS | {"n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "exaone4": BOTH_KINDS,
    "flint": BOTH_KINDS,
    "gemma2": BOTH_KINDS,
    "gemma3_text": BOTH_KINDS,
    "gemma4_text": SCALAR | BOTH_KINDS | {"global_head_dim": 32},
    "gemma4_unified_text": SCALAR | BOTH_KINDS,
    "glm4_moe": EXPERTS | {"n_group": 1, "topk_group": 1},
    "glm4_moe_lite": MLA | EXPERTS,
    "glm_moe_dsa": MLA | EXPERTS,
    "gpt_oss": EXPERTS | PLAIN | BOTH_KINDS,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "position_embedding_type": "rope"},
    "hy_v3": EXPERTS,
    "hy_v4": EXPERTS,
    "inkling_text": EXPERTS,
    "jamba": EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": MLA | EXPERTS | HYBRID,
    "kolibri1": EXPERTS,
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": EXPERTS,
    "longcat_flash": MLA | EXPERTS,
    "mimo_v2_flash": EXPERTS
    | BOTH_KINDS
    | {"head_dim": 24, "v_head_dim": 16, "swa_head_dim": 24, "swa_v_head_dim": 16},
    "minicpm3": MLA,
    "ministral": BOTH_KINDS,
    "ministral3": {"rope_parameters": ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 512}},
    "modernbert": {"layer_types": ["sliding_attention", "full_attention"], "local_attention": 128},
    "modernbert-decoder": {"layer_types": ["sliding_attention", "full_attention"], "local_attention": 128},
    "olmo3": BOTH_KINDS,
    "qwen2_moe": EXPERTS,
    "qwen3_5_moe_text": HYBRID | EXPERTS,
    "qwen3_5_text": HYBRID,
    "qwen3_moe": EXPERTS,
    "qwen3_next": HYBRID | EXPERTS,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "solar_open": EXPERTS,
    "youtu": MLA,
}
# Models with an image tower, and the type of their text part.
COMPOSITE = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "mllama": "mllama_text_model",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 64,
    "head_dim": 16,
}
ENCODERS = ("modernbert", "eurobert")
# What exists as a model of images and text alone; mistral4, listed there, is the text part of another.
IMAGE_TEXT = sorted(
    set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    - {*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "mistral4"}
)
AXES = {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}
# What their text parts, and the parts for images, need besides.
TEXT_OPTIONS: dict[str, dict[str, Any]] = {
    "cohere_compass": BOTH_KINDS | {"rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE}},
    "ernie4_5_vl_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": [32, 32],
        "rope_parameters": ROPE | {"mrope_section": [3, 3, 2]},
    },
    "glm4v_moe": {"partial_rotary_factor": 1.0, "n_group": 1, "topk_group": 1},
    "granite_docling": {"attention_multiplier": 0.25},
    "hunyuan_vl": {"rope_parameters": ROPE | {"mrope_section": [2, 2, 2, 2]}},
    "minicpm_ocr": HYBRID,
    "minicpmv4_6": HYBRID,
    "minicpmv4_7": HYBRID,
    "mistral_large4": MLA,
}
VISION_OPTIONS = {"qwen2_vl": {"embed_dim": 32, "hidden_size": 64}}


@functools.cache
def families() -> tuple[str, ...]:
    """Every model type for which transformers has a language model that generates, and encoders that rotate."""
    return (*sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *ENCODERS, *IMAGE_TEXT)


def config_of(family: str, **options: Any) -> Any:
    wanted = copy.deepcopy({**SIZES, **OPTIONS.get(family, {}), **options})
    if not FIVE and "rope_parameters" in wanted:  # transformers 4 has other words
        parameters = dict(wanted.pop("rope_parameters"))
        wanted |= {"rope_theta": parameters.pop("rope_theta", 10_000.0)}
        wanted |= {"rope_scaling": parameters if parameters.get("rope_type") != "default" else None}
    if family in IMAGE_TEXT:
        parts = {
            "text_config": {**SIZES, **EXPERTS, **AXES, **TEXT_OPTIONS.get(family, {}), **options},
            "vision_config": {**VISION, **VISION_OPTIONS.get(family, {})},
        }
        try:
            return AutoConfig.for_model(family, **copy.deepcopy(parts))
        except Exception:  # of a text part that has no axes
            parts["text_config"]["rope_parameters"] = ROPE
            return AutoConfig.for_model(family, **copy.deepcopy(parts))
    if family in COMPOSITE:
        text = {**SIZES, **OPTIONS.get(COMPOSITE[family], {}), **options}
        return AutoConfig.for_model(family, text_config=text, vision_config=VISION, audio_config=None)
    failed = None
    for leave_out in ((), ("head_dim",), ("head_dim", "num_key_value_heads")):
        try:
            return AutoConfig.for_model(family, **{k: v for k, v in wanted.items() if k not in leave_out})
        except Exception as error:
            failed = error
    raise failed  # type: ignore[misc]


def auto_of(family: str) -> Any:
    """The class of transformers that makes a family's models."""
    if family in IMAGE_TEXT:
        return AutoModelForImageTextToText
    return AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM


def model_of(family: str, seed: int = 0, **options: Any) -> nn.Module:
    """A tiny model of a family; weights of std 0.02."""
    torch.manual_seed(seed)
    model = auto_of(family).from_config(config_of(family, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what is born zero would hide whatever comes before it
            if not parameter.is_meta and parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def tokens(length: int = 200) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def results_of(family: str) -> dict[str, Any]:
    """What a patch does to a family: `works` with figures, `refused` with the reason, or `not built` with it."""
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_of(family).parameters())
        if size > LARGEST:
            return {"status": "not built", "reason": "its parts other than the text model have sizes of their own"}
        model = model_of(family)
    except Exception as error:
        return {"status": "not built", "reason": f"{type(error).__name__}: {_first_line(error)}"}
    ids = tokens()
    try:
        patch = ropex.patch(model, "none", sliding="scale")
    except ropex.UnsupportedModelError as error:
        return {"status": "refused", "reason": str(error)}
    patch.remove()
    try:
        want = logits_of(model, ids)
    except Exception as error:
        return {"status": "not built", "reason": f"does not run: {type(error).__name__}: {_first_line(error)}"}
    other = copy.deepcopy(model)
    seen = ropex.inspect(model)
    found: dict[str, Any] = {
        "status": "works",
        "layout": f"{seen.table_layout}/{seen.channel_layout}",
        "rotary_dim": seen.geometry.dim,
        "layers": [[kind.name, kind.layers, kind.window] for kind in seen.kinds],
    }
    positions = None
    with ropex.patch(model, "none", sliding="scale") as patch:
        found["none"] = _difference(logits_of(model, ids), want)
        if patch.rotary.axes is not None:  # as words and then an image have them
            positions = positions_of(patch.rotary.axes, ids.shape[1])
            found["axes"] = len(positions)
            placed = _placed(model, ids, positions)
    if positions is not None:
        found["none_on_axes"] = _difference(placed, _placed(model, ids, positions))
    with ropex.patch(model, "none", sliding="scale", angles="float32"):
        found["none_float32"] = _difference(logits_of(model, ids), want)
    try:
        with ropex.patch(model, "yarn", factor=4, sliding="scale"):
            yarn = logits_of(model, ids)
            found["written"] = ropex.inspect(model).written
            found["softmax"] = model_has_softmax_factor(model)
            found["isolated"] = torch.equal(logits_of(other, ids), want)
        found["effect"] = _difference(yarn, want)
        found["yarn"] = _own_yarn(model, family, ids, yarn)
    except ropex.UnsupportedModelError as error:
        found["no_yarn"] = str(error)
        with ropex.patch(model, "linear", factor=4, sliding="scale"):
            found["effect"] = _difference(logits_of(model, ids), want)
            found["isolated"] = torch.equal(logits_of(other, ids), want)
    found["removed"] = torch.equal(logits_of(model, ids), want)
    return found


def positions_of(axes: tuple[int, ...], length: int) -> torch.Tensor:
    """Positions [axes, 1, length] of words, then of an image whose axes go different ways."""
    time = torch.arange(length)
    places = [torch.where(time < 20, time, 20 + (time * (axis + 1)) % 37) for axis in range(max(3, max(axes) + 1))]
    return torch.stack(places)[:, None]


@torch.no_grad()
def _placed(model: nn.Module, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, position_ids=positions).logits


def model_has_softmax_factor(model: nn.Module) -> bool:
    """Whether a patch put its amplitude in the softmax scale."""
    return any(getattr(module, "softmax_factor", 1.0) != 1.0 for module in model.modules())


def _own_yarn(model: nn.Module, family: str, ids: torch.Tensor, got: torch.Tensor) -> float | None:
    """How far transformers' own YaRN is from ropex's; None where the family's config takes none."""
    config = copy.deepcopy(model.config)
    text = text_config(config)
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED_LENGTH}
    before = getattr(text, "rope_parameters", None)
    if not FIVE and family in ("gemma3_text", "nemotron", "olmo3"):  # there it scales some layers, or fewer channels
        return None
    try:
        if before is None:
            text.rope_scaling = scaling
        elif any(isinstance(value, dict) for value in before.values()):
            text.rope_parameters = {name: {**value, **scaling} for name, value in before.items() if value is not None}
        else:
            text.rope_parameters = {**before, **scaling}
        text.max_position_embeddings = 4 * TRAINED_LENGTH
        getattr(text, "validate", lambda: None)()
        own = auto_of(family).from_config(config).eval()
        own.load_state_dict(model.state_dict())
        return _difference(logits_of(own, ids), got)
    except Exception:
        return None


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]

"""Tiny random models of every family that transformers can build with sizes like these.

`python -m tests.families` runs the grid that `docs/families.md` shows and writes its JSON.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, TRAINED_LENGTH = 128, 512
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
SLIDES_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 128}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}

# What a family needs besides: sizes that its config does not derive, and layers of both kinds where it has two.
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}  # of families that are born scaled
OPTIONS: dict[str, dict[str, Any]] = {
    "apertus": PLAIN,
    "axk1": MLA | EXPERTS,
    "axk2": MLA | EXPERTS,
    "bailing_hybrid": HYBRID | EXPERTS | MLA,
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "cwm": PLAIN,
    "deepseek_v2": MLA | EXPERTS,
    "deepseek_v3": MLA | EXPERTS,
    "deepseek_v32": MLA | EXPERTS,
    "dots1": EXPERTS | {"n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "flint": SLIDES_AND_FULL,
    "gemma4_text": {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16, "global_head_dim": 32}
    | SLIDES_AND_FULL,
    "gemma4_unified_text": {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16} | SLIDES_AND_FULL,
    "gemma2": SLIDES_AND_FULL,
    "gemma3_text": SLIDES_AND_FULL,
    "cohere2": {"layer_types": ["sliding_attention", "sliding_attention"], "sliding_window": 1024},
    "gpt_oss": EXPERTS | PLAIN | SLIDES_AND_FULL,
    "glm4_moe": EXPERTS | {"n_group": 1, "topk_group": 1},
    "glm4_moe_lite": MLA | EXPERTS,
    "glm_moe_dsa": MLA | EXPERTS,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "position_embedding_type": "rope"},
    "hy_v3": EXPERTS,
    "hy_v4": EXPERTS,
    "inkling_text": EXPERTS,
    "kimi_linear": MLA | EXPERTS | HYBRID,
    "kolibri1": EXPERTS,
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": EXPERTS,
    "longcat_flash": MLA | EXPERTS,
    "mimo_v2_flash": EXPERTS
    | SLIDES_AND_FULL
    | {"head_dim": 24, "v_head_dim": 16, "swa_head_dim": 24, "swa_v_head_dim": 16},
    "minicpm3": MLA,
    "ministral3": {
        "rope_parameters": PLAIN["rope_parameters"]
        | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 512}
    },
    "modernbert": {"layer_types": ["sliding_attention", "full_attention"], "local_attention": 128},
    "olmo3": SLIDES_AND_FULL,
    "qwen2_moe": EXPERTS,
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": HYBRID | EXPERTS,
    "qwen3_moe": EXPERTS,
    "qwen3_next": HYBRID | EXPERTS,
    "qwen4_exp_text": HYBRID | EXPERTS,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "solar_open": EXPERTS,
    "youtu": MLA,
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "use_mem_rope": True,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "hybrid_layer_ids": [1],
        "num_mem_blocks": 1,
    },
}


@functools.cache
def families() -> tuple[str, ...]:
    """Every model type for which transformers has a causal language model, and encoders that rotate."""
    return (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "modernbert", "eurobert", "neobert")


def config_of(family: str, **options: Any) -> Any:
    wanted = {**SIZES, **OPTIONS.get(family, {}), **options}
    for leave_out in ((), ("head_dim",), ("head_dim", "num_key_value_heads")):
        try:
            return AutoConfig.for_model(family, **{k: v for k, v in wanted.items() if k not in leave_out})
        except Exception as error:
            failed = error
    raise failed


def model_of(family: str, seed: int = 0, **options: Any) -> torch.nn.Module:
    """A tiny model of a family; weights of std 0.02."""
    torch.manual_seed(seed)
    auto = AutoModelForCausalLM if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForMaskedLM
    model = auto.from_config(config_of(family, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what is born zero would hide whatever comes before it
            if not parameter.is_meta and parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.02)
    return model

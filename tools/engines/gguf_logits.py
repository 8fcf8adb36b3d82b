"""Exports as llama.cpp serves them: logits of every method beside those of the patched model.

A tiny Llama with random float32 weights is written as a GGUF file, patched by each method, exported, and read by
llama.cpp through its Python binding. In an environment of its own:

    pip install ropex gguf llama-cpp-python
    python tools/engines/gguf_logits.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import torch
from methods import FACTOR, learn_something, options_of  # beside this file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import ropex
from ropex.evaluation.results import environment, write_json

ROOT = Path(__file__).parents[2]
TRAINED, HEADS, KEY_HEADS, HEAD_DIM, VOCABULARY = 128, 4, 2, 32, 96


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HEADS * HEAD_DIM, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=HEAD_DIM, max_position_embeddings=TRAINED,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """The model as llama.cpp's converter writes it: neighbouring channels are paired there, halves in transformers."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    names = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, value in model.state_dict().items():
        place = name.removesuffix(".weight")
        if place in outside:
            target = outside[place]
        else:
            _, _, layer, inner = place.split(".", 3)
            target = f"blk.{layer}.{names[inner]}"
            if inner in ("self_attn.q_proj", "self_attn.k_proj"):
                value = value.view(-1, 2, HEAD_DIM // 2, value.shape[-1]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(f"{target}.weight", value.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_logits(path: Path, ids: list[int]) -> Tensor:
    """Logits [tokens, vocabulary] of llama.cpp, in float32 on the CPU."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = len(ids)
    options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, options)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    if llama_cpp.llama_decode(context, batch) != 0:
        raise RuntimeError("llama.cpp did not decode the tokens")
    values = llama_cpp.llama_get_logits(context)
    logits = torch.tensor([values[i] for i in range(len(ids) * VOCABULARY)]).view(len(ids), VOCABULARY)
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return logits


def row(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """The largest difference of logits over a context of the target length, and how much the method moves them."""
    model = tiny_model()
    ids = torch.randint(3, VOCABULARY, (1, FACTOR * TRAINED), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        source, out = Path(folder, "model.gguf"), Path(folder, "out.gguf")
        write_gguf(model, source)
        plain = model(ids).logits[0]
        patch = ropex.patch(model, method, **options)
        learn_something(model)
        patch.save(folder)
        freeze = {"length": ids.shape[1]} if patch.schedule.length_dependent or patch.schedule.learned else {}
        ropex.export(folder, "gguf", out, model=source, **freeze)
        with patch.pin_length(ids.shape[1]):
            want = model(ids).logits[0]
        got = llama_cpp_logits(out, ids[0].tolist())
    return {
        "error": (got - want).abs().max().item(),
        "effect": (plain - want).abs().max().item(),
        "size": want.abs().max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "llama_cpp.json")
    asked = parser.parse_args()
    rows = {}
    for method in sorted(ropex.methods()):
        rows[method] = row(method, options_of(method, TRAINED))
        print(method, json.dumps(rows[method]))
    stamp = {"environment": environment(torch.zeros(())), "llama_cpp_python": version("llama-cpp-python")}
    write_json(asked.out, {**stamp, "methods": rows})
    floor = rows["none"]["error"]
    if bad := [method for method, one in rows.items() if not one["error"] <= max(8 * floor, 1e-4)]:
        raise SystemExit(f"served otherwise than patched: {', '.join(bad)}")


if __name__ == "__main__":
    main()

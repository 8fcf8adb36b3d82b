"""What `patch(precision="float32")` gives and costs on the default model in bfloat16.

    python -m benchmarks.precision_patch [--tokens 1024] [--pairs 15]

D and D_logit as in `benchmarks.precision`, but of the patched model's own attentions: each layer gets the hidden states
of one pass, once at positions 0, 1, ... and once 16 further on. Time is that of a forward pass over the unpatched
model's, in turn; memory is what a forward pass adds at its peak, each in a process of its own. Writes
precision_patch.json to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ropex
from benchmarks import RESULTS, summary
from benchmarks.patch_overhead import seconds
from ropex.evaluation.loading import load_model, load_texts
from ropex.evaluation.results import environment, write_json

SHIFT = 16
MEMORY_TOKENS = 8192  # enough for the peak to be activations
# What is freed goes back at once, so that the peak is what is in use.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
PATCHES: dict[str, dict[str, Any] | None] = {
    "unpatched": None,
    'precision="model"': {"precision": "model"},
    'precision="float32"': {"precision": "float32"},
}
captured: list[Tensor] = []


def patched(model: nn.Module, options: dict[str, Any] | None) -> Any:
    return nullcontext() if options is None else ropex.patch(model, "none", **options)


def probe(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **options: Any) -> Any:
    """Attention in the dtype that it is given; keeps the logits."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    logits = query @ key.transpose(-1, -2) * scaling
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
    captured.append(logits.double().masked_fill(hidden, -torch.inf))
    out = captured[-1].softmax(dim=-1).to(value.dtype) @ value
    return out.transpose(1, 2).contiguous(), None


@torch.no_grad()
def deviations(model: Any, ids: Tensor) -> dict[str, float]:
    """D, summed over the layers, and D_logit, their mean, of a model whose positions move by `SHIFT`."""
    inputs: list[Tensor] = []
    attentions = [layer.self_attn for layer in model.model.layers]
    hooks = [
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append(kwargs.get("hidden_states", args[0] if args else None)),
            with_kwargs=True,
        )
        for attention in attentions
    ]
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    positions = torch.arange(ids.shape[1])[None]
    d = d_logit = 0.0
    for attention, hidden in zip(attentions, inputs, strict=True):
        captured.clear()
        for moved in (positions, positions + SHIFT):
            tables = model.model.rotary_emb(hidden, moved)
            attention(hidden_states=hidden, position_embeddings=tables, attention_mask=None)
        first, second = captured
        change = (first.softmax(-1) - second.softmax(-1)).abs()
        rows = torch.arange(ids.shape[1], 0, -1)  # that see each key
        d += (change.sum(dim=-2) / rows).sum().item()
        d_logit += (first[..., 0] - second[..., 0]).abs().mean(dim=-1).sum().item()
    return {"d": d, "d_logit": d_logit / len(attentions)}


def status(name: str) -> int:
    """A field of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) // 1024


@torch.no_grad()
def memory(name: str, tokens: int) -> int:
    """What a forward pass adds at its peak, in MiB; to be run in a process of its own."""
    loaded = load_model(dtype=torch.bfloat16)
    ids = loaded.tokenizer(load_texts().texts[0], return_tensors="pt")["input_ids"][:, :tokens]
    with patched(loaded.model, PATCHES[name]):
        loaded.model(input_ids=ids[:, :8], use_cache=False, logits_to_keep=1)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status("VmRSS")
        loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        return status("VmHWM") - before


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--memory", choices=list(PATCHES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.memory is not None:
        print(json.dumps(memory(options.memory, MEMORY_TOKENS)))
        return
    loaded = load_model(dtype=torch.bfloat16)
    model: Any = loaded.model
    ids = loaded.tokenizer(load_texts().texts[0], return_tensors="pt")["input_ids"][:, : options.tokens]
    rows: dict[str, dict[str, Any]] = {}
    from transformers import AttentionInterface

    AttentionInterface.register("ropex_probe", probe)
    for name, how in PATCHES.items():
        model.set_attn_implementation("ropex_probe")
        with patched(model, how):
            rows[name] = dict(deviations(model, ids))
        model.set_attn_implementation("sdpa")
        own = [sys.executable, "-m", "benchmarks.precision_patch", "--memory", name]
        run = subprocess.run(own, check=True, capture_output=True, text=True, env=os.environ | RETURNED)
        rows[name]["memory_mib"] = json.loads(run.stdout)
    seconds(model, ids)
    ratios: dict[str, list[float]] = {name: [] for name in PATCHES}
    for _ in range(options.pairs):
        for name, how in PATCHES.items():
            before = seconds(model, ids)
            with patched(model, how):
                between = seconds(model, ids)
            ratios[name].append((between / before)[0].item())
    for name, row in rows.items():
        row["time"] = summary(ratios[name])
        print(name, row)
    result = {
        "what": "deviations of attention when all positions move; time and memory of a forward pass",
        "model": loaded.name,
        "tokens": options.tokens,
        "shift": SHIFT,
        "memory_tokens": MEMORY_TOKENS,
        "pairs": options.pairs,
        "rows": rows,
        "environment": environment(next(model.parameters())),
    }
    write_json(options.out / "precision_patch.json", result)


if __name__ == "__main__":
    main()

"""What a patch costs: time of a patched forward pass over that of the unpatched model, in one process.

    python -m benchmarks.patch_overhead [--tokens 2048] [--pairs 15] [--dtype float32]

The model runs unpatched, patched, unpatched, in turn; each round gives the ratio patched / unpatched, and the ratio of
the two unpatched passes, whose spread is what the machine's noise amounts to. Writes patch_overhead.json to
benchmarks/results.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ropex
from benchmarks import RESULTS, summary
from ropex.evaluation.loading import load_model, load_texts
from ropex.evaluation.results import environment, write_json

METHOD = "yarn"


def seconds(model: nn.Module, ids: Tensor) -> Tensor:
    """Wall-clock and processor time of a forward pass; the latter does not count what other processes take."""
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter(), time.process_time()
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return torch.tensor([time.perf_counter() - start[0], time.process_time() - start[1]], dtype=torch.float64)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    loaded = load_model(dtype=getattr(torch, arguments.dtype), device=arguments.device)
    model = loaded.model
    ids = loaded.tokenizer(load_texts().texts[0], return_tensors="pt")["input_ids"][:, : arguments.tokens].to(
        arguments.device
    )
    seconds(model, ids)
    patched, unpatched = [], []
    for number in range(arguments.pairs):
        before = seconds(model, ids)
        with ropex.patch(model, METHOD, factor=2):
            between = seconds(model, ids)
        after = seconds(model, ids)
        patched.append((between / ((before + after) / 2)).tolist())
        unpatched.append((after / before).tolist())
        print(f"{number + 1}/{arguments.pairs}: patched {patched[-1]}, unpatched {unpatched[-1]}", flush=True)
    result: dict[str, Any] = {
        "what": "time of a forward pass over that of the unpatched model",
        "model": loaded.name,
        "method": METHOD,
        "tokens": arguments.tokens,
        "pairs": arguments.pairs,
        "patched": {"wall": summary([wall for wall, _ in patched]), "cpu": summary([cpu for _, cpu in patched])},
        "unpatched": {"wall": summary([wall for wall, _ in unpatched]), "cpu": summary([cpu for _, cpu in unpatched])},
        "environment": environment(next(model.parameters())),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / f"patch_overhead_{arguments.device}_{arguments.dtype}.json", result)
    for name in ("patched", "unpatched"):
        for clock, figures in result[name].items():
            print(
                f"{name} over unpatched, {clock}: {', '.join(f'{key} {value:.3f}' for key, value in figures.items())}"
            )


if __name__ == "__main__":
    main()

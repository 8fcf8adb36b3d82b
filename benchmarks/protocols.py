"""The four perplexity protocols side by side on the default model: what they say, take, and hold in memory.

    python -m benchmarks.protocols [--tokens 8192] [--dtype bfloat16]

One document, eight lengths, unpatched; `press` and `window_mean` move on by an eighth of the document. Memory is what
`binned` adds at its peak over 16,384 tokens, in a process of its own. Writes protocols.json to benchmarks/results, and
fails if `binned` takes more than a quarter of the time of `press`, or more than 1.5 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from transformers.utils import logging

from benchmarks import RESULTS
from benchmarks.precision_patch import RETURNED, status
from ropex.evaluation import documents, perplexity_by_length
from ropex.evaluation.loading import LoadedModel, load_model, load_texts
from ropex.evaluation.perplexity import Protocol
from ropex.evaluation.results import environment, write_json

MEMORY_TOKENS = 16_384
ROWS = 8
TIME_LIMIT, MEMORY_LIMIT_MIB = 0.25, 1500


def document(loaded: LoadedModel, tokens: int) -> Any:
    text = load_texts()
    return documents(text.texts, loaded.tokenizer, length=tokens, limit=1, names=text.names)


def memory(dtype: torch.dtype) -> int:
    """What a curve adds to a loaded model at its peak, in MiB; to be run in a process of its own."""
    loaded = load_model(dtype=dtype)
    found = document(loaded, MEMORY_TOKENS)
    perplexity_by_length(loaded.model, found[0].tokens[:64], bins=1)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    perplexity_by_length(loaded.model, found, bins=ROWS)
    return status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.disable_progress_bar()
    dtype = getattr(torch, options.dtype)
    if options.memory:
        print(json.dumps(memory(dtype)))
        return
    own = [sys.executable, "-m", "benchmarks.protocols", "--memory", "--dtype", options.dtype]
    run = subprocess.run(own, check=True, capture_output=True, text=True, env=os.environ | RETURNED)
    loaded = load_model(dtype=dtype)
    found = document(loaded, options.tokens)
    stride = options.tokens // ROWS
    perplexity_by_length(loaded.model, found, bins=1)  # warm
    results = {}
    for protocol in get_args(Protocol):
        measured = perplexity_by_length(loaded.model, found, protocol=protocol, bins=ROWS, stride=stride)
        results[protocol] = measured.to_dict()
        print(f"{protocol:<12} {measured.seconds:8.1f} s", *(f"{value:.2f}" for value in measured.perplexity))
    share = results["binned"]["seconds"] / results["press"]["seconds"]
    result = {
        "model": loaded.name,
        "tokens": options.tokens,
        "stride": stride,
        "binned_over_press": share,
        "memory": {"tokens": MEMORY_TOKENS, "mib": json.loads(run.stdout)},
        "results": results,
        "environment": environment(next(loaded.model.parameters())),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "protocols.json", result)
    print(f"binned takes {share:.3f} of press; {result['memory']['mib']} MiB over {MEMORY_TOKENS} tokens")
    if share > TIME_LIMIT or result["memory"]["mib"] > MEMORY_LIMIT_MIB:
        raise SystemExit("binned takes more than documented")


if __name__ == "__main__":
    main()

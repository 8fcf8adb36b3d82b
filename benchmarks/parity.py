"""Perplexity of ropex beside transformers' own implementation of each method, same model, same tokens.

    python -m benchmarks.parity [--length 12288] [--factor 2] [--bins 6]

writes parity.json to benchmarks/results, prints how far the two are apart in each bin, and fails if that is more than
the documented 0.5 % (0.1 % for `none` against the unpatched model).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import ropex
from benchmarks import RESULTS
from ropex.evaluation import perplexity_by_length
from ropex.evaluation.loading import LoadedModel, load_model, load_texts
from ropex.evaluation.results import environment, write_json

LIMITS = {"none": 0.001, "linear": 0.005, "ntk": 0.005, "yarn": 0.005}


def rope_parameters(method: str, geometry: ropex.Geometry, factor: float) -> dict[str, Any]:
    """What transformers must be told to use the method; it has no static NTK, which is a changed theta."""
    base = geometry.base
    return {
        "none": {"rope_type": "default", "rope_theta": base},
        "linear": {"rope_type": "linear", "rope_theta": base, "factor": factor},
        "ntk": {"rope_type": "default", "rope_theta": base * factor ** (geometry.dim / (geometry.dim - 2))},
        "yarn": {
            "rope_type": "yarn",
            "rope_theta": base,
            "factor": factor,
            "original_max_position_embeddings": geometry.trained_length,
        },
    }[method]


def measure(loaded: LoadedModel, tokens: torch.Tensor, bins: int, factor: float, text_name: str) -> dict[str, Any]:
    """The methods by ropex, then the same by transformers, in one result."""

    model = loaded.model
    geometry = ropex.inspect(model).geometry
    factors = {method: None if method == "none" else factor for method in LIMITS}
    result: dict[str, Any] = {"model": loaded.name, "text": text_name, "tokens": len(tokens), "results": {}}
    result["environment"] = environment(next(model.parameters()))
    for method in LIMITS:
        with ropex.patch(model, method, factors[method]):
            result["results"][method] = perplexity_by_length(model, tokens, bins=bins).to_dict()
        config = type(model.config).from_dict(model.config.to_dict())
        config.rope_parameters = rope_parameters(method, geometry, factor)
        stock = type(model)(config).to(model.dtype).eval()
        stock.load_state_dict(model.state_dict())
        measured = perplexity_by_length(stock, tokens, bins=bins).to_dict()
        result["results"][f"transformers {method}"] = {"rope_parameters": config.rope_parameters, **measured}
    return result


def differences(result: dict[str, Any]) -> dict[str, float]:
    """The largest relative difference in perplexity over the bins, ropex against transformers, by method."""

    def largest(ours: list[float], theirs: list[float]) -> float:
        return max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))

    rows = result["results"]
    return {m: largest(rows[m]["perplexity"], rows[f"transformers {m}"]["perplexity"]) for m in LIMITS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=12288)
    parser.add_argument("--factor", type=float, default=2.0)
    parser.add_argument("--bins", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    loaded = load_model()
    text = load_texts()
    tokens = loaded.tokenizer(text.texts[0], return_tensors="pt")["input_ids"][0, : arguments.length]
    result = measure(loaded, tokens, arguments.bins, arguments.factor, text.title)
    result["differences"] = differences(result)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "parity.json", result)
    for method, difference in result["differences"].items():
        print(f"{method:<8} largest difference in perplexity {difference:.2e}, allowed {LIMITS[method]:g}")
    if any(result["differences"][method] > limit for method, limit in LIMITS.items()):
        raise SystemExit("perplexities differ from transformers' by more than documented")


if __name__ == "__main__":
    main()

"""Perplexity against context length of the training-free methods, on the default model and text.

    python -m benchmarks.perplexity [--factor 2] [--documents 2] [--dtype bfloat16]

writes perplexity.json and perplexity.png to benchmarks/results (perplexity_1.5.json and so on for other factors). A run
that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers.utils import logging

import ropex
from benchmarks import RESULTS
from ropex.cli.console import progress_bar
from ropex.evaluation import compare_methods, documents
from ropex.evaluation.loading import load_model, load_texts
from ropex.evaluation.plots import plot_perplexity
from ropex.evaluation.results import write_json
from ropex.scaling import FrequencySchedule

PARTS = RESULTS / "parts"


def training_free(factor: float) -> dict[str, FrequencySchedule]:
    """The methods that need no training, for a target of `factor` times the trained length."""
    return {
        "none": ropex.schedule("none"),
        "linear": ropex.schedule("linear", factor=factor),
        **{
            f"ntk, alpha {times * factor:g}": ropex.schedule("ntk", factor=factor, alpha=times * factor)
            for times in (1, 2, 4)
        },
        "dynamic_ntk": ropex.schedule("dynamic_ntk", factor=factor),
        "dynamic_yarn": ropex.schedule("dynamic_yarn"),
        "yarn": ropex.schedule("yarn", factor=factor),
        "resonance(yarn)": ropex.schedule("resonance", factor=factor),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=float, default=2.0)
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.disable_progress_bar()
    loaded = load_model(dtype=getattr(torch, options.dtype))
    trained = ropex.inspect(loaded.model).geometry.trained_length
    length = round(options.factor * trained)
    text = load_texts()
    found = documents(text.texts, loaded.tokenizer, length=length, limit=options.documents, names=text.names)
    edges = [0, trained // 4, *range(trained // 2, length + 1, trained // 4 if length < 2 * trained else trained // 2)]
    name = "perplexity" if options.factor == 2 else f"perplexity_{options.factor:g}"
    with progress_bar() as report:
        result = compare_methods(
            loaded.model,
            training_free(options.factor),
            documents=found,
            bins=edges,
            cells=PARTS / f"{name}.json",
            model_name=loaded.name,
            text_name=text.title,
            progress=report,
        )
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / f"{name}.json", {"factor": options.factor, **result})
    plot_perplexity(options.out / f"{name}.png", result)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()

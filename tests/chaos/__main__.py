"""`python -m tests.chaos NAME COUNT ...`: experiments in a process of their own; prints their figures as JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes are forked here

import torch
import transformers

from tests.chaos.experiments import EXPERIMENTS

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    asked = zip(sys.argv[1::2], map(int, sys.argv[2::2]), strict=True)
    figures = {name: EXPERIMENTS[name].run(count) for name, count in asked}
    sys.stdout.write("\n" + json.dumps(figures) + "\n")

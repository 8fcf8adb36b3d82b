"""What a patch does to tiny random models of every family that transformers has.

Run `python -m benchmarks.families`, then `python -m benchmarks.report`. It takes about a minute.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
import transformers

from benchmarks import RESULTS
from ropex.evaluation.results import environment, write_json
from tests.families import families, results_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "families.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    results = {family: results_of(family) for family in families()}
    write_json(options.out, {"environment": environment(torch.zeros(())), "families": results})


if __name__ == "__main__":
    main()

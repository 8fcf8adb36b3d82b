"""How far cos and sin are off, against 200-bit arithmetic: ropex's exact angles beside transformers' float32 ones.

    python -m benchmarks.angles

Errors are the largest over all frequencies and 64 positions just below each length; the frequencies are the float32
ones of the model, taken as exact. Also how far an angle moves when `.to(torch.bfloat16)` rounds the frequencies. Writes
angles.json to benchmarks/results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mpmath
import torch

import ropex
from benchmarks import RESULTS
from ropex.evaluation.compare import environment, write_json
from ropex.kernels import table

LENGTHS = (4096, 32_768, 131_072, 1_000_000, 10_000_000)
BASES = (10_000.0, 500_000.0)


def largest_errors(geometry: ropex.Geometry, length: int) -> dict[str, float]:
    inv_freq = geometry.inv_freq()
    positions = torch.arange(length - 64, length)[None]
    with mpmath.workprec(200):
        angles = [[mpmath.mpf(p) * mpmath.mpf(f) for f in inv_freq.tolist()] for p in positions[0].tolist()]
        truth = [
            torch.tensor([[float(function(a)) for a in row] for row in angles], dtype=torch.float64)
            for function in (mpmath.cos, mpmath.sin)
        ]
    rotation = ropex.Rotation(positions, inv_freq)
    tables = {"exact": table(rotation), "float32": table(rotation, angles="float32")}
    return {
        name: max((got[0].double() - want).abs().max().item() for got, want in zip(pair, truth, strict=True))
        for name, pair in tables.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out: Path = parser.parse_args().out
    rows = []
    for base in BASES:
        geometry = ropex.Geometry(dim=128, base=base, trained_length=8192)
        rows += [{"base": base, "length": n, "largest_error": largest_errors(geometry, n)} for n in LENGTHS]
    frequencies = ropex.Geometry(dim=64, base=100_000.0, trained_length=8192).inv_freq()
    moved = (frequencies.to(torch.bfloat16).double() - frequencies).abs().max().item() * 1000
    result = {
        "what": "largest absolute error of cos and sin in float32, rotary dimension 128",
        "rows": rows,
        "bfloat16_frequencies": {"dim": 64, "base": 100_000.0, "position": 1000, "radians": moved},
        "environment": environment(torch.zeros(())),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "angles.json", result)
    for row in rows:
        print(row)
    print(f"bfloat16 frequencies move an angle at position 1000 by up to {moved:.2f} radians")


if __name__ == "__main__":
    main()

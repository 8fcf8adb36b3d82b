"""How exact rotations are: angles against 200-bit arithmetic, and attention when a text moves to other positions.

    python -m benchmarks.precision

Angles: the largest error of cos and sin over all frequencies and 64 positions just below each length; the frequencies
are the float32 ones of the model, taken as exact. The ladder: deviations of the logits of random q and k of unit
variance. The model: all layers of the default model on its text, each with its own q and k, moved by 16 tokens. Writes
precision.json to benchmarks/results.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

import ropex
from benchmarks import RESULTS
from ropex.evaluation.loading import load_model, load_texts
from ropex.evaluation.results import environment, write_json
from ropex.precision import Rung, angle_error, probe_precision

LENGTHS = (4096, 32_768, 131_072, 1_000_000, 10_000_000)
BASES = (10_000.0, 500_000.0)
PAIRS, REACH = 4096, 4096
TOKENS, SHIFT = 1024, 16


def angles(geometry: ropex.Geometry, length: int) -> dict[str, Any]:
    rotation = ropex.Rotation(torch.arange(length - 64, length)[None], geometry.inv_freq())
    errors = {kind: angle_error(rotation, angles=kind)._asdict() for kind in ("exact", "float32")}
    return {"base": geometry.base, "length": length, **errors}


def ladder(geometry: ropex.Geometry) -> list[dict[str, Any]]:
    """Texts of two tokens, the first at position 0 and the second up to `REACH` on."""
    torch.manual_seed(0)
    positions = torch.stack((torch.zeros(PAIRS, dtype=torch.int64), torch.randint(1, REACH, (PAIRS,))), -1)
    q, k = torch.randn(2, PAIRS, 1, 2, geometry.dim)
    rotation = ropex.Rotation(positions, geometry.inv_freq())
    return [{"base": geometry.base, **one._asdict()} for one in probe_precision(q, k, rotation, LENGTHS)]


def by_heads(x: Tensor, head_dim: int) -> Tensor:
    return x.view(*x.shape[:2], -1, head_dim).transpose(1, 2)


@torch.no_grad()
def model() -> dict[str, Any]:
    """D and D_logit of Wang et al., summed over the layers and averaged over them."""
    loaded = load_model()
    geometry = ropex.inspect(loaded.model).geometry
    ids = loaded.tokenizer(load_texts().texts[0], return_tensors="pt")["input_ids"][:, :TOKENS]
    kept: dict[str, list[Tensor]] = {"q_proj": [], "k_proj": []}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: kept[name].append(output)

    hooks = [
        module.register_forward_hook(keep(name.rpartition(".")[2]))
        for name, module in loaded.model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in kept
    ]
    loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    rotation = ropex.schedule("none").at(geometry, length=TOKENS)
    head_dim = loaded.model.config.head_dim or geometry.dim
    layers = [
        probe_precision(by_heads(q, head_dim), by_heads(k, head_dim), rotation, [SHIFT])
        for q, k in zip(kept["q_proj"], kept["k_proj"], strict=True)
    ]
    found = [
        {
            "rung": rung,
            "d": sum(one.d for layer in layers for one in layer if one.rung == rung),
            "d_logit": sum(one.d_logit for layer in layers for one in layer if one.rung == rung) / len(layers),
        }
        for rung in get_args(Rung)
    ]
    return {"model": loaded.name, "tokens": TOKENS, "shift": SHIFT, "layers": len(layers), "rungs": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out: Path = parser.parse_args().out
    geometries = [ropex.Geometry(dim=128, base=base, trained_length=8192) for base in BASES]
    frequencies = ropex.Geometry(dim=64, base=100_000.0, trained_length=8192).inv_freq()
    moved = (frequencies.to(torch.bfloat16).double() - frequencies).abs().max().item() * 1000
    result: dict[str, Any] = {
        "what": "errors of cos and sin; deviations of attention when all positions move",
        "angles": [angles(geometry, length) for geometry in geometries for length in (*LENGTHS, 2**31, 2**40)],
        "bfloat16_frequencies": {"dim": 64, "base": 100_000.0, "position": 1000, "radians": moved},
        "pairs": PAIRS,
        "reach": REACH,
        "ladder": [row for geometry in geometries for row in ladder(geometry)],
        "model": model(),
        "environment": environment(torch.zeros(())),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "precision.json", result)
    for row in (*result["angles"], *result["ladder"], *result["model"]["rungs"]):
        print(row)
    print(f"bfloat16 frequencies move an angle at position 1000 by up to {moved:.2f} radians")


if __name__ == "__main__":
    main()

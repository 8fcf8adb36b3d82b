"""Random draws without a generator: a counter-based hash of one int64 key per sample.

The arithmetic is int64 multiplication, addition and shifts, modulo 2**64, so that eager and compiled code, every device
and every rank draw the same numbers from the same key, and nothing has to be saved but the key's ingredients.

Reference: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011; the mixing function is that of Steele et
al., Fast Splittable Pseudorandom Number Generators, 2014.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ropex.rotation import widest_float

__all__ = ["integers", "next_key", "sample_keys", "subset", "uniform"]

_GOLDEN_RATIO = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def sample_keys(seed: int, step: Tensor, samples: Tensor) -> Tensor:
    """One key per sample.

    Args:
        seed: of the run, a 64-bit integer.
        step: int64 0-d, of the training.
        samples: int64 [batch], each sample's index among all that are trained on in this step.

    Returns:
        int64 [batch].
    """
    seed = (seed + 2**63) % 2**64 - 2**63  # what an int64 can hold of it
    return _counted(_mix(step * _GOLDEN_RATIO + seed), samples)


def next_key(key: Tensor) -> Tensor:
    """Keys that are independent of these, for what is nested in what draws from these."""
    return _mix(_mix(key) + _GOLDEN_RATIO)


def uniform(key: Tensor, n: int, *, stream: int = 0) -> Tensor:
    """`n` numbers per sample, uniform on [0, 1).

    Args:
        key: int64 [batch].
        n: how many.
        stream: which of many independent sequences, an int >= 0.

    Returns:
        float64 [batch, n] (float32 on a device without float64).
    """
    dtype = widest_float(key.device)
    digits = 53 if dtype == torch.float64 else 24  # of the significand
    return _shift(_bits(key, n, stream), 64 - digits).to(dtype) * 2.0**-digits


def integers(key: Tensor, n: int, bound: int | Tensor, *, stream: int = 0) -> Tensor:
    """`n` integers per sample, uniform on {0 .. bound - 1}.

    Args:
        key: int64 [batch].
        n: how many.
        bound: 1 to 2**31 - 1; an int, or int64 that broadcasts against [batch, n].
        stream: as in `uniform`.

    Returns:
        int64 [batch, n].
    """
    return _shift(_bits(key, n, stream), 32) * bound >> 32


def subset(key: Tensor, n: int, bound: int | Tensor, *, limit: int, stream: int = 0) -> Tensor:
    """`n` distinct integers of {0 .. bound - 1} per sample, sorted; every such subset is equally likely.

    Args:
        key: int64 [batch].
        n: how many, at most `bound`.
        bound: an int, or int64 0-d.
        limit: an int that `bound` does not exceed; it alone decides about shapes.
        stream: as in `uniform`.

    Returns:
        int64 [batch, n].
    """
    candidates = torch.arange(limit, device=key.device)
    ranks = _shift(_bits(key, limit, stream), 1).masked_fill(candidates >= bound, torch.iinfo(torch.int64).max)
    return ranks.topk(n, dim=-1, largest=False, sorted=False).indices.sort(dim=-1).values


def _bits(key: Tensor, n: int, stream: int) -> Tensor:
    """64 random bits, int64 [batch, n]."""
    state = _mix(key + (stream + 1) * _FIRST % 2**63)
    return _counted(state[..., None], torch.arange(n, device=key.device))


def _counted(state: Tensor, counter: Tensor) -> Tensor:
    """One word for each count.

    Two rounds on the plain count instead of one on its multiple: TorchInductor turns the multiple of an `arange` into
    index arithmetic of C++, where overflow is undefined, and the compiler then drops the end of the loop.
    """
    return next_key(state ^ counter)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, places: int) -> Tensor:
    """Shift right, filling with zeros; `>>` alone copies the sign."""
    return (x >> places) & ((1 << (64 - places)) - 1)

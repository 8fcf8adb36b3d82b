"""How exact rotations are: of angles against many digits, and of attention when a text moves to other positions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ropex._checks import describe, require_int, require_type
from ropex.kernels import Angles, Layout, rotate, table
from ropex.kernels.reference import rotate_one
from ropex.rotation import Rotation

__all__ = ["AngleError", "Deviation", "Rung", "angle_error", "probe_precision"]

Rung = Literal["bfloat16 arithmetic", "bfloat16", "float16", "split", "float32"]


class AngleError(NamedTuple):
    """Absolute errors of cos and sin.

    Attributes:
        largest: of all.
        rms: root of the mean square of all.
    """

    largest: float
    rms: float


def angle_error(rotation: Rotation, *, angles: Angles = "exact", bits: int = 200) -> AngleError:
    """The error of a rotation's cos and sin in float32, against arithmetic of `bits` bits.

    The truth is the cos and sin of `positions * inv_freq`, with the frequencies taken as exact. The amplitude is left
    out. Takes 20 us per number.

    Args:
        rotation: positions [batch, seq] and inv_freq, as of any schedule.
        angles: as in `ropex.rotate`.
        bits: precision of the truth.

    Example:
        >>> far = torch.arange(9_999_990, 10_000_000)[None]
        >>> angle_error(Rotation(far, Geometry(64, 10_000.0, 2048).inv_freq())).largest < 2e-7
        True
    """
    import mpmath

    require_type("rotation", rotation, Rotation, "a ropex.Rotation; pass what a schedule's rotation() or at() gives")
    require_int("bits", bits, minimum=64, maximum=10_000, remedy="pass 200")
    cos, sin = table(rotation._replace(amplitude=1.0), angles=angles)
    positions, inv_freq = (x.to(torch.float64 if x.is_floating_point() else x.dtype) for x in rotation[:2])
    inv_freq = inv_freq.expand(*cos.shape)
    positions = positions[..., None].expand(*cos.shape)
    with mpmath.workprec(bits):
        turned = [
            mpmath.mpf(position) * mpmath.mpf(frequency)
            for position, frequency in zip(positions.flatten().tolist(), inv_freq.flatten().tolist(), strict=True)
        ]
        truth = [[float(function(angle)) for angle in turned] for function in (mpmath.cos, mpmath.sin)]
    got = torch.stack((cos.flatten(), sin.flatten())).to("cpu", torch.float64)
    error = (got - torch.tensor(truth, dtype=torch.float64)).abs()
    return AngleError(error.max().item(), error.square().mean().sqrt().item())


class Deviation(NamedTuple):
    """How far attention moves when all positions move by `shift`, which in exact arithmetic changes nothing.

    Attributes:
        rung: how q and k are rotated and kept. `bfloat16 arithmetic`: transformers' float32 angles, tables and products
            in bfloat16; all others have exact angles and float32 arithmetic, and keep q and k in `bfloat16`, in
            `float16`, `split` into two bfloat16 parts each, or in `float32`.
        shift: in tokens.
        rms: of the difference of the logits q k / sqrt(head_dim), over all pairs of a query and a key not after it.
        largest: of these differences.
        d: summed over heads and keys, the mean over a key's queries of the difference of attention weights.
        d_logit: mean over queries and heads of the absolute difference of the logits of the first key.
    """

    rung: Rung
    shift: int
    rms: float
    largest: float
    d: float
    d_logit: float


@torch.no_grad()
def probe_precision(
    q: Tensor, k: Tensor, rotation: Rotation, shifts: Iterable[int], *, layout: Layout = "half"
) -> list[Deviation]:
    """How far causal attention moves with the positions, at each rung of the precision ladder.

    q and k are taken in bfloat16, as most models compute them. Products of what is kept are made in float64, so that
    what is measured is the rotation's error and no other.

    Args:
        q: queries before rotation, [batch, heads, seq, head_dim].
        k: keys before rotation; its heads divide those of q.
        rotation: of the text where it starts, [1 or batch, seq].
        shifts: by how many tokens to move it.
        layout: as in `ropex.rotate`.

    Returns:
        For each rung, in the order of `Rung`, one `Deviation` per shift.

    Raises:
        ValueError: what `ropex.rotate` raises, heads that do not divide, no shift.

    Reference: Wang et al., When Precision Meets Position: BFloat16 Breaks Down RoPE in Long-Context Training, 2024,
    arXiv:2411.13476, section 3.
    """
    if isinstance(shifts, Tensor) or not isinstance(shifts, Iterable):
        raise ValueError(f"shifts={shifts!r}: must be a list of tokens; pass such as [16, 4096]")
    require_type("k", k, Tensor, "a tensor; pass keys beside the queries")
    shifts = list(shifts)
    if not shifts:
        raise ValueError("shifts=[]: must hold at least one number of tokens; pass such as [16, 4096]")
    for shift in shifts:
        require_int("shift", shift, minimum=-(2**62), remedy="pass whole tokens")
    rotate(q, k, rotation, layout=layout)  # whatever is wrong is raised here
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {describe(q)} and k {describe(k)}: the heads of k must divide those of q; pass both of one layer"
        )
    q, k = q.to(torch.bfloat16), k.to(torch.bfloat16)
    deviations = []
    for rung in get_args(Rung):
        start = _Attention(q, k, rotation, rung, layout)
        for shift in shifts:
            moved = _Attention(q, k, rotation._replace(positions=rotation.positions + shift), rung, layout)
            deviations.append(start.deviation(moved, rung, shift))
    return deviations


class _Attention:
    """Logits and weights of causal attention, a head at a time."""

    def __init__(self, q: Tensor, k: Tensor, rotation: Rotation, rung: Rung, layout: Layout) -> None:
        if rung == "bfloat16 arithmetic":
            cos, sin = (t.to(torch.bfloat16) for t in table(rotation, angles="float32"))
            interleaved = layout == "interleaved"
            turned = [rotate_one(x, cos, sin, interleaved=interleaved, dtype=x.dtype) for x in (q, k)]
        elif rung == "split":
            turned = list(rotate(q, k, rotation, layout=layout, split=True))
        else:
            turned = list(rotate(q, k, rotation, layout=layout, out_dtype=getattr(torch, rung)))
        self.split = rung == "split"
        self.q, self.k = turned
        self.group = q.shape[1] // k.shape[1]

    def logits(self, head: int) -> Tensor:
        """[batch, seq, seq] in float64; of the split parts the three products that matter."""
        q, k = self.q[..., head, :, :].double(), self.k[..., head // self.group, :, :].double().mT
        q = q * q.shape[-1] ** -0.5
        logits: Tensor = q[0] @ k[0] + q[0] @ k[1] + q[1] @ k[0] if self.split else q @ k
        return logits

    def deviation(self, moved: _Attention, rung: Rung, shift: int) -> Deviation:
        heads, seq = self.q.shape[-3], self.q.shape[-2]
        seen = torch.ones(seq, seq, dtype=torch.bool, device=self.q.device).tril()
        queries = seen.sum(0)
        squares, largest, d, d_logit = [], [], [], []
        for head in range(heads):
            logits = [x.logits(head) for x in (self, moved)]
            difference = (logits[1] - logits[0]).abs()[..., seen]
            squares.append(difference.square().mean())
            largest.append(difference.max())
            d_logit.append((logits[1] - logits[0])[..., 0].abs().mean())
            weights = [x.masked_fill(~seen, -torch.inf).softmax(-1) for x in logits]
            d.append(((weights[1] - weights[0]).abs().sum(-2) / queries).sum(-1).mean())
        return Deviation(
            rung,
            shift,
            rms=torch.stack(squares).mean().sqrt().item(),
            largest=torch.stack(largest).max().item(),
            d=torch.stack(d).sum().item(),
            d_logit=torch.stack(d_logit).mean().item(),
        )

"""The promises about exactness, and the functions that measure it."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

import ropex
from ropex.kernels import table
from ropex.precision import AngleError, Rung, angle_error, probe_precision
from tests.oracles import TABLE_ERROR, true_cos_sin

# Root mean square of the deviation of logits, for q and k of unit variance and 128 channels.
LADDER = {"float32": 2e-7, "split": 1e-5, "float16": 5e-4, "bfloat16": 3.2e-3}


@pytest.mark.parametrize("base", [1e4, 5e5, 1e6, 1e7])
@pytest.mark.parametrize("sign", [1, -1])
def test_angles_up_to_ten_million(base: float, sign: int) -> None:
    inv_freq = ropex.Geometry(128, base, 8192).inv_freq()
    positions = torch.cat((torch.randint(10_000_000, (20,)), torch.tensor([0, 1, 4095, 131_071, 9_999_999])))
    assert angle_error(ropex.Rotation(sign * positions[None], inv_freq)).largest <= TABLE_ERROR


def test_the_error_of_float32_angles_is_seen() -> None:
    rotation = ropex.Rotation(torch.arange(999_990, 1_000_000)[None], ropex.Geometry(128, 5e5, 8192).inv_freq())
    exact, rounded = angle_error(rotation), angle_error(rotation, angles="float32")
    assert isinstance(exact, AngleError)
    assert rounded.largest > 1e-2
    assert exact.rms < exact.largest < 2e-7


def test_the_truth_is_that_of_the_oracle() -> None:
    """Of a rotation whose table is wrong by a known amount: a frequency that float32 cannot hold."""
    inv_freq = torch.tensor([1 / 3], dtype=torch.float64)
    rotation = ropex.Rotation(torch.tensor([[1000]]), inv_freq, 5.0)
    cos, sin = table(rotation, angles="float32")
    truth = true_cos_sin(1000, 1 / 3)
    errors = [abs(cos.item() / 5 - truth[0]), abs(sin.item() / 5 - truth[1])]
    assert angle_error(rotation, angles="float32").largest == pytest.approx(max(errors), rel=0.05)


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_attention_does_not_move_with_the_positions(base: float) -> None:
    """4096 texts of two tokens, the first at position 0, which is kept without rounding, the second up to 4096 on."""
    positions = torch.stack((torch.zeros(4096, dtype=torch.int64), torch.randint(1, 4096, (4096,))), -1)
    rotation = ropex.Rotation(positions, ropex.Geometry(128, base, 8192).inv_freq())
    q, k = torch.randn(2, 4096, 1, 2, 128)
    found = {(one.rung, one.shift): one for one in probe_precision(q, k, rotation, [4096, 1_000_000, 10_000_000])}
    assert {rung for rung, _ in found} == set(get_args(Rung))
    for rung, bound in LADDER.items():
        near, far, farthest = (found[rung, shift] for shift in (4096, 1_000_000, 10_000_000))
        for one in (near, far, farthest):
            assert 0 < one.rms <= bound
            assert one.rms < one.largest
        assert far.rms == pytest.approx(near.rms, rel=0.05)
        assert farthest.rms == pytest.approx(near.rms, rel=0.05)
    # And where transformers' arithmetic is, all measures see it.
    today = found["bfloat16 arithmetic", 10_000_000]
    ours = found["bfloat16", 10_000_000]
    assert today.rms > 10 * ours.rms
    assert today.d > 10 * ours.d
    assert today.d_logit > 10 * ours.d_logit


def test_a_text_of_its_own_positions_keeps_its_deviation() -> None:
    """Where both q and k are rounded at both places, by sqrt(2) times the rounding of one place."""
    q, k = torch.randn(1, 4, 384, 128), torch.randn(1, 2, 384, 128)
    rotation = ropex.Rotation(torch.arange(384)[None], ropex.Geometry(128, 10_000.0, 8192).inv_freq())
    found = {(one.rung, one.shift): one.rms for one in probe_precision(q, k, rotation, [4096, 10_000_000])}
    for rung in LADDER:
        assert found[rung, 10_000_000] == pytest.approx(found[rung, 4096], rel=0.05)


def test_the_measures_against_their_definitions() -> None:
    q, k = torch.randn(2, 2, 5, 8).bfloat16(), torch.randn(2, 1, 5, 8).bfloat16()
    rotation = ropex.Rotation(torch.arange(5)[None], torch.rand(4, dtype=torch.float64))
    found = next(one for one in probe_precision(q, k, rotation, [1000]) if one.rung == "bfloat16")
    logits, weights = [], []
    for shift in (0, 1000):
        moved = rotation._replace(positions=rotation.positions + shift)
        a, b = (x.double() for x in ropex.rotate(q, k, moved))
        logits.append(torch.einsum("bhid,bxjd->bhij", a, b) / 8**0.5)
        weights.append(torch.stack([logits[-1][..., i, :] for i in range(5)], -2))
    total, d, first = [], 0.0, []
    for b in range(2):
        for h in range(2):
            for i in range(5):
                first.append(abs(logits[1][b, h, i, 0] - logits[0][b, h, i, 0]).item())
                one, two = (x[b, h, i, : i + 1] for x in logits)
                total += (two - one).tolist()
                moved_weights = (two.softmax(0) - one.softmax(0)).abs()
                d += sum(moved_weights[j].item() / (5 - j) for j in range(i + 1)) / 2
    assert found.rms == pytest.approx(torch.tensor(total).square().mean().sqrt().item(), rel=1e-5)
    assert found.largest == pytest.approx(torch.tensor(total).abs().max().item(), rel=1e-5)
    assert found.d == pytest.approx(d, rel=1e-6)
    assert found.d_logit == pytest.approx(sum(first) / len(first), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shifts": []}, r"shifts=\[\]: must hold at least one"),
        ({"shifts": [0.5]}, r"shift=0\.5: must be an int"),
        ({"k": torch.zeros(1, 3, 5, 8)}, r"the heads of k must divide those of q"),
        ({"q": torch.zeros(1, 2, 4, 8)}, r"must be the same \[batch, seq\]"),
    ],
)
def test_bad_probes(change: dict[str, Any], message: str) -> None:
    rotation = ropex.Rotation(torch.arange(5)[None], torch.rand(4))
    arguments: dict[str, Any] = {
        "q": torch.zeros(1, 2, 5, 8), "k": torch.zeros(1, 1, 5, 8), "rotation": rotation, "shifts": [1], **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        probe_precision(**arguments)


def test_bad_bits() -> None:
    with pytest.raises(ValueError, match=r"bits=20: must be an int >= 64"):
        angle_error(ropex.Rotation(torch.arange(5)[None], torch.rand(4)), bits=20)

"""Random bad calls of the kernels: each is refused with a clear error, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ropex
from ropex.kernels import norm_rotate, rotate_with_table, table

SIZES = st.integers(1, 5)


@st.composite
def good_calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `rotate` that fit."""
    batch, heads, seq, half = (draw(SIZES) for _ in range(4))
    head_dim = 2 * half + draw(st.integers(0, 3))
    order = draw(st.sampled_from(["bhsd", "bshd", "thd"]))
    batch = 1 if order == "thd" else batch
    k_heads = draw(SIZES)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    shapes = {
        "bhsd": lambda h: (batch, h, seq, head_dim),
        "bshd": lambda h: (batch, seq, h, head_dim),
        "thd": lambda h: (seq, h, head_dim),
    }[order]
    frequencies = draw(st.sampled_from([(half,), (batch, 1, half), (batch, seq, half)]))
    return {
        "q": torch.randn(shapes(heads)).to(dtype),
        "k": torch.randn(shapes(k_heads)).to(dtype),
        "rotation": ropex.Rotation(torch.zeros(batch, seq, dtype=torch.int64), torch.rand(frequencies)),
        "order": order,
        "inplace": draw(st.booleans()),
        "backend": draw(st.sampled_from(["auto", "reference", "triton"])),
    }


def replaced(call: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**call, "rotation": call["rotation"]._replace(**fields)}


def sized(x: Tensor, axis: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = size
    return torch.randn(shape).to(x.dtype)


def with_out(call: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {**call, "inplace": False, **options}


def overlapping(call: dict[str, Any], number: int) -> dict[str, Any]:
    """q and k views of one tensor, with a head in common."""
    heads = call["order"].index("h")
    q, k = call["q"], call["k"]
    packed = torch.cat((q, k), heads)
    start = max(0, q.shape[heads] - 1 - number % 2)
    k = packed.narrow(heads, start, k.shape[heads])
    return {**call, "inplace": True, "q": packed.narrow(heads, 0, q.shape[heads]), "k": k}


# What was passed, what is required.
REFUSAL = r": (must|needs|elements share|autograd forbids|belongs|it would|its|a result)"

# Each takes a good call and a number, and makes one thing wrong.
FAULTS: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {
    "q's head_dim": lambda c, n: {**c, "q": sized(c["q"], -1, c["q"].shape[-1] + n)},
    "k's head_dim": lambda c, n: {**c, "k": sized(c["k"], -1, c["k"].shape[-1] + n)},
    "k's seq": lambda c, n: {**c, "k": sized(c["k"], c["order"].index("s" if "s" in c["order"] else "t"), 9 + n)},
    "q's batch": lambda c, n: {**c, "q": sized(c["q"], 0, c["q"].shape[0] + n)},
    "too few axes": lambda c, n: {**c, "q": c["q"][0]},
    "too many axes": lambda c, n: {**c, "k": c["k"][None]},
    "head_dim below the rotary dimension": lambda c, n: {
        **c,
        "q": c["q"][..., :1],
        "k": c["k"][..., :1],
    },
    "integers": lambda c, n: {**c, "q": c["q"].to((torch.int64, torch.int32, torch.bool, torch.uint8)[n % 4])},
    "complex": lambda c, n: {**c, "k": c["k"].to(torch.complex64)},
    "float8": lambda c, n: {**c, "q": c["q"].to(torch.float8_e4m3fn), "k": c["k"].to(torch.float8_e4m3fn)},
    "k's dtype": lambda c, n: {**c, "k": c["k"].double()},
    "no tensor": lambda c, n: {**c, "q": (c["q"].tolist(), None, 3, "q")[n % 4]},
    "k no tensor": lambda c, n: {**c, "k": (c["k"].tolist(), 1.5, 3, "k")[n % 4]},
    "no rotation": lambda c, n: {**c, "rotation": (None, tuple(c["rotation"]), c["q"], 5)[n % 4]},
    "fractional positions": lambda c, n: replaced(c, positions=c["rotation"].positions + 0.5),
    "int32 positions": lambda c, n: replaced(c, positions=c["rotation"].positions.int()),
    "positions of one axis": lambda c, n: replaced(c, positions=c["rotation"].positions[0]),
    "positions of three axes": lambda c, n: replaced(c, positions=c["rotation"].positions[None]),
    "longer positions": lambda c, n: replaced(c, positions=torch.zeros(1, 9 + n, dtype=torch.int64)),
    "more rows of positions": lambda c, n: replaced(
        c, positions=torch.zeros(9 + n, c["rotation"].positions.shape[1], dtype=torch.int64)
    ),
    "list of positions": lambda c, n: replaced(c, positions=c["rotation"].positions.tolist()),
    "frequencies of two axes": lambda c, n: replaced(c, inv_freq=torch.rand(2, n)),
    "frequencies per other tokens": lambda c, n: replaced(c, inv_freq=torch.rand(1, 9 + n, 1)),
    "frequencies of other samples": lambda c, n: replaced(c, inv_freq=torch.rand(9 + n, 1, 1)),
    "integer frequencies": lambda c, n: replaced(c, inv_freq=torch.ones(1, dtype=torch.int64)),
    "no frequencies": lambda c, n: replaced(c, inv_freq=torch.rand(0)),
    "too many frequencies": lambda c, n: replaced(c, inv_freq=torch.rand(c["q"].shape[-1] // 2 + n)),
    "list of frequencies": lambda c, n: replaced(c, inv_freq=[1.0] * n),
    "amplitude that does not fit": lambda c, n: replaced(c, amplitude=torch.rand(9 + n, 1, 1, 1)),
    "amplitude of words": lambda c, n: replaced(c, amplitude="1" * n),
    "complex amplitude": lambda c, n: replaced(c, amplitude=torch.ones(1, dtype=torch.complex64)),
    "another device": lambda c, n: {**c, "k": c["k"].to("meta")},
    "positions on another device": lambda c, n: replaced(c, positions=c["rotation"].positions.to("meta")),
    "frequencies on another device": lambda c, n: replaced(c, inv_freq=c["rotation"].inv_freq.to("meta")),
    "unknown layout": lambda c, n: {**c, "layout": ("halves", None, 0, b"half")[n % 4]},
    "unknown order": lambda c, n: {**c, "order": ("sbhd", None, 1, "BHSD")[n % 4]},
    "unknown angles": lambda c, n: {**c, "angles": ("float64", None, 1, True)[n % 4]},
    "unknown backend": lambda c, n: {**c, "backend": ("cuda", None, 1, "Triton")[n % 4]},
    "odd rotary_dim": lambda c, n: {**c, "rotary_dim": 2 * n - 1},
    "large rotary_dim": lambda c, n: {**c, "rotary_dim": c["q"].shape[-1] + 2 * n},
    "other rotary_dim": lambda c, n: {**c, "rotary_dim": c["rotation"].inv_freq.shape[-1] * 2 + 2 * n},
    "no rotary_dim": lambda c, n: {**c, "rotary_dim": (0, -2, 2.0, True)[n % 4]},
    "inplace of words": lambda c, n: {**c, "inplace": (1, None, "yes", 0.0)[n % 4]},
    "split of words": lambda c, n: {**c, "split": (1, None, "yes", 0.0)[n % 4]},
    "integer result": lambda c, n: with_out(c, out_dtype=(torch.int64, torch.bool, torch.complex64, "bf16")[n % 4]),
    "another dtype in place": lambda c, n: {**c, "inplace": True, "out_dtype": torch.float64},
    "split in place": lambda c, n: {**c, "inplace": True, "split": True},
    "shared memory in place": lambda c, n: {**c, "inplace": True, "q": c["q"][:1].expand(5, *c["q"].shape[1:])},
    "q for k in place": lambda c, n: {**c, "inplace": True, "k": c["q"]},
    "a view of q for k in place": lambda c, n: {**c, "inplace": True, "k": c["q"].detach()},
    "overlapping q and k in place": lambda c, n: overlapping(c, n),
    "overlapping elements in place": lambda c, n: (
        {
            **c,
            "inplace": True,
            "q": torch.zeros(10_000).to(c["q"].dtype).as_strided(c["q"].shape, tuple(range(9, 9 - c["q"].dim(), -1))),
        }
        if c["q"].numel() > 40
        else {**c, "inplace": 2}
    ),
    "a sparse q": lambda c, n: {**c, "q": c["q"].to_sparse()},
    "amplitude without a value": lambda c, n: replaced(c, amplitude=(float("nan"), float("inf"), True, None)[n % 4]),
    "a rotation for k": lambda c, n: {**c, "k": c["rotation"], "rotation": None},
    "a leaf in place": lambda c, n: {**c, "inplace": True, "q": c["q"].clone().requires_grad_()},
    "float64 by triton": lambda c, n: {**c, "q": c["q"].double(), "k": c["k"].double(), "backend": "triton"},
    "bounds of rows": lambda c, n: {**c, "order": "bhsd", "cu_seqlens": torch.tensor([0, n])},
    "bounds that do not end": lambda c, n: {**c, "cu_seqlens": torch.tensor([0, 9 + n])},
    "bounds that fall": lambda c, n: {**c, "cu_seqlens": torch.tensor([0, 5 + n, 1])},
    "fractional bounds": lambda c, n: {**c, "cu_seqlens": torch.tensor([0.0, n])},
    "list of bounds": lambda c, n: {**c, "cu_seqlens": [0, n]},
}


def bytes_of(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.uint8)


@settings(max_examples=400)
@given(call=good_calls(), fault=st.sampled_from(sorted(FAULTS)), number=st.integers(1, 4))
def test_a_bad_call_is_refused_and_writes_nothing(call: dict[str, Any], fault: str, number: int) -> None:
    bad = FAULTS[fault](call, number)
    tensors = [x for x in (bad["q"], bad["k"]) if isinstance(x, Tensor) and not x.is_meta]
    tensors = [x for x in tensors if x.layout == torch.strided]
    before = [x.detach().clone() for x in tensors]
    with pytest.raises(ValueError, match=REFUSAL):
        ropex.rotate(**bad)
    assert all(torch.equal(bytes_of(a), bytes_of(b)) for a, b in zip(tensors, before, strict=True))


@settings(max_examples=100)
@given(call=good_calls())
def test_what_the_faults_are_made_from_is_accepted(call: dict[str, Any]) -> None:
    q, k = ropex.rotate(**call)
    assert q.shape == call["q"].shape
    assert k.dtype == call["k"].dtype


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_every_fault_is_met(fault: str) -> None:
    """Each once, so that none depends on what the property test happens to draw."""
    call: dict[str, Any] = {
        "q": torch.randn(2, 3, 4, 6),
        "k": torch.randn(2, 1, 4, 6),
        "rotation": ropex.Rotation(torch.zeros(2, 4, dtype=torch.int64), torch.rand(2, 1, 3)),
        "order": "bhsd",
        "inplace": False,
        "backend": "triton",
    }
    bad = FAULTS[fault](call, 1)
    with pytest.raises(ValueError, match=REFUSAL):
        ropex.rotate(**bad)


Q = torch.zeros(1, 2, 9, 16)
ROTATION = ropex.Rotation(torch.arange(9)[None], torch.rand(8))


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("triton", r'backend="triton" on cpu: needs Triton and a GPU; pass backend="auto", or, to run the interpreter'),
        ("compiled", r'backend="compiled" on meta: needs tensors on the CPU, a C\+\+ compiler'),
    ],
)
def test_a_named_backend_that_cannot_run(monkeypatch: pytest.MonkeyPatch, backend: Any, message: str) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    q, rotation = Q, ROTATION
    if backend == "compiled":
        q, rotation = Q.to("meta"), ropex.Rotation(ROTATION[0].to("meta"), ROTATION[1].to("meta"))
    with pytest.raises(ValueError, match=message):
        ropex.rotate(q, rotation=rotation, backend=backend)


def test_tuning_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"tune with q on cpu: launches are timed on a GPU"):
        ropex.kernels.tune(Q, None, ROTATION)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_weight": None}, r"q_weight=None: a weight goes with each of q and k"),
        ({"k_weight": torch.ones(16)}, r"k_weight=given: a weight goes with each of q and k"),
        ({"q_weight": torch.ones(32)}, r"q_weight float32 \[32\]: must be a floating-point \[16\]"),
        ({"q_weight": torch.ones(16, device="meta")}, r"q_weight on meta, q on cpu: must be on one device"),
        ({"q_weight": [1.0] * 16}, r"q_weight of the type list: must be a tensor"),
        ({"eps": -1.0}, r"eps=-1\.0: must be a finite number >= 0; pass the norm's epsilon"),
        ({"offset": "one"}, r"offset='one': must be a finite number >= 0"),
        ({"backend": "compiled"}, r'backend=\'compiled\': must be one of "auto", "reference", "triton"'),
        ({"q": Q[0]}, r"q float32 \[2, 9, 16\]: must be a floating-point \[batch, heads, seq, head_dim\]"),
    ],
)
def test_bad_norms(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"q": Q, "rotation": ROTATION, "q_weight": torch.ones(16), **change}
    with pytest.raises(ValueError, match=message):
        norm_rotate(**arguments)


def test_table_widths() -> None:
    """A table as wide as the rotary dimension is a full one; one as wide as half of it a half one; others are none."""
    cos, sin = table(ROTATION)
    full = [torch.cat((t, t), -1) for t in (cos, sin)]
    wide = torch.randn(1, 2, 9, 40)
    want = rotate_with_table(wide, None, cos, sin)
    assert torch.equal(rotate_with_table(wide, None, *full, rotary_dim=16), want)
    assert torch.equal(rotate_with_table(wide, None, cos, sin, rotary_dim=16), want)
    assert not torch.equal(rotate_with_table(wide, None, *full), want)  # taken for half a table of 32 channels
    with pytest.raises(ValueError, match=r"rotary_dim=20 with 8 frequencies: must be twice their number"):
        rotate_with_table(wide, None, cos, sin, rotary_dim=20)
    with pytest.raises(ValueError, match=r"cos on cpu, sin on meta: must be on one device"):
        rotate_with_table(wide, None, cos, sin.to("meta"))
    with pytest.raises(ValueError, match=r"cos and sin of the types list and Tensor: must be tensors"):
        rotate_with_table(wide, None, cos.tolist(), sin)


def test_packed_views_may_be_written_in_place() -> None:
    """q and k of one tensor, packed in the ways that models pack them, and apart."""
    rotation = ropex.Rotation(torch.arange(9)[None], torch.rand(8))
    packed = torch.randn(2, 9, 7, 16)
    stacked = torch.randn(2, 9, 3, 4, 16)
    by_heads = torch.randn(1, 6, 9, 16)
    for q, k, order in (
        (packed[:, :, :4], packed[:, :, 4:6], "bshd"),
        (stacked[:, :, 0], stacked[:, :, 1], "bshd"),
        (packed[:, :, :4].transpose(1, 2), packed[:, :, 4:6].transpose(1, 2), "bhsd"),
        (by_heads[:, :4], by_heads[:, 4:], "bhsd"),
        (packed[0, :, :4], packed[0, :, 4:6], "thd"),
    ):
        want = ropex.rotate(q, k, rotation, order=order, backend="reference")  # type: ignore[call-overload]
        got = ropex.rotate(q, k, rotation, order=order, inplace=True)  # type: ignore[call-overload]
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))

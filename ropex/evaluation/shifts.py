"""How far a model's predictions move when a text does, which in exact arithmetic they do not."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from ropex._checks import require_int, require_list
from ropex.evaluation.documents import as_documents
from ropex.evaluation.losses import Progress, evaluating, token_losses, vocabulary_size
from ropex.patching import Patch, find_patch, inspect, patch

__all__ = ["ShiftDeviation", "shift_deviation"]

WAYS: dict[str, dict[str, Any] | None] = {
    "transformers": None,
    "exact angles": {},
    "exact angles, float32 attention": {"precision": "float32"},
}


class ShiftDeviation(NamedTuple):
    """How far the log-probabilities of a text's tokens move when all its positions do.

    Attributes:
        way: who rotates: `transformers`, the model as it is; `exact angles`, ropex with the method `none`; and the same
            with `precision="float32"`.
        shift: in tokens.
        nll: nats per token at the shift.
        rms: root mean square of the change of a token's log-probability.
        largest: of these changes.
    """

    way: str
    shift: int
    nll: float
    rms: float
    largest: float


def shift_deviation(
    model: nn.Module,
    tokens: Tensor | Sequence[int],
    shifts: Sequence[int] = (16, 4096, 131_072),
    *,
    progress: Progress | None = None,
) -> list[ShiftDeviation]:
    """What a model's precision costs: its predictions on a text at other positions, rotated in three ways.

    Attention with rotary embeddings depends on relative positions alone, so that all that moves is rounding: of angles,
    which ropex takes away, and of rotated queries and keys, which `patch(precision="float32")` does.

    Args:
        model: a causal language model, not patched; left as it was.
        tokens: one text, int64 [n].
        shifts: by how much to move it, in tokens.
        progress: called with the fraction done, 0 to 1.

    Raises:
        ValueError: a patched model, no shift, or what the measurements raise.

    Reference: Wang et al., When Precision Meets Position: BFloat16 Breaks Down RoPE in Long-Context Training, 2024,
    arXiv:2411.13476 (which compares attention weights; `ropex.precision.probe_precision` does).
    """
    if find_patch(model) is not None:
        raise ValueError(f"{type(model).__name__} is patched: must not be, to be compared; call ropex.unpatch(model)")
    require_list("shifts", shifts, "tokens")
    if not shifts:
        raise ValueError("shifts=[]: must hold at least one number of tokens; pass such as [16, 4096]")
    for shift in shifts:
        require_int("shift", shift, minimum=1, remedy="pass by how many tokens the text shall move")
    found_documents = as_documents(tokens, vocabulary_size(model))
    if len(found_documents) > 1:
        raise ValueError(f"tokens of {len(found_documents)} documents: must be of one; pass one text's ids")
    document = found_documents[0]
    scaled = inspect(model).scaling is not None
    total = len(WAYS) * (1 + len(shifts))
    found: list[ShiftDeviation] = []
    with evaluating(model):
        for done, (way, options) in enumerate(WAYS.items()):
            with nullcontext() if options is None else _exact(model, scaled, options):
                losses = []
                for shift in (0, *shifts):
                    losses.append(token_losses(model, document.tokens, shift=shift).double())
                    if progress is not None:
                        progress((done * (1 + len(shifts)) + len(losses)) / total)
            for shift, moved in zip(shifts, losses[1:], strict=True):
                change = (moved - losses[0]).abs()
                rms = change.square().mean().sqrt().item()
                found.append(ShiftDeviation(way, shift, moved.mean().item(), rms, change.max().item()))
    return found


def _exact(model: nn.Module, scaled: bool, options: dict[str, Any]) -> Patch:
    """The model with its own frequencies, at exact angles."""
    return patch(model, on_scaled="keep", **options) if scaled else patch(model, "none", **options)

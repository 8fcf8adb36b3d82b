"""Parameter groups for an optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from ropex._checks import require_number
from ropex.patching.detect import find_patched, require_module

__all__ = ["param_groups"]


def param_groups(
    model: nn.Module, *, weight_decay: float = 0.0, schedule_lr: float | None = None
) -> list[dict[str, Any]]:
    """A model's trainable parameters for an optimizer, so that what a schedule learns does not decay.

    Args:
        weight_decay: of matrices; vectors (norms, biases) do not decay, as usual.
        schedule_lr: the learning rate of the schedule's parameters; None: the optimizer's.

    Returns:
        Groups for `torch.optim.AdamW(groups, lr=...)`; a last one for the schedule where it learns.

    Example:
        >>> optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.1), lr=2e-5)  # doctest: +SKIP
    """
    require_module(model)
    require_number("weight_decay", weight_decay, minimum=0, remedy="pass what the optimizer would get, such as 0.1")
    if schedule_lr is not None:
        require_number("schedule_lr", schedule_lr, minimum=0, strict=True, remedy="pass a learning rate, or None")
    learned = {id(p) for spot in find_patched(model) for p in spot.patched.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if id(p) not in learned and p.dim() >= 2]
    vectors = [p for p in trained if id(p) not in learned and p.dim() < 2]
    schedule: dict[str, Any] = {"params": [p for p in trained if id(p) in learned], "weight_decay": 0.0}
    if schedule_lr is not None:
        schedule["lr"] = schedule_lr
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}, schedule]
    return [group for group in groups if group["params"]]

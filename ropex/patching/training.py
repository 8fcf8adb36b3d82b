"""What a training script needs: parameter groups, and a callback for transformers' Trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ropex.patching import files
from ropex.patching.detect import Spot, find_active

__all__ = ["RopexCallback"]

_log = logging.getLogger("ropex")


class RopexCallback(TrainerCallback, ExportableState):
    """Keeps watch over a patch in a run of transformers' Trainer, or of one that is made from it.

    At the start it checks that the patch is in effect, that no sample is longer than what the patch reaches, and that
    what the method learns is trained and not decayed. It logs what the patch does, and does what `Patch.save` does in
    each checkpoint and at the end in the output directory, for `ropex.load`. A run that goes on from a checkpoint goes
    on with its draws, also where a checkpoint holds no more than an adapter.

    Args:
        max_length: tokens of the longest sample. None: what the arguments of the run say (`max_length`,
            `max_seq_length`), or else the longest `input_ids` of the data set.

    Raises:
        ValueError: at the start of a run that would not do what it should.

    Example:
        >>> Trainer(model, args, callbacks=[ropex.RopexCallback()], ...)  # doctest: +SKIP
    """

    def __init__(self, max_length: int | None = None) -> None:
        self.max_length = max_length
        self._spots: list[Spot] = []

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps in `trainer_state.json`: the next step of what the schedule draws."""
        steps = [int(step) for step in self._steps()]
        return {"args": {"max_length": self.max_length}, "attributes": {"steps": steps}}

    def _steps(self) -> list[Tensor]:
        ropes = (rope for spot in self._spots for rope in spot.patched.ropes.values())
        return [rope.step for rope in ropes if rope.schedule.augments]  # type: ignore[union-attr,misc]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        spots = _require_patched(model)
        patched, self._spots = spots[0].patched, spots
        for spot in spots:
            spot.patched.check()
        kept = (getattr(state, "stateful_callbacks", None) or {}).get(type(self).__name__, {})
        kept = kept[0] if isinstance(kept, list) else kept
        if getattr(state, "global_step", 0):
            for step, value in zip(self._steps(), kept.get("attributes", {}).get("steps", []), strict=False):
                step.fill_(value)
        reach = patched.target
        longest = self._longest(args, kwargs.get("train_dataloader"))
        if longest is not None and longest > reach:
            raise ValueError(
                f"samples of up to {longest} tokens with {patched.rope.schedule!r}, which reaches {reach}: must fit; "
                "patch with a larger factor or length, or cut the samples"
            )
        if patched.rope.schedule.learned:
            _require_trained(spots, kwargs.get("optimizer"))
        _log.info("%r reaches %d tokens; longest sample: %s", patched.rope.schedule, reach, longest or "unknown")

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            _require_patched(model)
            files.save(model, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            _require_patched(model)
            files.save(model, args.output_dir)

    def _longest(self, args: Any, loader: Any) -> int | None:
        stated = (self.max_length, getattr(args, "max_length", None), getattr(args, "max_seq_length", None))
        if (known := next((length for length in stated if length is not None), None)) is not None:
            return int(known)
        dataset = getattr(loader, "dataset", None)
        if dataset is None or not hasattr(dataset, "__len__"):
            return None  # a stream, which only its end would tell
        samples = (dataset[index] for index in range(len(dataset)))  # which need not end by itself
        return max((len(sample["input_ids"]) for sample in samples if "input_ids" in sample), default=None)


def _require_patched(model: nn.Module) -> list[Spot]:
    if spots := find_active(model):
        return spots
    raise ValueError(
        f"{type(model).__name__} is not patched: the run would train the model as it was; call ropex.patch(model, ...) "
        "before the Trainer is made"
    )


def _require_trained(spots: list[Spot], optimizer: Any) -> None:
    """Raise unless what a schedule learns is in the optimizer, and does not decay."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    for spot in spots:
        for name, parameter in spot.patched.named_parameters():
            full = f"{spot.path}.{name}"
            if not parameter.requires_grad:
                raise ValueError(
                    f"{full} does not require a gradient, so the schedule would learn nothing: must be trained; with "
                    'PEFT pass modules_to_save=["rotary_emb"]'
                )
            groups = [] if optimizer is None else optimizer.param_groups
            group = next((g for g in groups if any(p is parameter for p in g["params"])), None)
            if optimizer is not None and group is None:
                raise ValueError(f"{full} is not in the optimizer; make it with ropex.param_groups(model)")
            if group is not None and group.get("weight_decay"):
                raise ValueError(
                    f"{full} has weight_decay={group['weight_decay']}, which pulls the schedule back to where it "
                    "began; pass optimizers=(torch.optim.AdamW(ropex.param_groups(model, weight_decay=...)), None)"
                )

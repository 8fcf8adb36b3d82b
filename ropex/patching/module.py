"""The module that stands in a patched model where a rotary embedding stood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ropex.kernels import Angles, table
from ropex.patching.config import UnsupportedModelError
from ropex.patching.probe import probe_positions, tables_match
from ropex.patching.tables import TableLayout
from ropex.rotary import RotaryEmbedding

__all__ = ["PatchedRotary"]


class PatchedRotary(nn.Module):
    """Makes the cos and sin that the layers of a model share: float32, one value per pair.

    It keeps what it replaced, so that a copied or unpickled model can still be unpatched. (Its name must not contain
    that of transformers' own class: `from_pretrained` refills modules by name.)

    Args:
        ropes: the embeddings, by name.
        tables: for each layer type (None: all) the names of those whose tables its layers get, in order.
        turning: for an embedding in which some pairs stand still in the model itself, which ones turn, [half].
        original: what it replaces.
        layout: of the tables that `original` makes.
        axes: of multi-axis positions, the axis that each pair follows; None: positions have one axis.
        angles: `exact`, or `float32` as transformers computes them.
    """

    original: nn.Module

    def __init__(
        self,
        ropes: Mapping[str, RotaryEmbedding],
        tables: Mapping[str | None, tuple[str, ...]],
        turning: Mapping[str, tuple[bool, ...]],
        original: nn.Module,
        *,
        layout: TableLayout,
        axes: tuple[int, ...] | None,
        angles: Angles,
    ) -> None:
        super().__init__()
        self.ropes = nn.ModuleDict(ropes)
        self.tables = dict(tables)
        self.turning = dict(turning)
        self.layout = layout
        self.axes = axes
        self.angles = angles
        # Object, attribute, whether it was there, its value before and after; and configs before the model owned them.
        self.changes: list[tuple[Any, str, bool, Any, Any]] = []
        self.shared_configs: list[tuple[nn.Module, str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.scaling: str | None = None
        self.written: str | None = None
        self.unchanged = False
        self.target = 0
        self.stated_length: int | None = None
        self.softmax_factor = 1.0
        self.outgrown = "error"
        self.generating: Any = None
        self.reentrant = False
        object.__setattr__(self, "original", original)  # not a submodule: nothing may find or save it

    @property
    def rope(self) -> RotaryEmbedding:
        """The embedding that follows the patch's schedule; where layer types differ, the first."""
        name = next((name for name in self.ropes if not name.endswith("kept")), next(iter(self.ropes)))
        return cast(RotaryEmbedding, self.ropes[name])

    def __getattr__(self, name: str) -> Any:
        """What model code reads of its rotary module besides tables, such as its config or sections, as it was."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "original" not in self.__dict__:
                raise
            return getattr(self.original, name)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """Cos and sin, each [1 or batch, seq, half], for hidden states x and positions [1 or batch, seq].

        Where a layer must choose, they are stacked, [tables, 1 or batch, seq, half]; for models that hand around one
        complex tensor, cos and sin are stacked in front of that.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        position_ids = position_ids.to(x.device)
        names = self.tables.get(layer_type) or self.tables[None]
        made = [self._table(name, x, position_ids, dtype) for name in names]
        cos, sin = made[0] if len(made) == 1 else (torch.stack(each) for each in zip(*made, strict=True))
        if self.reentrant and cos.requires_grad and x.requires_grad:
            cos, sin = _tapped(x, cos, sin)
        return torch.stack((cos, sin)) if self.layout == "complex" else (cos, sin)

    def pin_length(self, length: int | None, rows: Tensor | None = None) -> None:
        """Pin the length of every embedding, see `RotaryEmbedding.pin_length`."""
        for rope in self.ropes.values():
            cast(RotaryEmbedding, rope).pin_length(length, rows)

    def check(self) -> None:
        """Raise unless each embedding makes the cos and sin of its schedule, computed in another way."""
        training = self.training
        self.eval()
        for name, rope in self.ropes.items():
            rope = cast(RotaryEmbedding, rope)
            device = rope.inv_freq.device
            if device.type == "meta":
                break
            with torch.no_grad(), torch.device("cpu"):
                positions = probe_positions(rope.geometry.trained_length).to(device)
                x = torch.zeros((), dtype=torch.float32, device=device)
                mask = torch.tensor(self.turning[name], device=device) if name in self.turning else None
                made = self._table(name, x, positions, torch.float32)
                float32 = self.angles == "float32"
                same = tables_match(made, positions, rope.geometry, rope.schedule, mask, float32_angles=float32)
            if not same:
                raise UnsupportedModelError(
                    f"the patched cos and sin are not those of {rope.schedule!r}; please report this with the model's "
                    "config"
                )
        self.train(training)

    def _table(self, name: str, x: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rope = cast(RotaryEmbedding, self.ropes[name])
        axes = positions if positions.dim() == 3 and self.axes is not None else None
        length = None
        if axes is not None:  # one context, whose length all axes make
            positions, length = axes[0], axes.to(torch.int64).amax(dim=(0, 2)) + 1
        if self.training and rope.schedule.augments:  # what is drawn is drawn for each sample
            positions = positions.expand(x.shape[0], -1)
        rotation = rope(positions, length)
        if name in self.turning:
            mask = torch.tensor(self.turning[name], device=x.device)
            rotation = rotation._replace(inv_freq=rotation.inv_freq * mask)
        if axes is None or self.axes is None:
            return table(rotation, angles=self.angles, dtype=dtype)
        moved = rotation.positions - positions  # what draws moves all axes alike
        followed = [rotation._replace(positions=each + moved) for each in axes[: max(self.axes) + 1]]
        tables = zip(*(table(each, angles=self.angles, dtype=dtype) for each in followed), strict=True)
        cos, sin = (torch.stack(each) for each in tables)
        index = torch.tensor(self.axes, device=x.device).expand(1, *cos.shape[1:])
        return cos.gather(0, index)[0], sin.gather(0, index)[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PatchedRotary:
        was_meta = self.rope.inv_freq.is_meta
        super()._apply(fn, recurse)
        self.original._apply(fn, recurse)  # so that unpatching gives what an unpatched model would have become
        if was_meta and not self.rope.schedule.learned:  # what is learned is loaded after this
            self.check()
        return self


def _tapped(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Leaves in the place of cos and sin, whose gradients go on once, when x has its own.

    Reentrant checkpointing runs a backward pass for each layer, and each would run through the graph behind cos and
    sin, which the first one frees. All layers come after x, so that x has its gradient when they are done.
    """
    leaves = [each.detach().requires_grad_() for each in (cos, sin)]

    def go_on(grad: Tensor) -> None:
        reached = [(each, leaf.grad) for each, leaf in zip((cos, sin), leaves, strict=True) if leaf.grad is not None]
        if reached:
            torch.autograd.backward([each for each, _ in reached], [gradient for _, gradient in reached])

    x.register_hook(go_on)
    return leaves[0], leaves[1]

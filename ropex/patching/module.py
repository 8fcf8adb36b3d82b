"""The module that stands in a patched model where its rotary embedding stood."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ropex.kernels import Angles, table
from ropex.kernels.reference import full_table
from ropex.patching.tables import Pairing
from ropex.rotary import RotaryEmbedding

__all__ = ["PatchedRotary", "mark_cache", "require_evaluation", "require_one_length"]


class PatchedRotary(nn.Module):
    """Makes the cos and sin that all layers of a model share, in the model's own layout but in float32.

    It keeps what it replaced, so that a copied or unpickled model can still be unpatched. (Its name must not contain
    that of transformers' own class: `from_pretrained` refills modules by name.)
    """

    original: nn.Module

    def __init__(
        self,
        rope: RotaryEmbedding,
        original: nn.Module,
        *,
        pairing: Pairing,
        angles: Angles,
    ) -> None:
        super().__init__()
        self.rope = rope
        self.pairing = pairing
        self.angles = angles
        self.hooks: list[RemovableHandle] = []
        self.max_position_embeddings: int = original.config.max_position_embeddings  # type: ignore[union-attr,assignment]
        object.__setattr__(self, "original", original)  # not a submodule: nothing may find or save it

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin, [batch, seq, rotary_dim], for the hidden states x and positions [1 or batch, seq]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.training and self.rope.schedule.augments:  # what is drawn is drawn for each sample
            position_ids = position_ids.expand(x.shape[0], -1)
        cos, sin = table(self.rope(position_ids), angles=self.angles, dtype=dtype)
        return full_table(cos, self.pairing.table), full_table(sin, self.pairing.table)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PatchedRotary:
        super()._apply(fn, recurse)
        self.original._apply(fn, recurse)  # so that unpatching gives what an unpatched model would have become
        return self


def require_evaluation(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: refuse to go on from a cache while a schedule draws.

    Raises:
        ValueError: the model is in training mode, and its cache not empty: each pass would draw anew.
    """
    rope = _patched_in(module).rope
    cache = _find_cache((kwargs.get("past_key_values"), *args))
    seen = cache.get_seq_length() if cache is not None else 0
    if rope.training and (not isinstance(seen, int) or seen > 0):  # a used static cache gives a tensor
        raise ValueError(
            f"cache with tokens in training mode with {rope.schedule!r}: each pass draws its own positions or "
            "frequencies, which do not fit those of the cache; call model.eval() before generating, or pass "
            "use_cache=False"
        )


def require_one_length(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: refuse a pass whose frequencies would differ from those of the keys in its cache.

    It looks at shapes and at the cache's own count only, never at a tensor's values. A static cache counts in a tensor:
    that it outgrows the pin is not seen.

    Raises:
        ValueError: a length-dependent schedule meets a non-empty cache without a pinned length, or one that was filled
            under another pin, or the context outgrows the pin.
    """
    rope = _patched_in(module).rope
    pinned = rope.pinned_length
    cache = _find_cache((kwargs.get("past_key_values"), *args))
    seen = cache.get_seq_length() if cache is not None else 0
    filled = getattr(cache, "ropex_pinned_length", None)
    counted = isinstance(seen, int)  # an unused static cache says 0, a used one gives a tensor
    if cache is not None and counted and seen == 0:
        cache.ropex_pinned_length = pinned
    elif cache is not None and (pinned is None or filled != pinned):
        raise ValueError(
            f"cache with {seen if counted else 'its'} tokens filled under pin_length({filled}), now "
            f"pin_length({pinned}), with {rope.schedule!r}: its keys were rotated for another context length than this "
            "pass would be; pin one length before the cache is filled and keep it, as in "
            "`with patch.pin_length(prompt + new tokens):`, or pass use_cache=False"
        )
    inputs = next((x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if x is not None), None)
    if pinned is not None and counted and isinstance(inputs, Tensor) and seen + inputs.shape[1] > pinned:
        raise ValueError(
            f"context of {seen + inputs.shape[1]} tokens under pin_length({pinned}): must not outgrow the pinned "
            "length; pin the tokens of the prompt plus those to be generated, and start from an empty cache"
        )


def mark_cache(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook: note on the cache that a pass filled under which pinned length it did."""
    cache = _find_cache(output.values() if isinstance(output, dict) else output)
    if cache is not None:
        cache.ropex_pinned_length = _patched_in(module).rope.pinned_length


def _patched_in(module: nn.Module) -> PatchedRotary:
    return next(child for child in module.children() if isinstance(child, PatchedRotary))


def _find_cache(values: Iterable[Any]) -> Any:
    return next((value for value in values if hasattr(value, "get_seq_length")), None)

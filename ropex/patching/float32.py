"""Attention in float32 whatever the model's dtype, through the model's own attention interface."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["interfaces"]


def interfaces(modeling: Any) -> dict[str, Any]:
    """The globals by which a modeling file's attentions attend, so wrapped that they compute in float32."""
    wrapped: dict[str, Any] = {"ALL_ATTENTION_FUNCTIONS": _Float32Functions(modeling.ALL_ATTENTION_FUNCTIONS)}
    if hasattr(modeling, "eager_attention_forward"):
        wrapped["eager_attention_forward"] = in_float32(modeling.eager_attention_forward)
    return wrapped


class _Float32Functions:
    """transformers' registry of attention functions, each made to compute in float32."""

    def __init__(self, functions: Any) -> None:
        self.functions = functions

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return in_float32(self.functions[self._known(name)])

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        if name is None or name == "eager":  # the default is the modeling file's own, which is wrapped already
            return default
        return in_float32(self.functions.get_interface(self._known(name), default))

    @staticmethod
    def _known(name: str) -> str:
        if "flash" in name:
            raise ValueError(
                f'attn_implementation="{name}" with precision="float32": flash attention computes in 16 bits; call '
                'model.set_attn_implementation("sdpa"), or patch with precision="model"'
            )
        return name


@functools.lru_cache(maxsize=256)
def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function over float32 queries, keys and values, whose output is of the model's dtype."""

    @functools.wraps(function)
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(attention_mask, Tensor) and attention_mask.is_floating_point():
            # What hides a token is the lowest number of the mask's dtype; float32 has lower ones, so it still hides.
            attention_mask = attention_mask.float()
        with torch.autocast(query.device.type, enabled=False):
            out, weights = function(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
        return out.to(_dtype(module, value)), weights

    return attend


def _dtype(module: nn.Module, value: Tensor) -> torch.dtype:
    """The model's dtype: that of its weights, since values that were in a cache beside float32 keys are float32."""
    floating = (p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    return next(floating, value.dtype)

"""What a Hugging Face config says about its rotary embedding, read by attributes, of transformers 4 and 5 alike."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

__all__ = ["UnsupportedModelError", "own_configs", "pretraining_length", "rope_parameters", "scaling_type", "unscaled"]


_NOT_SCALING = ("rope_theta", "partial_rotary_factor")


class UnsupportedModelError(ValueError):
    """The model does not rotate in a way that ropex knows; nothing was changed."""


def rope_parameters(config: Any) -> dict[str, Any]:
    """The config's rotary parameters as one flat dict with `rope_type` and `rope_theta`.

    transformers 5 keeps them in `rope_parameters`; 4 in `rope_theta` and the optional `rope_scaling`.
    """
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        parameters = dict(getattr(config, "rope_scaling", None) or {})
        parameters.setdefault("rope_theta", getattr(config, "rope_theta", None))
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModelError(
            f"{type(config).__name__} has rotary parameters per layer type ({', '.join(parameters)}): "
            "only models with one rotary geometry are supported"
        )
    theta = parameters.get("rope_theta")
    if theta is None:
        raise UnsupportedModelError(f"{type(config).__name__} states no rope_theta; set it in config.rope_parameters")
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    return {**parameters, "rope_type": rope_type, "rope_theta": float(theta)}


def scaling_type(config: Any) -> str | None:
    """The type of scaling that the config carries, or None."""
    rope_type = rope_parameters(config)["rope_type"]
    return None if rope_type == "default" else rope_type


def pretraining_length(config: Any) -> int | None:
    """The context length of pretraining, in tokens; None where the config does not tell.

    With `linear` it does not: transformers documents that max_position_embeddings stays, and many configs raise it.
    """
    parameters = rope_parameters(config)
    if parameters["rope_type"] in ("default", "dynamic"):  # dynamic extends what max_position_embeddings says
        return int(config.max_position_embeddings)
    stated = parameters.get("original_max_position_embeddings")
    length = stated or getattr(config, "original_max_position_embeddings", None)
    return int(length) if length is not None else None


def unscaled(config: Any) -> Any:
    """A copy of the config without its scaling."""
    config = copy.deepcopy(config)
    if getattr(config, "rope_parameters", None) is not None:
        kept = {name: value for name, value in config.rope_parameters.items() if name in _NOT_SCALING}
        config.rope_parameters = {**kept, "rope_type": "default"}
    else:
        config.rope_scaling = None
    return config


def own_configs(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """A copy of each config in the model, for every part of the model that refers to it.

    Models built from one config object share it, and a patch of one must not show in the other.
    """
    memo: dict[int, Any] = {}  # keeps one copy of each, nested ones too
    configs = ((module, module.__dict__.get("config")) for module in model.modules())
    return [(module, copy.deepcopy(config, memo)) for module, config in configs if hasattr(config, "to_dict")]

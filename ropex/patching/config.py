"""What a Hugging Face config says about its rotary embedding, read by attributes, of transformers 4 and 5 alike."""

from __future__ import annotations

import copy
import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from torch import nn

__all__ = [
    "ALONE",
    "UnsupportedModelError",
    "layer_types",
    "own_configs",
    "pretraining_length",
    "rope_parameters",
    "scaling_type",
    "silently",
    "stated_length",
    "text_config",
    "unscaled",
    "with_attributes",
    "with_parameters",
    "words_beside",
]


_SCALING = {
    "type",
    "rope_type",
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "truncate",
    "mscale",
    "mscale_all_dim",
}
_SCALING |= {"short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_SCALING |= {"short_mscale", "long_mscale", "alpha", "finetuned", "attn_factor"}
_PLACES = {"rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}  # which channels turn, by what
_PLAIN = ("default", "proportional", "mrope")  # some pairs may stand still or follow another axis; none is scaled


class UnsupportedModelError(ValueError):
    """The model does not rotate in a way that ropex knows; nothing was changed."""


@functools.cache
def _transformers_is_5() -> bool:
    return int(version("transformers").partition(".")[0]) >= 5


def _words_of_5(config: Any) -> Any:
    """A config's `rope_parameters`; None in transformers 4, whose configs may carry them, too, and do not read them."""
    return getattr(config, "rope_parameters", None) if _transformers_is_5() else None


def text_config(config: Any) -> Any:
    """The part of a config that describes the text model: itself, unless it is made of several."""
    get = getattr(config, "get_text_config", None)
    return config if get is None else get()


def rope_parameters(config: Any, layer_type: str | None = None) -> dict[str, Any]:
    """The config's rotary parameters as one flat dict with `rope_type` and `rope_theta`.

    transformers 5 keeps them in `rope_parameters`, where layers differ one dict per layer type; 4 in `rope_theta` and
    the optional `rope_scaling`.
    """
    name = type(config).__name__
    parameters = _words_of_5(config)
    if parameters is None:
        parameters = dict(getattr(config, "rope_scaling", None) or {})
        parameters.setdefault("rope_theta", getattr(config, "rope_theta", None))
    elif layer_type is not None and layer_type in parameters:
        parameters = parameters[layer_type]
        if parameters is None:
            raise UnsupportedModelError(f"{name} has no rotary parameters for its layers of the type {layer_type}")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModelError(
            f"{name} has rotary parameters per layer type ({', '.join(parameters)}) but its rotary module is not told "
            "the type: must have one set of parameters"
        )
    theta = parameters.get("rope_theta")
    if theta is None:
        raise UnsupportedModelError(f"{name} states no rope_theta; set it in config.rope_parameters")
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    return {**parameters, "rope_type": rope_type, "rope_theta": float(theta)}


def layer_types(config: Any) -> list[str]:
    """The layer types that have rotary parameters of their own."""
    return [name for name, value in (_words_of_5(config) or {}).items() if isinstance(value, dict)]


def scaling_type(config: Any, layer_type: str | None = None) -> str | None:
    """The type of scaling that the config carries, or None."""
    parameters = rope_parameters(config, layer_type)
    kind = parameters["rope_type"]
    scales = kind == "proportional" and parameters.get("factor") not in (None, 1)  # the others ignore a factor
    return None if kind in _PLAIN and not scales else kind


def pretraining_length(config: Any, layer_type: str | None = None) -> int | None:
    """The context length of pretraining, in tokens; None where the config does not tell.

    With `linear` it does not: transformers documents that max_position_embeddings stays, and many configs raise it.
    Nor with a fixed `alpha`. What ropex notes in the config of a model that it patched says it, too, also where no
    scaling could be written.
    """
    if (stated := stated_length(config, layer_type)) is not None:
        return stated
    if layer_type is not None and scaling_type(config, layer_type) is None:  # layers are trained together
        others = [each for each in layer_types(config) if scaling_type(config, each) is not None]
        if others:
            return pretraining_length(config, others[0])
    scaling = scaling_type(config, layer_type)
    # dynamic extends what max_position_embeddings says
    says = scaling is None or (scaling == "dynamic" and not rope_parameters(config, layer_type).get("alpha"))
    return int(config.max_position_embeddings) if says else None


def stated_length(config: Any, layer_type: str | None = None) -> int | None:
    """The context length of pretraining where the config has a word for it, and not only max_position_embeddings."""
    if (noted := getattr(config, "ropex", None)) is not None:
        length = noted["trained_length"]
    elif (chunks := getattr(config, "dual_chunk_attention_config", None)) is not None:
        length = chunks.get("original_max_position_embeddings")
    elif scaling_type(config, layer_type) in (None, "dynamic"):  # which transformers counts from the maximum
        length = None
    else:
        stated = rope_parameters(config, layer_type).get("original_max_position_embeddings")
        length = stated or getattr(config, "original_max_position_embeddings", None)
    return int(length) if length is not None else None


def unscaled(config: Any, layer_type: str | None = None) -> Any:
    """A copy of the config without its scaling."""
    config = copy.deepcopy(config)
    parameters = _words_of_5(config)
    if parameters is None:
        config.rope_scaling = None
        return config
    nested = layer_type is not None and isinstance(parameters.get(layer_type), dict)
    before = parameters[layer_type] if nested else parameters
    plain = {**words_beside(before), "rope_type": "default"}
    config.rope_parameters = {**parameters, layer_type: plain} if nested else plain
    return config


def with_parameters(
    config: Any, parameters: dict[str, Any], layer_type: str | None, trained_length: int, *, widened: bool = False
) -> dict[str, Any]:
    """The attributes, with their values, by which a config of this version of transformers says these parameters.

    What is not scaling stays. Some configs state the pretraining length outside of the parameters, too.

    Args:
        widened: the parameters are those of the scaling that the config carries, with another factor: its other words
            stay, such as `mscale_all_dim`, which attentions read.
    """
    stated = {"original_max_position_embeddings": trained_length}
    outside = stated if hasattr(config, "original_max_position_embeddings") else {}
    before = _words_of_5(config)
    if before is None:
        legacy = {key: value for key, value in parameters.items() if key != "rope_theta"}
        if widened:
            legacy = {**(getattr(config, "rope_scaling", None) or {}), **legacy}
        return {"rope_scaling": None if legacy["rope_type"] == "default" else legacy, **outside}
    nested = layer_type is not None and isinstance(before.get(layer_type), dict)
    flat = before[layer_type] if nested else before
    flat = {**words_beside(flat, widened=widened), **parameters}
    return {"rope_parameters": {**before, layer_type: flat} if nested else flat, **outside}


def with_attributes(config: Any, attributes: dict[str, Any]) -> Any:
    """A copy of the config with other attributes."""
    config = copy.deepcopy(config)
    for key, value in attributes.items():
        setattr(config, key, value)
    return config


def words_beside(parameters: dict[str, Any], *, widened: bool = False) -> dict[str, Any]:
    """What rotary parameters say beside the scaling, with the pretraining length where a word may count from it.

    So does the temperature by position of Ministral 3, Mistral 4 and their kin, in every forward.

    Args:
        widened: the scaling stays, with another factor, and so do all its words.
    """
    if widened:
        return parameters
    beside = {key: value for key, value in parameters.items() if key not in _SCALING}
    length = parameters.get("original_max_position_embeddings")
    counting = length is not None and not set(beside) <= _PLACES
    return {**beside, "original_max_position_embeddings": length} if counting else beside


ALONE = threading.RLock()  # held by a thread while it changes what is one for the process


@contextmanager
def silently() -> Iterator[None]:
    """While this lasts, transformers logs errors alone: what it says of a config that is tried is not for the user."""
    logger = logging.getLogger("transformers")
    with ALONE:
        before = logger.level
        try:
            logger.setLevel(logging.ERROR)
            yield
        finally:
            logger.setLevel(before)


def own_configs(model: nn.Module) -> list[tuple[nn.Module, str, Any, Any]]:
    """Each config in the model and a copy of it, for every part of the model that refers to it by this attribute.

    Models built from one config object share it, and a patch of one must not show in the other.
    """
    memo: dict[int, Any] = {}  # keeps one copy of each, nested ones too
    names = ("config", "generation_config")
    configs = ((module, name, module.__dict__.get(name)) for module in model.modules() for name in names)
    return [
        (module, name, each, copy.deepcopy(each, memo)) for module, name, each in configs if hasattr(each, "to_dict")
    ]

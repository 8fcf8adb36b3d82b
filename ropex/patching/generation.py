"""One length per generation: what a cache and a length-dependent schedule need of each other."""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ropex.patching.module import PatchedRotary
from ropex.patching.swap import generated_class, shared_class

__all__ = [
    "Owned",
    "cache_argument",
    "cache_of",
    "can_own",
    "drop_hooks",
    "mark_cache",
    "note_reentrant",
    "owned_class",
    "require_evaluation",
    "require_growing_cache",
    "require_one_length",
]

_log = logging.getLogger("ropex")

# transformers 5.24 renamed it, in what a forward takes and in what it gives.
CACHE_NAMES = ("cache", "past_key_values")


# --- hooks on the module that runs the layers -------------------------------------------------------------------------


def require_evaluation(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: refuse to go on from a cache while a schedule draws.

    Raises:
        ValueError: the model is in training mode, and its cache not empty: each pass would draw anew.
    """
    rope = patched_in(module)[0].rope
    cache = _cache_given(args, kwargs)
    if rope.training and _tokens_in(cache) != 0:
        raise ValueError(
            f"cache with tokens in training mode with {rope.schedule!r}: each pass draws its own positions or "
            "frequencies, which do not fit those of the cache; call model.eval() before generating, or pass "
            "use_cache=False"
        )


def require_one_length(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: refuse a pass whose frequencies would differ from those of the keys in its cache.

    It looks at shapes and counts only, never at a tensor's values. What a compiled pass puts in a static cache, which
    counts in a tensor, is not counted.

    Raises:
        ValueError: a length-dependent schedule meets a non-empty cache without a pinned length, or one that was filled
            under another pin, or the context outgrows the pin.
    """
    rope = patched_in(module)[0].rope
    pinned = rope.pinned_length
    cache = _cache_given(args, kwargs)
    seen = _tokens_in(cache)
    filled = getattr(cache, "ropex_pinned_length", None)
    if cache is not None and seen == 0:
        cache.ropex_pinned_length = pinned
    elif cache is not None and (pinned is None or filled != pinned):
        raise ValueError(
            f"cache with {'its' if seen is None else seen} tokens filled under pin_length({filled}), now "
            f"pin_length({pinned}), with {rope.schedule!r}: its keys were rotated for another context length than this "
            "pass would be; pin one length before the cache is filled and keep it, as in "
            "`with patch.pin_length(prompt + new tokens):` (generate pins its own where none is), or pass "
            "use_cache=False"
        )
    tokens = _tokens_given(args, kwargs)
    if pinned is not None and seen is not None and tokens is not None and seen + tokens > pinned:
        raise ValueError(
            f"context of {seen + tokens} tokens under pin_length({pinned}): must not outgrow the pinned length; pin "
            "the tokens of the prompt plus those to be generated and start from an empty cache, or let generate do "
            'that: without a pin it pins by itself, and under pin_length(n, outgrown="reprefill") it begins anew with '
            "a longer one"
        )


def require_growing_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: refuse a static cache beside float32 keys, since it holds keys and values of one dtype.

    Raises:
        ValueError: the cache is static.
    """
    cache = _cache_given(args, kwargs)
    if any("Static" in type(layer).__name__ for layer in getattr(cache, "layers", ())):
        raise ValueError(
            'static cache with precision="float32": it is allocated in one dtype, and keys are float32 where values '
            'are not; use the default cache, or patch with precision="model"'
        )


def mark_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook: note on the cache under which pinned length a pass filled it, and how many tokens it holds."""
    cache = cache_of(output)
    if cache is not None:
        cache.ropex_pinned_length = patched_in(module)[0].rope.pinned_length
        if not torch.compiler.is_compiling():
            cache.ropex_tokens = getattr(cache, "ropex_tokens", 0) + (_tokens_given(args, kwargs) or 0)
            if hasattr(type(cache), "reset"):
                cache.reset = _Reset(cache)


class _Reset:
    """Empties a static cache, which transformers uses again, and what is noted on it; it does not keep it alive."""

    def __init__(self, cache: Any) -> None:
        self._cache = weakref.ref(cache)

    def __call__(self) -> None:
        cache: Any = self._cache()
        type(cache).reset(cache)
        cache.ropex_tokens = 0

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of the cache gets one of its own
        return _Reset, (self._cache(),)


def note_reentrant(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: whether layers are checkpointed the reentrant way, which learned frequencies must know."""
    functions = [
        getattr(child, "_gradient_checkpointing_func", None)
        for child in module.modules()
        if getattr(child, "gradient_checkpointing", False)
    ]
    reentrant = any(getattr(each, "keywords", {}).get("use_reentrant", False) for each in functions)
    for patched in patched_in(module):
        patched.reentrant = reentrant and module.training


def drop_hooks(module: nn.Module) -> None:
    """Take the hooks of a patch from a module."""
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        hooks, given_kwargs = getattr(module, kind), getattr(module, f"{kind}_with_kwargs")
        for key, hook in list(hooks.items()):
            if getattr(getattr(hook, "func", hook), "__module__", "").startswith("ropex.patching."):
                given_kwargs.pop(key, None)  # first, so that an interrupt leaves what is found again
                hooks.pop(key, None)


def patched_in(module: nn.Module) -> list[PatchedRotary]:
    """The patch's modules in a model; all hold the same schedule, or copies, under the same pin."""
    return [child for child in module.modules() if isinstance(child, PatchedRotary)]


def cache_of(output: Any) -> Any:
    """The cache in a model's output, or None."""
    return _find_cache(output.values() if isinstance(output, dict) else output)


def cache_argument(model: nn.Module) -> str:
    """By which name a model's forward takes a cache."""
    new, old = CACHE_NAMES
    return new if new in inspect.signature(model.forward).parameters else old


def _cache_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _find_cache((*(kwargs.get(name) for name in CACHE_NAMES), *args))


def _find_cache(values: Iterable[Any]) -> Any:
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def _tokens_in(cache: Any) -> int | None:
    """The tokens in a cache; None where only a tensor knows."""
    seen = cache.get_seq_length() if cache is not None else 0
    return seen if isinstance(seen, int) else getattr(cache, "ropex_tokens", None)


def _tokens_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    inputs = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
    return next((x.shape[1] for x in inputs if isinstance(x, Tensor)), None)


# What is not carried from one stretch of a generation to the next.
_BEYOND = ("streamer", "return_dict_in_generate", *CACHE_NAMES, "assistant_model", "inputs_embeds")


# --- the model itself -------------------------------------------------------------------------------------------------


class Owned:
    """Marks the generated class of a patched model: its `generate` pins the length of each generation by itself, and
    its `save_pretrained` says what the config cannot."""

    ropex_made_from: type[Any]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, (self.ropex_made_from,), self.__dict__.copy()


def _new(base: Any) -> Any:
    return object.__new__(owned_class(base))


def can_own(module: nn.Module) -> bool:
    """Whether it is a model of transformers, and not one that wraps another."""
    return all(hasattr(type(module), name) for name in ("save_pretrained", "config_class"))


@shared_class
def owned_class(base: Any) -> type[Any]:
    """The subclass of a model's class that pins prompt plus new tokens while it generates, and saves what is true."""

    @functools.wraps(base.save_pretrained)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched = patched_in(self)
        if not patched or patched[0].written is not None:
            return base.save_pretrained(self, *args, **kwargs)
        with _as_unpatched(patched[0]) as length:
            _log.warning(
                "no config can say %r: plain transformers will load this checkpoint without it, at the model's own "
                "%d tokens; call Patch.save on the same directory and load it with ropex.load, or use ropex export",
                patched[0].rope.schedule,
                length,
            )
            return base.save_pretrained(self, *args, **kwargs)

    own = {"save_pretrained": save_pretrained, "ropex_made_from": base}
    if not hasattr(base, "_prepare_generated_length"):  # a part that does not generate by itself
        return generated_class(base, Owned, own)

    @functools.wraps(base.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched = patched_in(self)
        # The part that runs the layers may have been unpatched alone.
        if not patched or not patched[0].rope.schedule.length_dependent:
            return base.generate(self, *args, **kwargs)
        if patched[0].rope.pinned_length is None:
            with _generating(patched, {"mask": kwargs.get("attention_mask")}):
                return base.generate(self, *args, **kwargs)
        if patched[0].outgrown == "reprefill":
            return _generate_in_stretches(functools.partial(base.generate, self), patched, args, kwargs)
        return base.generate(self, *args, **kwargs)

    @functools.wraps(base._prepare_generated_length)
    def prepare(self: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        config = base._prepare_generated_length(self, generation_config, *args, **kwargs)
        patched = patched_in(self)
        if patched and (run := patched[0].generating) is not None:
            names = ("has_default_max_length", "has_default_min_length", "model_input_name", "input_ids_length")
            given = dict(zip((*names, "inputs_tensor"), args, strict=False)) | kwargs
            _note_length(patched, run, config, given)
        return config

    return generated_class(base, Owned, {**own, "generate": generate, "_prepare_generated_length": prepare})


@contextmanager
def _as_unpatched(patched: PatchedRotary) -> Iterator[int]:
    """While this lasts, the configs claim no more tokens than plain transformers would serve; gives that length."""
    claims = [change for change in patched.changes if change[1] in ("max_position_embeddings", "max_length")]
    now = [getattr(target, name) for target, name, *_ in claims]
    for target, name, _, value, _ in claims:
        setattr(target, name, value)
    try:
        yield int(patched.config.max_position_embeddings)
    finally:
        for (target, name, *_), value in zip(claims, now, strict=True):
            setattr(target, name, value)


@contextmanager
def _generating(patched: list[PatchedRotary], run: dict[str, Any]) -> Iterator[None]:
    """While this lasts, the model's own preparation of a generation says how long it will be."""
    pinned = patched[0].rope.pinned_length
    for each in patched:
        each.generating = run
    try:
        yield
    finally:
        for each in patched:
            each.generating = None
            each.pin_length(pinned)


def _note_length(patched: list[PatchedRotary], run: dict[str, Any], config: Any, given: dict[str, Any]) -> None:
    """Pin the length of a generation that begins, or end it where the pin ends."""
    total, rows, mask = config.max_length, None, run.get("mask")
    if given["model_input_name"] == "inputs_embeds":  # the limit counts token ids, and these are none
        total += given["inputs_tensor"].shape[1] - given["input_ids_length"]
    ends = [] if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).flatten().tolist()
    padded = given["model_input_name"] == "input_ids" and config.pad_token_id not in (None, *ends)
    if mask is None and padded:  # as transformers does
        mask = given["inputs_tensor"] != config.pad_token_id
    if "until" in run:
        if config.num_beams > 1:
            raise ValueError(_no_stretches(run["until"]))
        run |= {"wanted": total, "ends": ends, "pad": config.pad_token_id or 0, "mask": mask}
        config.max_length -= max(total - run["until"], 0)
        return
    if isinstance(mask, Tensor) and mask.dim() == 2:
        rows = mask.sum(dim=-1) + (total - mask.shape[1])  # padding is no context
    for each in patched:
        each.pin_length(total, rows)


def _generate_in_stretches(
    generate: Callable[..., Any], patched: list[PatchedRotary], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Generate up to the pinned length; then pin twice as much and begin anew with all tokens so far as the prompt."""
    inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    pin = patched[0].rope.pinned_length
    if pin is None or not isinstance(inputs, Tensor) or any(kwargs.get(name) for name in _BEYOND):
        raise ValueError(_no_stretches(pin))
    options = {name: value for name, value in kwargs.items() if name not in ("inputs", "input_ids", "attention_mask")}
    sequences, given, wanted = inputs, kwargs.get("attention_mask"), 0
    mask = torch.ones_like(inputs)
    active = torch.arange(inputs.shape[0], device=inputs.device)
    while True:
        run: dict[str, Any] = {"until": pin, "mask": given}
        with _generating(patched, run):
            grown = generate(sequences[active], attention_mask=given if given is None else given[active], **options)
        if wanted == 0:
            wanted = run["wanted"]
            mask = mask if run["mask"] is None else run["mask"].to(inputs.dtype)
            if (repeats := grown.shape[0] // len(active)) > 1:  # from here on each sequence is a row of its own
                sequences, mask = (each.repeat_interleave(repeats, dim=0) for each in (sequences, mask))
                active = torch.arange(len(sequences), device=inputs.device)
        new = grown.shape[1] - sequences.shape[1]
        pad = torch.full((len(sequences), new), run["pad"], dtype=sequences.dtype, device=sequences.device)
        sequences = torch.cat((sequences, pad), dim=1)
        sequences[active] = grown
        given = mask = torch.cat((mask, mask.new_ones(len(mask), new)), dim=1)
        ends = torch.tensor(run["ends"], dtype=sequences.dtype, device=sequences.device)
        active = active[~torch.isin(sequences[active][:, inputs.shape[1] :], ends).any(dim=1)]
        if sequences.shape[1] >= wanted or len(active) == 0 or sequences.shape[1] < pin:
            return sequences
        # What a call says goes before what a config says.
        options |= {"max_new_tokens": wanted - sequences.shape[1], "max_length": None, "num_return_sequences": 1}
        pin = min(2 * pin, wanted)
        for each in patched:
            each.pin_length(pin)


def _no_stretches(pin: int | None) -> str:
    return (
        f'generate under pin_length({pin}, outgrown="reprefill"): must be given token ids alone, without beams, '
        f"{', '.join(_BEYOND)}; leave them out, or pin a length that suffices"
    )

"""A model that reads a text once and is asked several things about it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ropex.evaluation.losses import last_logits_only
from ropex.patching import cache_argument, cache_of, depends_on_length, find_patch

__all__ = ["Continuation", "Reader", "encode_pair", "one_length"]


class Continuation(NamedTuple):
    """How a model goes on with given tokens after a text.

    Attributes:
        logprob: of all of them, in nats.
        greedy: they are what greedy decoding gives.
    """

    logprob: float
    greedy: bool


class Reader:
    """Keeps what a model has read: a second text is read from where it differs from the first.

    Args:
        model: a causal language model in evaluation mode, patched or not; one whose frequencies depend on the length
            within `one_length`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._cache_argument = cache_argument(model)
        self._read = torch.empty(0, dtype=torch.int64)
        self._cache: Any = None

    def read(self, context: Tensor) -> None:
        """Read a text, int64 [n]."""
        shared = 0
        if self._cache is not None and _can_crop(self._cache):
            limit = min(len(self._read), len(context) - 1)
            differs = (self._read[:limit] != context[:limit]).nonzero()
            shared = int(differs[0]) if len(differs) else limit
        if shared:
            _restore(self._cache, shared)
        else:
            self._cache = None
        with last_logits_only(self._model):
            self._cache = cache_of(self._pass(context[shared:], self._cache))
        self._read = context

    def continuations(self, prompt: Sequence[int], candidates: Sequence[Sequence[int]]) -> list[Continuation]:
        """How likely each of the candidates is after the text and the prompt."""
        cache, logits = self._after(prompt)
        found = []
        for candidate in candidates:
            expected = torch.tensor(candidate)
            every = logits[-1:]
            if len(candidate) > 1:
                branch, length = _branch(cache), len(self._read) + len(prompt)
                rest = self._pass(expected[:-1], branch).logits[0].float().cpu()
                _restore(branch, length)
                every = torch.cat((every, rest))
            chosen = every.log_softmax(-1).gather(1, expected[:, None])
            if not bool(chosen.isfinite().all()):
                raise ValueError(
                    f"the log-probability of an answer after {len(self._read) + len(prompt)} tokens is "
                    f"{chosen.sum().item()}: must be finite; the model overflows there, so try float32 or bfloat16"
                )
            found.append(Continuation(chosen.sum().item(), bool((every.argmax(-1) == expected).all())))
        _restore(cache, len(self._read))
        return found

    def generate(self, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
        """The next `count` tokens by greedy decoding, or those before one of `stop`."""
        cache, logits = self._after(prompt)
        tokens: list[int] = []
        while len(tokens) < count:
            token = int(logits[-1].argmax())
            if token in stop:
                break
            tokens.append(token)
            if len(tokens) < count:
                output = self._pass(torch.tensor([token]), cache)
                cache, logits = cache_of(output), output.logits[0].float().cpu()
        _restore(cache, len(self._read))
        return tokens

    def _after(self, prompt: Sequence[int]) -> tuple[Any, Tensor]:
        output = self._pass(torch.tensor(prompt), _branch(self._cache))
        return cache_of(output), output.logits[0].float().cpu()

    def _pass(self, tokens: Tensor, cache: Any) -> Any:
        given = {} if cache is None else {self._cache_argument: cache}
        return self._model(input_ids=tokens[None].to(self._device), use_cache=True, **given)


def one_length(model: nn.Module, length: int) -> AbstractContextManager[object]:
    """Every pass within is part of a context of `length` tokens, unless the model has a length of its own.

    Raises:
        ValueError: the model's own config carries a scaling whose frequencies would change while a cache grows.
    """
    if not depends_on_length(model):
        return nullcontext()
    if (patch := find_patch(model)) is None:
        raise ValueError(
            f"{type(model).__name__}: the scaling of its config changes the frequencies while a cache grows, so that "
            'nothing can be read once and asked twice; patch it with ropex.patch(model, on_scaled="keep")'
        )
    return patch.pin_length(length)


def encode_pair(tokenizer: Any, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of a prompt and of what follows it, as they are when both are tokenised together."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]

    alone, both = ids(prompt), ids(prompt + continuation)
    return both[: len(alone)], both[len(alone) :]


def _can_crop(cache: Any) -> bool:
    """Whether a cache can forget its last tokens: not one of windows or of states."""
    layers: list[Any] = getattr(cache, "layers", None) or []
    return bool(layers) and all(type(layer).__name__ == "DynamicLayer" for layer in layers)


def _branch(cache: Any) -> Any:
    """The cache to go on with, to be restored afterwards: itself where it can forget, else a copy."""
    return cache if _can_crop(cache) else copy.deepcopy(cache)


def _restore(cache: Any, length: int) -> None:
    if _can_crop(cache) and (extra := cache.get_seq_length() - length):
        cache.crop(-extra)  # versions of transformers disagree on what a positive number means

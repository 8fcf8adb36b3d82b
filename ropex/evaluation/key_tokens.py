"""Perplexity of the tokens that need the long context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ropex._checks import require_int, require_number
from ropex.evaluation.documents import Document, as_documents
from ropex.evaluation.losses import evaluating, forget_length, token_losses, vocabulary_size
from ropex.patching import depends_on_length

__all__ = ["KeyTokenPerplexity", "long_ppl"]


@dataclass(frozen=True)
class KeyTokenPerplexity:
    """LongPPL: the perplexity of key tokens.

    Attributes:
        nll: nats per key token, in the long context.
        perplexity: its exponential.
        key_tokens: how many there are.
        candidates: of how many: the tokens that have more context in the long pass than in the short one.
        positions: of the key tokens, int64, one tensor per document.
    """

    nll: float
    perplexity: float
    key_tokens: int
    candidates: int
    positions: tuple[Tensor, ...]


def long_ppl(
    model: nn.Module,
    tokens: Tensor | Document | Sequence[Any],
    *,
    short: int = 4096,
    stride: int = 1024,
    gain: float = 2.0,
    floor: float = -2.0,
    evaluator: nn.Module | None = None,
    chunk: int = 512,
) -> KeyTokenPerplexity:
    """The perplexity of the tokens that a long context makes likely: LongPPL.

    A key token is one whose log-probability gains more than `gain` from the whole text before it over the last `short`
    tokens or a little more, and reaches more than `floor`:

        log P(x | long) - log P(x | short) > gain  and  log P(x | long) > floor

    Args:
        model: whose perplexity is measured; a causal language model, patched or not.
        tokens: documents, as `perplexity_by_length` takes them; each is read whole in one pass.
        short: a token's short context is between `short` and `short + stride` tokens. For a model trained at fewer than
            8,192, half of that.
        stride: how far the short windows move on, in tokens.
        gain, floor: see above, in nats.
        evaluator: the model that says which tokens are the key ones, with the same vocabulary; None: `model` itself.
            Models compare by the same one's key tokens.
        chunk: positions whose logits are held at a time.

    Raises:
        ValueError: documents of no more than `short + stride` tokens, no key token, or what `perplexity_by_length`
            raises.

    Reference: Fang et al., What is Wrong with Perplexity for Long-context Language Modeling?, 2024, arXiv:2410.23771,
    eq. 5 to 7 (where the short contexts are of 4,096 tokens, moved by 1,024).
    """
    require_int("short", short, minimum=1, remedy="pass the tokens of the short context")
    require_int("stride", stride, minimum=1, remedy="pass a number of tokens")
    require_int("chunk", chunk, minimum=1, remedy="pass how many positions' logits fit in memory")
    require_number("gain", gain, minimum=0, remedy="pass nats")
    require_number("floor", floor, minimum=-math.inf, maximum=0, remedy="pass a log-probability in nats")
    found = as_documents(tokens, vocabulary_size(model))
    judge = model if evaluator is None else evaluator
    if vocabulary_size(judge) != vocabulary_size(model):
        raise ValueError(
            f"evaluator with {vocabulary_size(judge)} tokens: must have the model's {vocabulary_size(model)}; pass one "
            "of the same vocabulary"
        )
    window = short + stride
    for document in found:
        if len(document) <= window:
            raise ValueError(
                f"document {document.name!r} of {len(document)} tokens: must be longer than short + stride = {window}, "
                "so that a long context differs from a short one; pass longer documents or a smaller short"
            )
    nats, count, candidates = 0.0, 0, 0
    positions = []
    for document in found:
        judged = _long(judge, document, window, chunk)
        without = _short(judge, document, window, stride, chunk)
        key = (without - judged > gain) & (judged < -floor)
        losses = judged if judge is model else _long(model, document, window, chunk)
        nats += losses[key].sum(dtype=torch.float64).item()
        count += int(key.sum())
        candidates += len(key)
        positions.append(key.nonzero().flatten() + window)
    if not count:
        raise ValueError(
            f"no key token among {candidates}: none gains more than {gain} nats from the long context; pass longer or "
            "other documents, a smaller short, or a smaller gain"
        )
    return KeyTokenPerplexity(nats / count, math.exp(nats / count), count, candidates, tuple(positions))


def _long(model: nn.Module, document: Document, first: int, chunk: int) -> Tensor:
    """The losses from `first` on, in one pass."""
    with evaluating(model):
        if depends_on_length(model):
            forget_length(model)
        return token_losses(model, document.tokens, first=first, chunk=chunk)


def _short(model: nn.Module, document: Document, window: int, stride: int, chunk: int) -> Tensor:
    """The same tokens' losses, each from a window that ends at most `stride` tokens later."""
    losses, per_length = [], depends_on_length(model)
    with evaluating(model):
        for reached in range(window, len(document), stride):
            end = min(reached + stride, len(document))
            if per_length:
                forget_length(model)
            ids = document.window(end - window, end)
            losses.append(token_losses(model, ids, first=window - end + reached, chunk=chunk, where=end - window))
    return torch.cat(losses)

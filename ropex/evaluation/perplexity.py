"""Perplexity against position."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ropex._checks import describe, require_int
from ropex.patching import depends_on_length

__all__ = ["PerplexityByLength", "perplexity_by_length"]

Progress = Callable[[float], None]


@dataclass(frozen=True)
class PerplexityByLength:
    """Mean negative log-likelihood and perplexity of the tokens of each position bin.

    Attributes:
        protocol: how it was measured; numbers of different protocols do not compare.
        bins: [start, end) token positions.
        nll: nats per token.
        perplexity: its exponential.
        seconds: wall-clock time of the model's passes.
    """

    protocol: str
    bins: tuple[tuple[int, int], ...]
    nll: tuple[float, ...]
    perplexity: tuple[float, ...]
    seconds: float


def perplexity_by_length(
    model: nn.Module,
    tokens: Tensor | Sequence[int],
    *,
    bins: int | Sequence[int] = 6,
    chunk: int = 512,
    progress: Progress | None = None,
) -> PerplexityByLength:
    """How well a model predicts a text, by position: the protocol `binned`.

    The loss at a position depends only on the tokens before it, so one pass over the whole text gives the curve of
    every length up to it. A schedule that depends on the length (patched, or transformers' own) is run once per bin
    instead, over the tokens up to the bin's end. Logits are made `chunk` positions at a time, never all at once.

    Args:
        model: a causal language model, patched or not; its training mode is put back.
        tokens: one document, [n] or [1, n] token ids.
        bins: the number of equal bins, or their edges in tokens, such as (0, 2048, 8192).
        chunk: positions whose logits are held at a time.
        progress: called with the fraction done, 0 to 1.

    Returns:
        The bins with their negative log-likelihood and perplexity. Position 0 is not predicted and not counted.

    Raises:
        ValueError: tokens or bins that do not fit, a model whose logits are not its output embedding's alone, or a
            loss that is not finite (it names the position).

    Example:
        >>> perplexity_by_length(model, tokens, bins=(0, 2048, 4096)).perplexity  # doctest: +SKIP
        (24.9, 18.3)
    """
    tokens = _as_tokens(model, tokens)
    edges = bin_edges(bins, len(tokens))
    require_int("chunk", chunk, minimum=1, remedy="pass how many positions' logits fit in memory")
    spans = list(itertools.pairwise(edges))
    # One pass scores every bin, or each bin is scored by a pass of its own.
    per_length = depends_on_length(model)
    passes = [[span] for span in spans] if per_length else [spans]
    done, total = 0, sum(group[-1][1] for group in passes)
    nll: list[float] = []
    start_time = time.perf_counter()
    with _evaluating(model), torch.no_grad():
        for group in passes:
            length = group[-1][1]

            def report(fraction: float, done: int = done, length: int = length) -> None:
                if progress is not None:
                    progress((done + fraction * length) / total)

            if per_length:
                # transformers' own dynamic module keeps the frequencies of the longest pass until a short one comes.
                _token_losses(model, tokens[:2], chunk, None)
            losses = _token_losses(model, tokens[:length], chunk, report if progress is not None else None)
            # losses[i] is that of position i + 1
            nll += [losses[max(start, 1) - 1 : end - 1].to(torch.float64).mean().item() for start, end in group]
            done += length
    seconds = time.perf_counter() - start_time
    return PerplexityByLength("binned", tuple(spans), tuple(nll), tuple(math.exp(x) for x in nll), seconds)


def _as_tokens(model: nn.Module, tokens: Tensor | Sequence[int]) -> Tensor:
    if not isinstance(tokens, (Tensor, Sequence)):
        raise ValueError(
            f'tokens of the type {type(tokens).__name__}: must be token ids; pass tokenizer(...)["input_ids"]'
        )
    try:
        tokens = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"tokens: must be token ids, int64 [n]; {error}") from None
    if tokens.dim() == 2 and tokens.shape[0] == 1:
        tokens = tokens[0]
    if tokens.dim() != 1 or len(tokens) < 2 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens {describe(tokens)}: must be int64 [n] with n >= 2; pass one document's ids")
    vocabulary = _output_embedding(model).get_parameter("weight").shape[0]
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"tokens from {int(tokens.min())} to {int(tokens.max())}: must be in 0 .. {vocabulary - 1}; "
            "use the model's own tokenizer"
        )
    return tokens


def bin_edges(bins: int | Sequence[int], length: int) -> list[int]:
    """The edges of `bins` bins over `length` tokens, or the ones given, checked."""
    if isinstance(bins, int):
        require_int("bins", bins, minimum=1, remedy="pass the number of bins, or their edges")
        edges = [round(i * length / bins) for i in range(bins + 1)]
    else:
        edges = list(bins) if isinstance(bins, Sequence) else []
    if not all(isinstance(edge, int) for edge in edges):
        edges = []
    increasing = all(a < b for a, b in itertools.pairwise(edges))
    if len(edges) < 2 or not increasing or edges[0] < 0 or edges[-1] > length or edges[1] < 2:
        raise ValueError(
            f"bins={bins!r}: must be increasing edges within 0 .. {length}, each bin holding at least one predicted "
            "token; pass fewer bins, other edges, or more tokens"
        )
    return edges


def _output_embedding(model: Any) -> nn.Module:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embedding: must be a causal language model; pass one")
    return head  # type: ignore[no-any-return]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _token_losses(model: nn.Module, tokens: Tensor, chunk: int, report: Progress | None) -> Tensor:
    """The loss of each token but the first, float32 [n - 1] on the CPU."""
    head = _output_embedding(model)
    device = next(model.parameters()).device
    ids = tokens[None].to(device)
    hidden: list[Tensor] = []
    autocast: list[torch.autocast] = []

    def keep_all_compute_last(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden.append(args[0])
        # Trainers wrap the model's forward in autocast; the head must run under the same one later.
        dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        autocast.append(torch.autocast(device.type, dtype, enabled))
        return (args[0][:, -1:], *args[1:])

    with ExitStack() as stack:
        handle = head.register_forward_pre_hook(keep_all_compute_last)
        stack.callback(handle.remove)
        if report is not None:
            for layer_handle in _report_layers(model, report):
                stack.callback(layer_handle.remove)
        logits = model(input_ids=ids, use_cache=False).logits
    explained = False
    if len(hidden) == 1:
        with autocast[0]:
            last = head(hidden[0][:, -1:])
        # Equal bits in eager mode; a compiled model may round otherwise.
        rounding = 8 * torch.finfo(last.dtype).eps * last.abs().nan_to_num(0, 0).max().item()
        explained = torch.allclose(last.to(logits.dtype), logits[:, -1:], rtol=0, atol=rounding, equal_nan=True)
    if not explained:
        raise ValueError(
            f"{type(model).__name__} computes its logits from more than its output embedding: not supported, because "
            "the loss is computed from it in chunks"
        )
    losses = []
    for start in range(0, ids.shape[1] - 1, chunk):
        end = min(start + chunk, ids.shape[1] - 1)
        with autocast[0]:
            chunk_logits = head(hidden[0][0, start:end]).to(torch.float32)
        losses.append(F.cross_entropy(chunk_logits, ids[0, start + 1 : end + 1], reduction="none").cpu())
        if report is not None:
            report(_PASS_SHARE + (1 - _PASS_SHARE) * end / (ids.shape[1] - 1))
    joined = torch.cat(losses)
    if not bool(joined.isfinite().all()):
        position = int((~joined.isfinite()).nonzero()[0]) + 1
        raise ValueError(
            f"the loss at position {position} is {joined[position - 1].item()}: must be finite; the model overflows "
            "there, so try float32 or bfloat16"
        )
    return joined


_PASS_SHARE = (
    0.8  # of the time of a pass and its losses, for the progress bar; 0.79 seen at 2,048 tokens, 0.84 at 4,096
)


def _report_layers(model: nn.Module, report: Progress) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks on the model's stack of layers that report how much of a pass is done."""
    # The first one met from outside; experts and the like lie within it.
    layers = next((module for module in model.modules() if isinstance(module, nn.ModuleList)), nn.ModuleList())

    def after(number: int) -> Callable[..., None]:
        return lambda *_: report(_PASS_SHARE * number / len(layers))

    return [layer.register_forward_hook(after(i)) for i, layer in enumerate(layers, start=1)]

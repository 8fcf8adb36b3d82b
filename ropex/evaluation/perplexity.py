"""Perplexity against context length, by the protocols of the field."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ropex._checks import require_choice, require_int
from ropex.evaluation.documents import Document, as_documents
from ropex.evaluation.losses import Progress, evaluating, forget_length, token_losses, vocabulary_size
from ropex.patching import depends_on_length

__all__ = ["PerplexityByLength", "Protocol", "Tally", "bin_edges", "perplexity_by_length", "require_stride"]

Protocol = Literal["binned", "press", "window_mean", "prefix"]

_DRAWS = 2000  # of the bootstrap: the ends of a 95 % interval are then good to a few per cent of its width


class Tally(NamedTuple):
    """What one document adds to one row: nats, the tokens scored, and their bytes where they are known."""

    nats: float
    tokens: int
    bytes: int | None


@dataclass(frozen=True)
class PerplexityByLength:
    """How well a model predicts documents, by context length; each row a bin or a length.

    Attributes:
        protocol: how it was measured; numbers of different protocols do not compare.
        bins: of `binned`, the [start, end) positions of each row; of the others (0, length).
        tallies: the sums behind the numbers, [document][row].
        seconds: wall-clock time.
        processed: tokens that went through the model.
    """

    protocol: Protocol
    bins: tuple[tuple[int, int], ...]
    tallies: tuple[tuple[Tally, ...], ...]
    seconds: float
    processed: int

    @property
    def nll(self) -> tuple[float, ...]:
        """Nats per token of each row, every token of every document counting the same."""
        return tuple(sum(t.nats for t in row) / sum(t.tokens for t in row) for row in self._rows())

    @property
    def perplexity(self) -> tuple[float, ...]:
        """The exponential of `nll`."""
        return tuple(math.exp(nll) for nll in self.nll)

    @property
    def bits_per_byte(self) -> tuple[float, ...] | None:
        """Comparable between tokenizers; None where documents do not know their bytes."""
        rows = [(sum(t.nats for t in row), sum(t.bytes or 0 for t in row)) for row in self._rows()]
        if any(t.bytes is None for row in self.tallies for t in row) or not all(count for _, count in rows):
            return None
        return tuple(nats / math.log(2) / count for nats, count in rows)

    @property
    def interval(self) -> tuple[tuple[float, float], ...] | None:
        """95 % bootstrap interval of `nll` over the documents; None for a single one."""
        if len(self.tallies) < 2:
            return None
        return tuple(_interval([(t.nats, t.tokens) for t in row]) for row in self._rows())

    @property
    def tokens_per_second(self) -> float:
        """Tokens that went through the model in a second."""
        return self.processed / self.seconds

    def gain_over(self, other: PerplexityByLength) -> tuple[tuple[float, tuple[float, float] | None], ...]:
        """By how many nats per token this is below `other`, each with its paired bootstrap interval.

        Over the row of the unpatched model that sees its trained length only, it is what added context is worth.

        Raises:
            ValueError: `other` is of another protocol, other bins or other documents.
        """
        same = self.protocol == other.protocol and self.bins == other.bins
        if not same or [[t.tokens for t in r] for r in self.tallies] != [[t.tokens for t in r] for r in other.tallies]:
            raise ValueError(
                f"{other.protocol} over {other.bins} does not compare with {self.protocol} over {self.bins}: must be "
                "the same protocol, bins and documents; measure both alike"
            )
        gains = []
        for mine, theirs in zip(self._rows(), other._rows(), strict=True):
            pairs = [(b.nats - a.nats, a.tokens) for a, b in zip(mine, theirs, strict=True)]
            mean = sum(nats for nats, _ in pairs) / sum(tokens for _, tokens in pairs)
            gains.append((mean, _interval(pairs) if len(pairs) > 1 else None))
        return tuple(gains)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what was measured and the numbers derived of it."""
        return {
            "protocol": self.protocol,
            "bins": [list(span) for span in self.bins],
            "documents": len(self.tallies),
            "nll": list(self.nll),
            "perplexity": list(self.perplexity),
            "bits_per_byte": None if self.bits_per_byte is None else list(self.bits_per_byte),
            "interval": None if self.interval is None else [list(ends) for ends in self.interval],
            "tallies": [[list(tally) for tally in row] for row in self.tallies],
            "seconds": self.seconds,
            "processed": self.processed,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> PerplexityByLength:
        """What `to_dict` described."""
        return PerplexityByLength(
            data["protocol"],
            tuple((start, end) for start, end in data["bins"]),
            tuple(tuple(Tally(*tally) for tally in row) for row in data["tallies"]),
            data["seconds"],
            data["processed"],
        )

    def joined(self, other: PerplexityByLength) -> PerplexityByLength:
        """This and the same of further documents."""
        if (self.protocol, self.bins) != (other.protocol, other.bins):
            raise ValueError(f"{other.protocol} over {other.bins}: must be {self.protocol} over {self.bins}")
        return PerplexityByLength(
            self.protocol,
            self.bins,
            self.tallies + other.tallies,
            self.seconds + other.seconds,
            self.processed + other.processed,
        )

    def _rows(self) -> Iterator[tuple[Tally, ...]]:
        return zip(*self.tallies, strict=True)


def perplexity_by_length(
    model: nn.Module,
    tokens: Tensor | Document | Sequence[Any],
    *,
    protocol: Protocol = "binned",
    bins: int | Sequence[int] = 6,
    stride: int = 256,
    window: int | None = None,
    chunk: int = 512,
    progress: Progress | None = None,
) -> PerplexityByLength:
    """How well a model predicts documents, by context length.

    The same model has other numbers under each protocol:

    - `binned`: one pass at the longest length; a row is the mean over the tokens at the positions of one bin. The loss
      at a position depends only on the tokens before it, so this one pass is the whole curve.
    - `press`: windows of the length move on by `stride`, and the last `stride` tokens of each are scored, the first
      window's all: every token of the document once.
    - `window_mean`: windows of the length start every `stride` tokens, and every token of each is scored.
    - `prefix`: the first tokens of each document, up to the length, all scored.

    Documents stay separate, all count at every length, and a window begins with BOS where the document does. A schedule
    that depends on the length (patched, or transformers' own) is run once per length, any other once. Logits are made
    `chunk` positions at a time, never all at once.

    Args:
        model: a causal language model, patched or not; its training mode is put back.
        tokens: one document or several: token ids, [n] or [1, n], or a `Document` of `documents`.
        protocol: see above.
        bins: the number of equal bins, rounded to whole tokens, or their edges in tokens, such as (0, 2048, 8192). The
            other protocols take the bins' ends as their lengths.
        stride: of `press` and `window_mean`, in tokens.
        window: the model sees at most so many tokens: what would be a longer pass becomes one over its first `window`
            tokens and others that end at the end of each bin and at least every quarter of `window`. With the unpatched
            model and its trained length this is what any added context must beat.
        chunk: positions whose logits are held at a time.
        progress: called with the fraction done, 0 to 1.

    Returns:
        The rows, with nats per token, perplexity, bits per byte and intervals. The first token of a window is not
        predicted and not counted.

    Raises:
        ValueError: documents shorter than the longest length, other bad input, a model whose logits are not its output
            embedding's alone, or a loss that is not finite (it names the position).

    Example:
        >>> perplexity_by_length(model, tokens, bins=(0, 2048, 4096)).perplexity  # doctest: +SKIP
        (24.9, 18.3)

    Reference: `press`: Press et al., Train Short, Test Long, 2021, arXiv:2108.12409, appendix B; `window_mean`: Chen et
    al., LongLoRA, 2023, arXiv:2309.12307; `prefix`: Peng et al., YaRN, 2023, arXiv:2309.00071, section 4.3.1.
    """
    require_choice("protocol", protocol, get_args(Protocol))
    found = as_documents(tokens, vocabulary_size(model))
    shortest = min(found, key=len)
    edges = bin_edges(bins, len(shortest))
    for name, value in (("chunk", chunk), ("stride", stride)):
        require_int(name, value, minimum=1, remedy="pass a number of tokens")
    if window is not None:
        require_int("window", window, minimum=4, remedy="pass the tokens that the model may see")
    spans = list(itertools.pairwise(edges))
    if protocol != "binned":
        spans = [(0, end) for _, end in spans]
        require_stride(protocol, stride, spans[0][1])
    per_length = depends_on_length(model)
    plans = [
        [piece for w in _windows(protocol, spans, len(document), stride, per_length) for piece in _within(w, window)]
        for document in found
    ]
    total = sum(w.end - w.start for plan in plans for w in plan)
    done = 0
    tallies = []
    start_time = time.perf_counter()
    with evaluating(model):
        for document, plan in zip(found, plans, strict=True):
            rows = [Tally(0.0, 0, None if document.bytes is None else 0) for _ in spans]
            for w in plan:
                if per_length:
                    forget_length(model)
                report = _share_of(progress, done, w.end - w.start, total)
                first = min(start for _, start, _ in w.scored)
                ids = document.window(w.start, w.end)
                losses = token_losses(model, ids, first=first - w.start, chunk=chunk, report=report, where=w.start)
                for row, start, end in w.scored:
                    rows[row] = _added(rows[row], losses[start - first : end - first], document, start, end)
                done += w.end - w.start
            tallies.append(tuple(rows))
    return PerplexityByLength(protocol, tuple(spans), tuple(tallies), time.perf_counter() - start_time, total)


def require_stride(protocol: str, stride: int, shortest: int) -> None:
    """Raise `ValueError` where windows of `press` would move on by more than they hold."""
    if protocol == "press" and stride > shortest:
        raise ValueError(
            f"stride={stride}: must be <= the shortest length, {shortest}; pass a smaller stride or longer bins"
        )


def bin_edges(bins: int | Sequence[int], length: int) -> list[int]:
    """The edges of `bins` bins over `length` tokens, or the ones given, checked."""
    if isinstance(bins, int):
        require_int("bins", bins, minimum=1, remedy="pass the number of bins, or their edges")
        edges = [round(i * length / bins) for i in range(min(bins, length) + 1)]  # more bins than tokens are refused
    else:
        edges = list(bins) if isinstance(bins, Sequence) else []
    if not all(isinstance(edge, int) for edge in edges):
        edges = []
    increasing = all(a < b for a, b in itertools.pairwise(edges))
    if len(edges) < 2 or not increasing or edges[0] < 0 or edges[-1] > length or edges[1] < 2:
        raise ValueError(
            f"bins={bins!r}: must be increasing edges within 0 .. {length}, the tokens of the shortest document, each "
            "bin holding at least one predicted token; pass fewer bins, other edges, or longer documents"
        )
    return edges


class _Window(NamedTuple):
    """One pass: the tokens of [start, end), and what it scores: (row, first position, end)."""

    start: int
    end: int
    scored: list[tuple[int, int, int]]


def _windows(
    protocol: Protocol, spans: list[tuple[int, int]], count: int, stride: int, per_length: bool
) -> Iterator[_Window]:
    """The passes over a document of `count` tokens."""
    if protocol in ("binned", "prefix"):
        rows = [(row, max(start, 1), end) for row, (start, end) in enumerate(spans)]
        for group in [[scored] for scored in rows] if per_length else [rows]:
            yield _Window(0, group[-1][2], group)
        return
    for row, (_, length) in enumerate(spans):
        if protocol == "window_mean":
            for start in range(0, count - length + 1, stride):
                yield _Window(start, start + length, [(row, start + 1, start + length)])
            continue
        yield _Window(0, length, [(row, 1, length)])
        for reached in range(length, count, stride):
            end = min(reached + stride, count)
            yield _Window(end - length, end, [(row, max(reached, end - length + 1), end)])


def _within(window: _Window, limit: int | None) -> Iterator[_Window]:
    """Passes over at most `limit` tokens that score the same."""
    if limit is None or window.end - window.start <= limit:
        yield window
        return
    reached = window.start + limit
    if inside := [(row, start, min(end, reached)) for row, start, end in window.scored if start < reached]:
        yield _Window(window.start, reached, inside)
    ends = {max(edge, reached) for _, start, end in window.scored for edge in (start, end)}
    for start, end in itertools.pairwise(sorted(ends)):
        rows = [row for row, first, last in window.scored if first < end and last >= end]
        steps = math.ceil((end - start) / (limit // 4)) if rows else 0
        for i in range(steps):
            low, high = (start + round(k * (end - start) / steps) for k in (i, i + 1))
            yield _Window(high - limit, high, [(row, low, high) for row in rows])


def _added(tally: Tally, losses: Tensor, document: Document, start: int, end: int) -> Tally:
    counts = None
    if document.bytes is not None and tally.bytes is not None:
        counts = tally.bytes + int(document.bytes[start:end].sum())
    return Tally(tally.nats + losses.to(torch.float64).sum().item(), tally.tokens + end - start, counts)


def _share_of(progress: Progress | None, done: int, size: int, total: int) -> Callable[[float], None] | None:
    return None if progress is None else lambda fraction: progress((done + fraction * size) / total)


def _interval(pairs: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """The 95 % bootstrap interval of a sum over a sum, documents drawn with replacement."""
    table = torch.tensor(pairs, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = table[torch.randint(len(pairs), (_DRAWS, len(pairs)), generator=generator)].sum(1)
    low, high = (drawn[:, 0] / drawn[:, 1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high

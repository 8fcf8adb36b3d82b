"""Training at a short length for a long one: PoSE, and random positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info

from ropex import draws
from ropex._checks import describe, require_choice, require_int, require_length, require_list
from ropex.rotation import Request, Rotation
from ropex.scaling.base import Wrapper, innermost, looked_up, moved, option_names, require_factor, require_key

__all__ = ["PoSE", "PoSECollator", "RandomPositions"]


@dataclass(frozen=True)
class Augmentation(Wrapper):
    """What the schedules of this file share: positions of a window, spread in training over the target length.

    Args:
        factor: target length / trained length, >= 1; None: that of the inner schedule, which must name one.
    """

    factor: float | None = None
    default_inner: ClassVar[str] = "linear"
    training_free = False
    augments = True
    outermost = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor is not None:
            require_factor(self.factor)
        elif "factor" not in option_names(type(innermost(self.inner)), required=True):
            if (self.target_length(1), self.target_length(1000)) == (1, 1000):
                raise ValueError(
                    f"factor=None around {self.inner!r}, which names no target: no position would move; pass factor= "
                    "(target length / trained length)"
                )

    def target_length(self, trained_length: int) -> int:
        return super().target_length(trained_length) if self.factor is None else round(self.factor * trained_length)


@dataclass(frozen=True)
class PoSE(Augmentation):
    """Positional skip-wise training: in training a window of M tokens skips, once, to somewhere before the target S.

    The first chunk, of a length uniform on {1 .. ceil(M / 2)}, keeps its positions; the rest is shifted by a number
    uniform on {0 .. S - M}. Both are drawn per sample. In evaluation it is its inner schedule.

    Use it to fine-tune for S at the cost of M, around any schedule. M is `Request.length`, so the pinned length under a
    pin, which must then be that of the window; S is the target length. Where a data collator already skips
    (`PoSECollator`), patch with the inner schedule alone. A window of S tokens or more keeps its positions; around a
    schedule that moves positions itself (`e2llm`, `clex`) both moves add up, and may pass S.

    Args:
        inner: what scales the frequencies; `linear` by default.
        factor: S / trained length, >= 1; None: that of the inner schedule.

    Example:
        >>> schedule("pose", inner="yarn", factor=8).target_length(2048)
        16384

    Reference: Zhu et al., PoSE: Efficient Context Window Extension of LLMs via Positional Skip-wise Training, 2023,
    arXiv:2309.10400, section 3.2.
    """

    method: ClassVar[str] = "pose"
    paper: ClassVar[str] = "Zhu et al. 2023, arXiv:2309.10400"

    def rotation(self, request: Request) -> Rotation:
        if not request.training:
            return self.inner.rotation(request)
        key = require_key(request, self.method)
        target = self.target_length(request.geometry.trained_length)
        first, skip = _drawn_skip(key, request.length[..., None], target)
        positions = torch.where(request.positions < first, request.positions, request.positions + skip)
        return self.inner.rotation(moved(request, key, positions))


@dataclass(frozen=True)
class RandomPositions(Augmentation):
    """In training the tokens of a window stand at random positions of the target length S, in order.

    In evaluation it is its inner schedule. Use it to train for a length that no training sample has; unlike `pose` it
    leaves no neighbours together. A window of S tokens or more keeps its positions. The window is the number of tokens
    in the pass: one that holds part of a longer context, as in context-parallel training, would draw for itself alone.

    Args:
        inner: what scales the frequencies; `linear` by default.
        factor: S / trained length, >= 1; None: that of the inner schedule.
        variant: `"subset"`: each subset of {0 .. S - 1} is equally likely; `"steps"`, Giraffe's: sums of steps uniform
            on [0, 2), scaled down where they would pass S. These are fractions of a token: positions come back in units
            of 2**-16 tokens.

    Example:
        >>> schedule("random_positions", factor=8).target_length(2048)
        16384

    Reference: Ruoss et al., Randomized Positional Encodings Boost Length Generalization of Transformers, 2023,
    arXiv:2305.16843; Pal et al., Giraffe, 2023, arXiv:2308.10882.
    """

    variant: Literal["subset", "steps"] = "subset"
    method: ClassVar[str] = "random_positions"
    paper: ClassVar[str] = "Ruoss et al. 2023, arXiv:2305.16843"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("variant", self.variant, ("subset", "steps"))

    def rotation(self, request: Request) -> Rotation:
        if not request.training:
            return self.inner.rotation(request)
        key, window = require_key(request, self.method), request.positions.shape[-1]
        span = max(self.target_length(request.geometry.trained_length), window)
        if self.variant == "subset":
            table = draws.subset(key, window, span, limit=span)
            return self.inner.rotation(moved(request, key, looked_up(table, request.positions)))
        sums = (2 * draws.uniform(key, window)).cumsum(dim=-1)
        sums = sums * (span / sums[:, -1:].clamp(min=span))
        fine = looked_up((sums * 2**16).to(torch.int64), request.positions)
        whole = self.inner.rotation(moved(request, key, fine >> 16))
        return Rotation((whole.positions << 16) + fine % 2**16, whole.inv_freq / 2**16, whole.amplitude)


def _drawn_skip(key: Tensor, window: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """The length of PoSE's first chunk and the skip of its second, int64 [batch, 1] each; window is [1 or batch, 1]."""
    first = 1 + draws.integers(key, 1, (window + 1) // 2)
    return first, draws.integers(key, 1, (target - window).clamp(min=0) + 1, stream=1)


@dataclass(frozen=True)
class PoSECollator:
    """A data collator that does what `PoSE` does and also drops the tokens between the two chunks.

    From each document it takes a first chunk from the start and a second one from further on, `window` tokens together,
    and gives the second one the positions of somewhere before the target length. Train a model that is patched with
    the inner schedule (`linear`, `yarn` ...), since the positions already skip.

    Args:
        window: tokens of a training sample, M.
        target_length: tokens, S >= window; documents are cut there.
        pad_token_id: fills samples that are shorter; their labels are -100.
        generator: what it draws from; None: PyTorch's own, which a DataLoader seeds in each worker. The tokens take
            part in the draw, so that ranks with equal seeds and different documents differ.

    Returns:
        When called with a batch of `{"input_ids": ...}`, with or without `labels`, and less what `attention_mask` says
        is padding: int64 tensors [batch, at most M] `input_ids`, `labels`, `position_ids` and `attention_mask`. (The
        mask is there because without one transformers takes a skip in the positions for the start of another document,
        and hides the first chunk from the second.)

    Example:
        >>> batch = PoSECollator(window=16, target_length=128)([{"input_ids": list(range(40))}])
        >>> {name: tuple(tensor.shape) for name, tensor in batch.items()}["position_ids"]
        (1, 16)

    Reference: Zhu et al., PoSE, 2023, arXiv:2309.10400, section 3.2 and the released code.
    """

    window: int
    target_length: int
    pad_token_id: int = 0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        require_length("window", self.window, remedy="pass the tokens of a training sample")
        require_length("target_length", self.target_length, minimum=self.window, remedy="pass the length to train for")
        require_int("pad_token_id", self.pad_token_id, minimum=0, remedy="pass the tokenizer's, or its eos_token_id")
        if not isinstance(self.generator, torch.Generator | None):
            raise ValueError(
                f"generator={self.generator!r}: must be a torch.Generator, or None; make one from the seed"
            )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        require_list("features", features, "samples with input_ids")
        if not features:
            raise ValueError("features of no sample: must be at least one; check the batch size and the sampler")
        draw = torch.randint(2**62, (), generator=self.generator)
        rows = [self._sample(feature, draw, number) for number, feature in enumerate(features)]
        fill = {"input_ids": self.pad_token_id, "labels": -100, "position_ids": 0, "attention_mask": 0}
        return {
            name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
            for name, value in fill.items()
        }

    def _sample(self, feature: Mapping[str, Any], draw: Tensor, number: int) -> dict[str, Tensor]:
        tokens, labels = _document(feature)
        tokens = tokens[: self.target_length]
        # A worker's copy of the generator is that of every other worker, and of every other epoch.
        worker = get_worker_info()
        seed = int(draws.next_key(tokens).sum()) + (worker.seed if worker is not None else 0)
        key = draws.sample_keys(seed, draw, torch.tensor([number]))
        size = min(self.window, len(tokens))
        first, skip = (int(drawn) for drawn in _drawn_skip(key, torch.tensor([[size]]), self.target_length))
        end = size + int(draws.integers(key, 1, len(tokens) - size + 1, stream=2))
        index, positions = skipped(size, first, end, skip)
        return {
            "input_ids": tokens[index],
            "labels": labels[index],
            "position_ids": positions,
            "attention_mask": torch.ones_like(positions),
        }


def _document(feature: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """A feature's tokens and labels without padding, int64 [n] each."""
    if not isinstance(feature, Mapping) or "input_ids" not in feature or "position_ids" in feature:
        given = ", ".join(feature) if isinstance(feature, Mapping) else type(feature).__name__
        raise ValueError(
            f"a feature of {given or 'nothing'}: must have input_ids, and may have labels and attention_mask, but no "
            "position_ids; pass one document per feature"
        )
    tokens = torch.as_tensor(feature["input_ids"])
    labels = torch.as_tensor(feature.get("labels", tokens))
    mask = torch.as_tensor(feature.get("attention_mask", torch.ones_like(tokens))).bool()
    if (
        tokens.dim() != 1
        or tokens.is_floating_point()
        or not tokens.shape == labels.shape == mask.shape
        or not mask.any()
    ):
        raise ValueError(
            f"input_ids {describe(tokens)}, labels {describe(labels)}, attention_mask {list(mask.shape)} with "
            f"{int(mask.sum())} ones: must be one document's integer tokens, at least one, with as many labels and "
            "mask values; split batches into features"
        )
    return tokens[mask].to(torch.int64), labels[mask].to(torch.int64)


def skipped(size: int, first: int, end: int, skip: int) -> tuple[Tensor, Tensor]:
    """Which tokens of a document make a sample of `size` tokens, and where they stand, each int64 [size].

    Args:
        first: tokens of the first chunk, at the document's start.
        end: where in the document the second chunk ends.
        skip: by how much its positions are shifted.
    """
    place = torch.arange(size)
    second = place >= first
    return torch.where(second, place + end - size, place), torch.where(second, place + skip, place)

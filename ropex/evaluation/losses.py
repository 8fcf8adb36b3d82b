"""The loss of every token of one pass, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Progress",
    "evaluating",
    "forget_length",
    "last_logits_only",
    "output_embedding",
    "token_losses",
    "vocabulary_size",
]

Progress = Callable[[float], None]

# Of the time of a pass and its losses, for the progress bar; 0.79 seen at 2,048 tokens, 0.84 at 4,096.
_PASS_SHARE = 0.8
# exp of more is no float64: the perplexity would be infinite.
_LARGEST_LOSS = 709.0


def output_embedding(model: Any) -> nn.Module:
    """The module that makes logits of the last hidden states.

    Raises:
        ValueError: the model has none.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embedding: must be a causal language model; pass one")
    return head  # type: ignore[no-any-return]


def vocabulary_size(model: nn.Module) -> int:
    """The number of tokens that the model can predict."""
    return output_embedding(model).get_parameter("weight").shape[0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients; each module's own mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def last_logits_only(model: nn.Module) -> Iterator[list[tuple[Tensor, torch.autocast]]]:
    """The output embedding sees the last position alone; yields what it would have seen, and its autocast."""
    seen: list[tuple[Tensor, torch.autocast]] = []

    def cut(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Trainers wrap the model's forward in autocast; the head must run under the same one later.
        device = args[0].device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        seen.append((args[0], torch.autocast(device, dtype, enabled)))
        return (args[0][:, -1:], *args[1:])

    handle = output_embedding(model).register_forward_pre_hook(cut)
    try:
        yield seen
    finally:
        handle.remove()


def forget_length(model: nn.Module) -> None:
    """Lead a model whose frequencies depend on the length back to those of a short one.

    transformers' own dynamic module keeps those of the longest pass until a short one comes.
    """
    token_losses(model, torch.zeros(2, dtype=torch.int64))


def token_losses(
    model: nn.Module,
    tokens: Tensor,
    *,
    first: int = 1,
    chunk: int = 512,
    report: Progress | None = None,
    where: int = 0,
    shift: int = 0,
) -> Tensor:
    """The loss of each token from `first` on, float32 [n - first] on the CPU, by one pass over all of them.

    Args:
        model: in evaluation mode.
        tokens: int64 [n].
        first: >= 1; the loss at 0 has nothing to be predicted from.
        chunk: positions whose logits are held at a time.
        report: called with the fraction done.
        where: position of tokens[0] in its text, for the messages.
        shift: by how much all positions are moved, which in exact arithmetic changes nothing.

    Raises:
        ValueError: logits that are made of more than the output embedding, or a loss that is not finite.
    """
    head = output_embedding(model)
    ids = tokens[None].to(next(model.parameters()).device)
    with ExitStack() as stack:
        seen = stack.enter_context(last_logits_only(model))
        if report is not None:
            for handle in _report_layers(model, report):
                stack.callback(handle.remove)
        moved = {"position_ids": torch.arange(shift, shift + len(tokens), device=ids.device)[None]} if shift else {}
        logits = model(input_ids=ids, use_cache=False, **moved).logits
    explained = False
    if len(seen) == 1:
        hidden, autocast = seen[0]
        with autocast:
            last = head(hidden[:, -1:])
        # Equal bits in eager mode; a compiled model may round otherwise.
        rounding = 8 * torch.finfo(last.dtype).eps * last.abs().nan_to_num(0, 0).max().item()
        explained = torch.allclose(last.to(logits.dtype), logits[:, -1:], rtol=0, atol=rounding, equal_nan=True)
    if not explained:
        raise ValueError(
            f"{type(model).__name__} computes its logits from more than its output embedding: not supported, because "
            "the loss is computed from it in chunks"
        )
    losses = []
    count = ids.shape[1]
    for start in range(first, count, chunk):
        end = min(start + chunk, count)
        with autocast:
            chunk_logits = head(hidden[0, start - 1 : end - 1]).to(torch.float32)
        losses.append(F.cross_entropy(chunk_logits, ids[0, start:end], reduction="none").cpu())
        if report is not None:
            report(_PASS_SHARE + (1 - _PASS_SHARE) * (end - first) / (count - first))
    joined = torch.cat(losses)
    if not bool((joined <= _LARGEST_LOSS).all()):  # false of NaN, too
        index = int((~(joined <= _LARGEST_LOSS)).nonzero()[0])
        raise ValueError(
            f"the loss at position {where + first + index} is {joined[index].item()}: must be finite, with a finite "
            "exponential; the model overflows there, so try float32 or bfloat16"
        )
    return joined


def _report_layers(model: nn.Module, report: Progress) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks on the model's stack of layers that report how much of a pass is done."""
    # The first one met from outside; experts and the like lie within it.
    layers = next((module for module in model.modules() if isinstance(module, nn.ModuleList)), nn.ModuleList())

    def after(number: int) -> Callable[..., None]:
        return lambda *_: report(_PASS_SHARE * number / len(layers))

    return [layer.register_forward_hook(after(i)) for i, layer in enumerate(layers, start=1)]

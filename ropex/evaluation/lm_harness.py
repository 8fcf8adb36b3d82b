"""The model object of lm-evaluation-harness."""

from __future__ import annotations

from typing import Any

from torch import nn

from ropex._checks import require_int
from ropex.patching.inspect import inspect

__all__ = ["harness"]


def harness(model: nn.Module, tokenizer: Any, *, batch_size: int = 1, max_length: int | None = None) -> Any:
    """A model, patched or not, as `lm_eval.simple_evaluate(model=...)` takes it.

    The harness cuts what is longer than the model's maximum, which it reads from the config: here it is the length that
    the patch is meant to reach.

    Args:
        model: of transformers.
        tokenizer: the model's.
        batch_size: requests at a time.
        max_length: in tokens; None: what the patch, or the model's own config, is meant to reach.

    Raises:
        ValueError: lm-eval is not installed, the length is not known, or bad input.

    Example:
        >>> lm = harness(model, tokenizer)  # doctest: +SKIP
        >>> metadata = {"max_seq_lengths": [16384], "tokenizer": tokenizer.name_or_path}  # doctest: +SKIP
        >>> lm_eval.simple_evaluate(lm, tasks=["ruler_vt"], metadata=metadata)  # doctest: +SKIP

    Reference: Gao et al., The Language Model Evaluation Harness, https://github.com/EleutherAI/lm-evaluation-harness.
    """
    require_int("batch_size", batch_size, minimum=1, remedy="pass how many requests to answer at a time")
    length = inspect(model).length if max_length is None else max_length
    require_int("max_length", length, minimum=1, remedy="pass the tokens that the model can read")
    try:
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the package {error.name} is missing: must be installed; run `pip install 'ropex[harness]'`"
        ) from error
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=length)

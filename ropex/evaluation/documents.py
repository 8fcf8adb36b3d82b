"""Texts as a model reads them: token ids, the bytes they stand for, and what stands before them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ropex._checks import describe, require_int

__all__ = ["Document", "as_documents", "bos_of", "documents"]


@dataclass(frozen=True, eq=False)
class Document:
    """One text as token ids.

    Attributes:
        tokens: int64 [n]; with `bos` in front where there is one.
        bos: the id that the tokenizer puts before every text, and that every window of this one gets; None: none.
        bytes: int64 [n], UTF-8 bytes of the text that each token stands for; None: not known.
        name: what messages and results call it.
    """

    tokens: Tensor
    bos: int | None = None
    bytes: Tensor | None = None
    name: str = ""

    def __post_init__(self) -> None:
        tokens, counts = self.tokens, self.bytes
        if tokens.dim() != 1 or len(tokens) < 2 or tokens.dtype != torch.int64:
            raise ValueError(f"tokens {describe(tokens)}: must be int64 [n] with n >= 2; pass one document's ids")
        if counts is not None and (counts.shape != tokens.shape or counts.dtype != torch.int64):
            raise ValueError(f"bytes {describe(counts)}: must be int64 {list(tokens.shape)}, one count per token")
        if self.bos is not None and int(tokens[0]) != self.bos:
            raise ValueError(f"bos={self.bos!r}: must be the first of the tokens; put it in front of them")

    def __len__(self) -> int:
        return len(self.tokens)

    def window(self, start: int, end: int) -> Tensor:
        """The tokens of [start, end) as a text of their own: with BOS in the place of the first."""
        tokens = self.tokens[start:end]
        if self.bos is None or start == 0:
            return tokens
        return torch.cat((tokens.new_tensor([self.bos]), tokens[1:]))


def documents(
    texts: str | Iterable[str],
    tokenizer: Any,
    *,
    length: int | None = None,
    limit: int | None = None,
    names: Sequence[str] = (),
) -> list[Document]:
    """Texts as documents for measuring, each by itself.

    Args:
        texts: one text, or several.
        tokenizer: of transformers. BOS is put in front where the tokenizer itself does so, and nowhere else.
        length: cut each text into consecutive documents of so many tokens, BOS included; a rest that is shorter is
            left out, and so is a text that is. None: each text is one document.
        limit: keep so many documents, taken from the texts in turn; None: all.
        names: of the texts.

    Raises:
        ValueError: no document of that length, or an empty text.

    Example:
        >>> documents(open("book.txt").read(), tokenizer, length=16384)  # doctest: +SKIP
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    for name, value in (("length", length), ("limit", limit)):
        if value is not None:
            require_int(name, value, minimum=2 if name == "length" else 1, remedy="pass a number of them, or None")
    if not texts:
        raise ValueError("texts=[]: must hold at least one text; pass one")
    if names and len(names) != len(texts):
        raise ValueError(f"{len(names)} names for {len(texts)} texts: must be as many; pass one for each, or none")
    bos = bos_of(tokenizer)
    pieces: list[list[Document]] = []
    longest = 0
    for i, text in enumerate(texts):
        name = names[i] if names else f"text {i}"
        if not text.strip():
            raise ValueError(f"{name}: must not be empty; pass a text with words in it")
        tokens, counts = _encoded(text, tokenizer)
        longest = max(longest, len(tokens) + (bos is not None))
        size = len(tokens) if length is None else length - (bos is not None)
        starts = range(0, len(tokens) - size + 1, size)
        pieces.append(
            [
                _document(
                    tokens[start : start + size],
                    None if counts is None else counts[start : start + size],
                    bos,
                    name if length is None else f"{name}, tokens {start}-{start + size}",
                )
                for start in starts
            ]
        )
    if not any(pieces):
        raise ValueError(
            f"length={length}: the longest text has only {longest} tokens; pass a longer text or a smaller length"
        )
    rounds = max(len(of_text) for of_text in pieces)
    in_turn = [of_text[i] for i in range(rounds) for of_text in pieces if i < len(of_text)]
    return in_turn[:limit]


def bos_of(tokenizer: Any) -> int | None:
    """The id that a tokenizer puts before every text by its own convention, or None."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    return bos if tokenizer("a")["input_ids"][:1] == [bos] else None


def as_documents(tokens: Any, vocabulary: int) -> list[Document]:
    """What a caller passed as tokens: one document or several, checked."""
    if isinstance(tokens, Document):
        found = [tokens]
    elif isinstance(tokens, Sequence) and not isinstance(tokens, str) and len(tokens) and not _is_id(tokens[0]):
        if not all(isinstance(item, (Document, Tensor, Sequence)) for item in tokens):
            raise ValueError(
                f"tokens with an item of the type {type(tokens[0]).__name__}: must be token ids, or documents; pass "
                'tokenizer(...)["input_ids"]'
            )
        found = [item if isinstance(item, Document) else Document(_as_ids(item)) for item in tokens]
    else:
        found = [Document(_as_ids(tokens))]
    for document in found:
        low, high = int(document.tokens.min()), int(document.tokens.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"tokens from {low} to {high}: must be in 0 .. {vocabulary - 1}; use the model's own tokenizer"
            )
    return found


def _is_id(item: object) -> bool:
    return isinstance(item, int) or (isinstance(item, Tensor) and item.dim() == 0)


def _as_ids(tokens: Any) -> Tensor:
    if not isinstance(tokens, (Tensor, Sequence)) or isinstance(tokens, str):
        raise ValueError(
            f'tokens of the type {type(tokens).__name__}: must be token ids; pass tokenizer(...)["input_ids"]'
        )
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"tokens: must be token ids, int64 [n]; {error}") from None
    return ids[0] if ids.dim() == 2 and ids.shape[0] == 1 else ids


def _encoded(text: str, tokenizer: Any) -> tuple[Tensor, Tensor | None]:
    """The ids of a text without special tokens, and the bytes of each where the tokenizer tells its place."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    # Not verbose: that a text is longer than the trained length is why it is here.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    tokens = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    if not fast:
        return tokens, None
    ends = torch.tensor([end for _, end in encoded["offset_mapping"]], dtype=torch.int64)
    widths = torch.tensor([0, *(len(character.encode("utf-8", "replace")) for character in text)])
    # Several tokens of one character all end where it ends: the first gets its bytes. None are lost between tokens.
    reached = widths.cumsum(0)[ends.cummax(0).values] if len(ends) else ends
    return tokens, reached.diff(prepend=reached.new_zeros(1))


def _document(tokens: Tensor, counts: Tensor | None, bos: int | None, name: str) -> Document:
    if bos is not None:
        tokens = torch.cat((tokens.new_tensor([bos]), tokens))
        counts = None if counts is None else torch.cat((counts.new_zeros(1), counts))
    return Document(tokens, bos, counts, name)

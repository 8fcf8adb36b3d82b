"""Texts as a model reads them: token ids, the bytes they stand for, and what stands before them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropex._checks import (
    describe,
    first_line,
    require_int,
    require_length,
    require_list,
    require_text,
    require_tokenizer,
    require_type,
)

__all__ = ["Document", "TextFile", "as_documents", "bos_of", "documents"]

_FIRST = 4096  # characters of a text that are read first


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


class TextFile:
    """A UTF-8 text file, of any size: read as far as it is needed.

    Args:
        path: of the file.

    Raises:
        ValueError: no file that can be read, an empty one, or one that is not UTF-8 text.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: str | None = None
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            raise ValueError(
                f"text {str(path)!r}: must be plain text, and JSON lines hold texts in a column; pass --dataset with "
                "its directory"
            )
        # A pipe can be read once.
        self._read = None if path.is_file() else self.start(None)
        if not self.start(_FIRST).strip() and not self.start(None).strip():
            raise ValueError(f"text {str(path)!r}: must not be empty; pass a file with text in it")

    def start(self, count: int | None) -> str:
        """The first characters; None: all."""
        if self._read is not None:
            return self._read[:count]
        try:
            with self.path.open(encoding="utf-8-sig", newline=None) as file:  # a byte order mark is no text
                text = file.read(count)
        except UnicodeDecodeError as error:
            raise ValueError(f"text {str(self.path)!r}: must be UTF-8 text, {first_line(error)}; convert it") from error
        except OSError as error:
            raise ValueError(f"text {str(self.path)!r}: must be a readable text file; {error.strerror}") from error
        if "\0" in text:
            raise ValueError(
                f"text {str(self.path)!r}: must be UTF-8 text, and it holds zero bytes, as UTF-16 and other binary "
                "files do; convert it"
            )
        return text


def documents(
    texts: str | TextFile | Iterable[str | TextFile],
    tokenizer: Any,
    *,
    length: int | None = None,
    limit: int | None = None,
    names: Sequence[str] = (),
) -> list[Document]:
    """Texts as documents for measuring, each by itself.

    Args:
        texts: one text, or several; each is read and tokenised as far as the documents need it.
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
    if isinstance(texts, Tensor) or not isinstance(texts, str | TextFile | Iterable):
        raise ValueError(f"texts of the type {type(texts).__name__}: must be a text or several; pass a list of them")
    found = [texts] if isinstance(texts, str | TextFile) else list(texts)
    for text in found:
        require_type("texts with", text, (str, TextFile), "a text; pass texts, not token ids")
    require_list("names", names, "texts")
    if length is not None:
        require_length("length", length, minimum=2, remedy="pass the tokens of a document, or None")
    if limit is not None:
        require_int("limit", limit, minimum=1, remedy="pass a number of documents, or None")
    if not found:
        raise ValueError("texts=[]: must hold at least one text; pass one")
    if names and len(names) != len(found):
        raise ValueError(f"{len(names)} names for {len(found)} texts: must be as many; pass one for each, or none")
    names = names or [f"text {i}" for i in range(len(found))]
    for text, name in zip(found, names, strict=True):
        if isinstance(text, str) and (not text or text.isspace()):
            raise ValueError(f"{name}: must not be empty; pass a text with words in it")
    bos = bos_of(tokenizer)
    pieces = [_pieces(text, name, tokenizer, length, bos) for text, name in zip(found, names, strict=True)]
    taken = [*itertools.islice(_in_turn(pieces), limit)]
    if not taken:
        longest = max(len(_encoded(_whole(text), tokenizer)[0]) for text in found) + (bos is not None)
        raise ValueError(
            f"length={length}: the longest text has only {longest} tokens; pass a longer text or a smaller length"
        )
    return taken


def _in_turn(pieces: list[Iterator[Document]]) -> Iterator[Document]:
    """The first document of each text, then the second of each, and so on."""
    while pieces:
        for piece in [*pieces]:
            if (document := next(piece, None)) is not None:
                yield document
            else:
                pieces.remove(piece)


def _whole(text: str | TextFile) -> str:
    return text if isinstance(text, str) else text.start(None)


def _pieces(text: str | TextFile, name: str, tokenizer: Any, length: int | None, bos: int | None) -> Iterator[Document]:
    """A text's documents, one after the other."""
    if length is None:
        yield _document(*_encoded(_whole(text), tokenizer), bos, name)
        return
    start, size = 0, length - (bos is not None)
    for tokens, counts in _growing(text, tokenizer, size):
        while start + size <= len(tokens):
            part = slice(start, start + size)
            told = None if counts is None else counts[part]
            yield _document(tokens[part], told, bos, f"{name}, tokens {start}-{start + size}")
            start += size


def _growing(text: str | TextFile, tokenizer: Any, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The first tokens of a text, each time about twice as many, and all of them in the end.

    How a text goes on decides only how its last words are cut into tokens. So the tokens that are given are those that
    the text has, too, where it is half as long again.
    """
    characters = max(_FIRST, 4 * size)
    while True:
        start = text[: characters * 3 // 2] if isinstance(text, str) else text.start(characters * 3 // 2)
        whole = len(start) < characters * 3 // 2
        tokens, counts = _encoded(start, tokenizer)
        if whole:
            yield tokens, counts
            return
        shorter, _ = _encoded(start[:characters], tokenizer)
        both = min(len(shorter), len(tokens))
        differs = (shorter[:both] != tokens[:both]).nonzero()
        certain = int(differs[0]) if len(differs) else both
        yield tokens[:certain], None if counts is None else counts[:certain]
        characters *= 2


def bos_of(tokenizer: Any) -> int | None:
    """The id that a tokenizer puts before every text by its own convention, or None."""
    require_tokenizer(tokenizer)
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
    require_text("text", text)
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

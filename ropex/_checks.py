"""Checks of user input, each with one form of message: what was passed, what is required, what to do."""

from __future__ import annotations

import math
import os
import reprlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LONGEST",
    "describe",
    "first_line",
    "require_bool",
    "require_choice",
    "require_dim",
    "require_int",
    "require_length",
    "require_list",
    "require_number",
    "require_path",
    "require_text",
    "require_tokenizer",
    "require_type",
    "shown",
]

LONGEST = 2**28  # tokens, the longest context length that is taken for meant


def require_number(
    name: str, value: object, *, minimum: float, maximum: float = math.inf, strict: bool = False, remedy: str
) -> None:
    """Raise `ValueError` unless `value` is a finite int or float, >= `minimum` (> when `strict`) and <= `maximum`."""
    # An int beyond float's range has no finite value here either.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        if (value > minimum or (value == minimum and not strict)) and value <= maximum:
            return
    required = f"{'>' if strict else '>='} {minimum:g}{f' and <= {maximum:g}' if maximum < math.inf else ''}"
    raise ValueError(f"{name}={shown(value)}: must be a finite number {required}; {remedy}")


def require_int(name: str, value: object, *, minimum: int, maximum: int = 2**63 - 1, remedy: str) -> None:
    """Raise `ValueError` unless `value` is an int >= `minimum` and <= `maximum`, at most what an int64 holds."""
    if isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum:
        return
    beyond = isinstance(value, int) and value > maximum
    raise ValueError(
        f"{name}={shown(value)}: must be an int >= {minimum}{f' and <= {maximum}' if beyond else ''}; {remedy}"
    )


def require_length(
    name: str, value: object, *, minimum: int = 1, remedy: str = "pass a context length in tokens"
) -> None:
    """Raise `ValueError` unless `value` is a context length in tokens that a machine may hold."""
    require_int(name, value, minimum=minimum, maximum=LONGEST, remedy=remedy)


def shown(value: object) -> str:
    """A value in a message; Python refuses to write integers of more than 4,300 digits."""
    if isinstance(value, int) and value.bit_length() > 10_000:
        return f"a number of {value.bit_length()} bits"
    return _REPR.repr(value)


_REPR = reprlib.Repr()  # of what may be nested or long without end
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 4, 300, 500, 5000
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 12


def require_dim(value: object) -> None:
    """Raise `ValueError` unless `value` can be a rotary dimension."""
    require_int("dim", value, minimum=2, maximum=2**16, remedy="pass the number of rotated channels of a head")
    if value % 2:  # type: ignore[operator]  # an int by now
        raise ValueError(f"dim={value}: must be even, since channels rotate in pairs; pass the rotary dimension")


def require_bool(name: str, value: object, *, remedy: str) -> None:
    """Raise `ValueError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be True or False; {remedy}")


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    names = list(choices)
    if value not in names:
        quoted = ", ".join(f'"{choice}"' for choice in names)
        raise ValueError(f"{name}={value!r}: must be one of {quoted}; pass one of them")


def require_type(name: str, value: object, kinds: type | tuple[type, ...], required: str) -> None:
    """Raise `ValueError` unless `value` is an instance of one of these types; `required` says which, and what to do."""
    if not isinstance(value, kinds):
        raise ValueError(f"{name}={shown(value)}: must be {required}")


def require_list(name: str, value: object, of: str) -> None:
    """Raise `ValueError` unless `value` is a list or another sequence of this, and no text."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ValueError(f"{name}={shown(value)}: must be a list of {of}; pass one")


def require_path(name: str, value: object) -> Path:
    """`value` as a path; raises `ValueError` unless it can be one."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if isinstance(text, str) and text and "\0" not in text and _is_name(text):
        return Path(text)
    raise ValueError(
        f"{name}={shown(value)}: must be the path of a file or directory; pass one, whose names have at most 255 bytes"
    )


def _is_name(text: str) -> bool:
    """Whether a text can be a path: its characters can stand in a file's name, and no name in it is too long."""
    try:
        return max(map(len, os.fsencode(text).split(os.sep.encode()))) <= 255
    except UnicodeEncodeError:
        return False


def require_text(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` is a text of whole characters."""
    require_type(name, value, str, "a text; pass one")
    try:
        str(value).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: must be UTF-8 text, and has half a character at {error.start}; read it with errors='replace'"
        ) from None


def require_tokenizer(value: object) -> None:
    """Raise `ValueError` unless `value` can be called like a tokenizer of transformers."""
    if not callable(value) or not hasattr(value, "bos_token_id"):
        raise ValueError(f"tokenizer={shown(value)}: must be a tokenizer of transformers; pass the model's")


def describe(x: Tensor) -> str:
    """A tensor in an error message: its dtype and shape."""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def first_line(error: BaseException) -> str:
    """What an error of somebody else says, in a line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__

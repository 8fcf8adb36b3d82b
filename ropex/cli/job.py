"""What a measuring command was asked for, in flags or in a YAML file, checked before a model is loaded."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

import ropex
from ropex._checks import require_choice, require_int, require_length, require_number, require_path, shown
from ropex.cli.console import split
from ropex.evaluation import tasks
from ropex.evaluation.compare import TRUNCATED
from ropex.evaluation.perplexity import Protocol, bin_edges, require_stride
from ropex.evaluation.retrieval import Scoring
from ropex.patching import OnScaled
from ropex.scaling.base import FrequencySchedule
from ropex.scaling.registry import accepted_options

__all__ = ["Job", "read_job"]

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Job:
    """A comparison; the fields are the flags of `ropex compare` and the keys of its YAML file.

    What stands in lists may also be written as one text with commas. `methods` may be a mapping of names to options,
    with `method` among them where the name is another.
    """

    model: str | None = None
    methods: Any = "none,linear,ntk,yarn"
    factor: float = 2.0
    text: str | None = None
    dataset: str | None = None
    split: str = "test"
    column: str = "text"
    length: int | None = 12288
    documents: int = 1
    protocol: str = "binned"
    bins: Any = "6"
    stride: int = 256
    tasks: Any = ()
    lengths: Any = ()
    depths: Any = "0.1,0.5,0.9"
    samples: int = 1
    seed: int = 0
    scoring: str = "likelihood"
    on_scaled: str = "error"
    dtype: str = "float32"
    device: str | None = None
    out: str | None = None

    def check(self) -> None:
        """Whatever can be wrong without the model; lists and names become what they say.

        Raises:
            ValueError: an unknown name, or a value that cannot be.
        """
        for name in ("model", "text", "dataset", "split", "column", "device", "out"):
            if not isinstance(value := getattr(self, name), str | None) or value == "":
                raise ValueError(f"{name}={shown(value)}: must be a text; write it in quotes, or leave it out")
        for name in ("model", "text", "out"):
            if (value := getattr(self, name)) is not None:
                require_path(name, value)
        self.schedules: dict[str, FrequencySchedule] = _schedules(self.methods, self.factor)
        self.tasks = _listed("tasks", self.tasks, str)
        self.lengths = _listed("lengths", self.lengths, int)
        self.depths = _listed("depths", self.depths, float)
        self.bins = _bins(self.bins)
        for name in self.tasks:
            require_choice("task", name, tasks())
        for depth in self.depths:
            require_number("depth", depth, minimum=0, maximum=1, remedy="pass a share of the text")
        require_choice("protocol", self.protocol, get_args(Protocol))
        require_choice("on_scaled", self.on_scaled, get_args(OnScaled))
        require_choice("scoring", self.scoring, get_args(Scoring))
        require_choice("dtype", self.dtype, _DTYPES)
        for name in ("documents", "samples", "stride"):
            require_int(name, getattr(self, name), minimum=1, remedy="pass how many")
        require_int("seed", self.seed, minimum=0, remedy="pass a number for the texts")
        if self.text is not None and self.dataset is not None:
            raise ValueError(
                f"text={self.text!r} and dataset={self.dataset!r}: must be one of them; leave out the other"
            )
        if self.length not in (0, None) or isinstance(self.length, bool):
            require_length("length", self.length, minimum=2, remedy="pass the tokens of each document")
            edges = bin_edges(self.bins, self.length)
            require_stride(self.protocol, self.stride, edges[1])
        elif not self.tasks:
            raise ValueError("length=0 without tasks: must measure something; pass a length, or tasks")
        if self.tasks and not self.lengths:
            raise ValueError("tasks without lengths: must have both; pass --lengths such as 4096,8192")
        for length in self.lengths:
            require_length("lengths", length, minimum=2, remedy="pass tokens, such as 4096,8192")
        self.device = _device(self.device)


class _Unique(yaml.SafeLoader):
    """Refuses a key that stands twice, of which the others would be lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (found := self.construct_object(key)) in seen:
                    problem = f"the key {found!r} stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(found)
        return dict(super().construct_mapping(node, deep))


def read_job(path: Path) -> Job:
    """The job that a YAML file describes.

    Raises:
        ValueError: no such file, no YAML, or an unknown key.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Unique)
    except OSError as error:
        raise ValueError(f"config {str(path)!r}: must be a YAML file; {error.strerror}") from error
    except RecursionError:
        raise ValueError(f"config {str(path)!r}: must be a YAML file, and is nested too deep; write it flat") from None
    except Exception as error:  # of the parser, of a tag's constructor, of the text
        raise ValueError(f"config {str(path)!r}: must be a YAML file; {' '.join(str(error).split())}") from error
    names = [field.name for field in dataclasses.fields(Job)]
    if not isinstance(content, Mapping):
        raise ValueError(f"config {str(path)!r}: must hold keys such as methods and length; it holds {shown(content)}")
    for key in content:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(names)}"
            raise ValueError(f"config {str(path)!r}: {key!r} is no key of a comparison; {hint}")
    return Job(**content)


def _schedules(methods: Any, factor: float) -> dict[str, FrequencySchedule]:
    """Schedules by name: `yarn`, or with options `ntk:alpha=4`; or a mapping of names to options."""
    if isinstance(methods, Mapping):
        asked = {}
        for name, options in methods.items():
            if not isinstance(options, Mapping | None):
                raise ValueError(
                    f"methods with {name}: {shown(options)}: must be options such as {{factor: 2}}; pass them"
                )
            if str(name) in asked:
                raise ValueError(f"methods with {name}: stands twice, as a number and as a text; rename one")
            asked[str(name)] = {str(key): value for key, value in (options or {}).items()}
        return {_free(name): _schedule(o.pop("method", name), o, factor) for name, o in asked.items()}
    found = {}
    for name in _listed("methods", methods, str):
        method, *options = name.split(":")
        given: dict[str, Any] = {}
        for option in options:
            key, equals, value = option.partition("=")
            if not equals:
                raise ValueError(f"methods with {name!r}: must be a method and options such as ntk:alpha=4; pass those")
            try:
                given[key] = yaml.safe_load(value)
            except Exception:  # of the parser, or of a date
                raise ValueError(f"methods with {name!r}: {value!r} is no value; pass one such as 4 or true") from None
        found[_free(name)] = _schedule(method, given, factor)
    return found


def _free(name: str) -> str:
    """A method's name, which must not be that of the row that is always there."""
    if name == TRUNCATED:
        raise ValueError(
            f'methods with "{TRUNCATED}": it is the row of the unpatched model, which is always there; leave it out, '
            f"or for the method of this name give its options, as in {TRUNCATED}:exponent=0"
        )
    return name


def _schedule(method: str, options: dict[str, Any], factor: float) -> FrequencySchedule:
    if "factor" in accepted_options(method, options.get("inner")):
        options = {"factor": factor} | options
    return ropex.schedule(method, **options)


def _listed(name: str, value: Any, kind: type) -> list[Any]:
    """A list of a YAML file, or of a text with commas."""
    parts = split(value, name) if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    parts = [] if value is None else parts
    try:
        found = [kind(part) for part in parts]
        if any(isinstance(part, bool) for part in parts):
            raise ValueError
        if any(isinstance(part, float) and part != kind(part) for part in parts):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        example = {int: "4096,8192", float: "0.1,0.9", str: "passkey,lines"}[kind]
        raise ValueError(f"{name}={shown(value)}: must be a list such as {example}; pass one") from None
    if len(set(found)) < len(found):
        raise ValueError(f"{name}={shown(value)}: must not repeat one; remove the second one")
    return found


def _bins(bins: Any) -> int | list[int]:
    try:
        numbers = [int(part) for part in (bins if isinstance(bins, list) else str(bins).split(","))]
        if isinstance(bins, list) and numbers != bins:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"bins={shown(bins)}: must be a number or edges such as 0,2048,4096; pass integers") from None
    return numbers if len(numbers) > 1 else numbers[0]


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(0, device=name).is_meta:
            raise RuntimeError("meta holds no numbers")
    except Exception as error:  # such as that of a package for the device
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"device={name!r}: must be a device of this machine; {first_line}") from None
    return name

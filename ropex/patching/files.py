"""A patch on disk: `ropex.json` says what it is, and a file beside it holds what its method has learned.

That file is named by its hash, and `ropex.json` is what commits: it is written after the data, and old data goes last.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ropex._checks import require_path
from ropex._disk import make_folder, writing
from ropex._version import __version__
from ropex.patching.detect import find_active
from ropex.patching.swap import channels_of
from ropex.patching.tables import Channels
from ropex.rotary import RotaryEmbedding
from ropex.rotation import Geometry
from ropex.scaling import FrequencySchedule
from ropex.scaling.registry import from_dict

__all__ = ["DESCRIPTION", "Saved", "SavedRope", "read", "restore", "save"]

DESCRIPTION = "ropex.json"
_FORMAT = 2
_WEIGHTS_OF_1 = "ropex.safetensors"
_WEIGHTS = re.compile(r"ropex(\.[0-9a-f]{16})?\.safetensors")
_KINDS: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "ropex": (str,),
    "torch": (str,),
    "model_type": (str, type(None)),
    "schedule": (dict,),
    "settings": (dict,),
    "ropes": (dict,),
    "channels": (str,),
    "softmax_factor": (int, float),
    "weights": (str, type(None)),
    "dtype": (str, type(None)),
    "hash": (str,),
}
_SETTINGS: dict[str, tuple[type, ...]] = {
    "angles": (str,),
    "precision": (str,),
    "sliding": (str,),
    "on_scaled": (str,),
    "seed": (int,),
    "data_rank": (int, type(None)),
    "trained_length": (int, type(None)),
}
_ROPE: dict[str, tuple[type, ...]] = {
    "geometry": (dict,),
    "turning": (list, type(None)),
    "layer_type": (str, type(None)),
    "scaled": (bool,),
}


@dataclass(frozen=True)
class SavedRope:
    """One of a patch's embeddings.

    Attributes:
        geometry: of the model.
        turning: which pairs turn in the model itself; None: all.
        layer_type: of the layers that it is for; None: all.
        scaled: whether it follows the patch's schedule, and not the model's own.
    """

    geometry: Geometry
    turning: tuple[bool, ...] | None
    layer_type: str | None
    scaled: bool


@dataclass(frozen=True)
class Saved:
    """What the files say.

    Attributes:
        directory: where they lie.
        schedule: with its options, not yet with what it has learned.
        settings: the other arguments of `patch`.
        ropes: the patch's embeddings, by name.
        channels: which channels of a head the model pairs.
        softmax_factor: by which the patch multiplies the model's softmax scale.
        model_type: of the model's config, if it had one.
        weights: what was learned, by name.
    """

    directory: Path
    schedule: FrequencySchedule
    settings: dict[str, Any]
    ropes: dict[str, SavedRope]
    channels: str
    softmax_factor: float
    model_type: str | None
    weights: dict[str, Tensor]

    def scaled_rope(self) -> SavedRope:
        """The one embedding that follows the schedule, as a config can say it.

        Raises:
            ValueError: there are several, or others that share its parameters and follow something else.
        """
        if len(self.ropes) > 1 and any(rope.layer_type is None for rope in self.ropes.values()):
            raise ValueError(
                f"{self.directory}: some layers keep the model's own angles and share their parameters with others, "
                'which no config can say; patch with sliding="scale", or load it with ropex.load'
            )
        scaled = [rope for rope in self.ropes.values() if rope.scaled]
        if len(scaled) > 1:
            raise ValueError(f"{self.directory}: several layer types are scaled; load it with ropex.load")
        return scaled[0]

    def trained_schedule(self) -> FrequencySchedule:
        """The schedule, with what it has learned."""
        name = next(name for name, rope in self.ropes.items() if rope.scaled)
        rope = RotaryEmbedding(self.ropes[name].geometry, self.schedule)
        with torch.no_grad():
            for parameter_name, parameter in rope.named_parameters(prefix=name):
                parameter.copy_(self.weights[parameter_name])
        return rope.eval().schedule


def save(model: nn.Module, directory: str | Path) -> None:
    """Write the files of a patched model; whoever reads them finds the earlier save, or this one."""
    spots = find_active(model)
    patched = spots[0].patched
    schedule = patched.rope.schedule
    try:
        described = json.loads(json.dumps(schedule.to_dict()))
        from_dict(described)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{schedule!r}: must be one of ropex.methods(), whose name a file can hold: {error}"
        ) from error
    weights = {name: value.detach().cpu().contiguous() for name, value in _learned(model).items()}
    data = to_bytes(weights) if weights else None
    digest = None if data is None else _hash_of(data)
    content = {
        "format": _FORMAT,
        "ropex": __version__,
        "torch": torch.__version__,
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "schedule": described,
        "settings": patched.settings,
        "ropes": {name: _as_json(rope) for name, rope in _ropes(model).items()},
        "channels": channels_of(model),
        "softmax_factor": patched.softmax_factor,
        "weights": digest,
        "dtype": _dtype_of(weights),
    }
    content["hash"] = _hash(content)
    text = json.dumps(content, indent=2) + "\n"
    directory = require_path("directory", directory)
    make_folder(directory)
    name = None if digest is None else _weights_name(digest)
    with writing(directory) as put:
        before = {path.name for path in directory.iterdir() if _WEIGHTS.fullmatch(path.name)}
        if name is not None and data is not None:
            put(name, functools.partial(Path.write_bytes, data=data))
        try:
            put(DESCRIPTION, functools.partial(Path.write_text, data=text, encoding="utf-8"))
        except BaseException:
            if name is not None and name not in before and content["hash"] not in _said(directory):
                (directory / name).unlink()  # which nothing names
            raise
        for old in before - {name}:
            (directory / old).unlink()


def read(directory: str | Path) -> Saved:
    """Read the files, and check that they are ours, whole, and unchanged.

    Raises:
        ValueError: they are not.
    """
    directory = require_path("directory", directory)
    path = directory / DESCRIPTION
    content = _description(directory)
    weights: dict[str, Tensor] = {}
    while content["weights"] is not None:
        data, before = _weights_of(directory, content["weights"]), content
        if data is not None:
            weights = _checked_weights(path, data, content)
            break
        if (content := _description(directory)) == before:
            raise ValueError(
                f"{directory / _weights_name(content['weights'])}: is missing, and {DESCRIPTION} says that it holds "
                "what was learned; copy both"
            )
    ropes = {name: _from_json(path, name, each) for name, each in content["ropes"].items()}
    _require(
        path, "ropes", content["ropes"], any(rope.scaled for rope in ropes.values()), "one that is scaled, or more"
    )
    try:
        schedule = from_dict(content["schedule"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: schedule: {error}") from error
    plain = {name: content[name] for name in ("settings", "channels", "softmax_factor", "model_type")}
    return Saved(directory=directory, schedule=schedule, ropes=ropes, weights=weights, **plain)


def _said(directory: Path) -> str:
    path = directory / DESCRIPTION
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _description(directory: Path) -> dict[str, Any]:
    """What `ropex.json` says, each field of the kind that it must have."""
    path = directory / DESCRIPTION
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{directory}: must be a directory with {DESCRIPTION}; pass one that Patch.save wrote"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: must be a file that can be read; {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON, and is not ({error}); save the patch anew") from error
    number = content.get("format") if isinstance(content, dict) else None
    if not isinstance(number, int) or number < 1 or "ropex" not in content:
        raise ValueError(f"{path}: was not written by ropex; pass a directory that Patch.save wrote")
    if number > _FORMAT:
        raise ValueError(
            f"{path}: has format {number}, written by ropex {content['ropex']}; this is ropex "
            f"{__version__}, which reads up to {_FORMAT}: update it"
        )
    kinds = {name: kind for name, kind in _KINDS.items() if number > 1 or name != "dtype"}
    if set(content) != set(kinds) or content["hash"] != _hash(content):
        raise ValueError(f"{path}: was changed after it was written (its hash does not fit); save the patch anew")
    _require_kinds(path, "", content, kinds)
    _require_kinds(path, "settings.", {"trained_length": None, **content["settings"]}, _SETTINGS)
    for name, rope in content["ropes"].items():
        _require(path, f"ropes.{name}", rope, isinstance(rope, dict), "an object")
        _require_kinds(path, f"ropes.{name}.", rope, _ROPE)
    _require(path, "channels", content["channels"], content["channels"] in get_args(Channels), "a layout of channels")
    factor = content["softmax_factor"]
    _require(path, "softmax_factor", factor, 0 < factor <= sys.float_info.max, "a finite number > 0")
    return {"dtype": None, **content}


def _require(path: Path, field: str, value: object, holds: bool, required: str) -> None:
    if not holds:
        raise ValueError(f"{path}: {field} is {value!r}: must be {required}; save the patch anew")


def _require_kinds(path: Path, prefix: str, content: dict[str, Any], kinds: dict[str, tuple[type, ...]]) -> None:
    """Raise unless an object has these fields, each of one of these types."""
    for name in {**kinds, **content}:
        _require(path, f"{prefix}{name}", content.get(name), name in kinds, "left out")
        _require(path, f"{prefix}{name}", "missing", name in content, "there")
        allowed = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds[name])
        value = content[name]
        fits = isinstance(value, kinds[name]) and (bool in kinds[name] or not isinstance(value, bool))
        _require(path, f"{prefix}{name}", value, fits, f"of the type {allowed}")


def restore(model: nn.Module, saved: Saved) -> None:
    """Check that a freshly patched model is the one that was saved, and load what had been learned.

    Raises:
        ValueError: another geometry, or weights of other names or shapes.
    """
    if (found := _ropes(model)) != saved.ropes:
        raise ValueError(
            f"{saved.directory}: was saved from a model of {saved.ropes} ({saved.model_type}), and "
            f"{type(model).__name__} has {found}; load it into the model that it was made for"
        )
    learned = _learned(model)
    shapes = [{name: tuple(value.shape) for name, value in each.items()} for each in (learned, saved.weights)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{saved.directory}: what was learned has {shapes[1]}, and the patch needs {shapes[0]}; save it anew"
        )
    with torch.no_grad():
        for name, value in saved.weights.items():
            learned[name].copy_(value)


def _learned(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a patch's schedules, by names that do not depend on where the model holds them."""
    return {
        name: parameter
        for spot in find_active(model)
        for rope_name, rope in spot.patched.ropes.items()
        for name, parameter in rope.named_parameters(prefix=rope_name)
    }


def _ropes(model: nn.Module) -> dict[str, SavedRope]:
    spots = find_active(model)
    ropes = {}
    for spot in spots:
        for layer_type, names in spot.patched.tables.items():
            for name in names:
                rope = cast(RotaryEmbedding, spot.patched.ropes[name])
                scaled = not name.endswith("kept")
                known = SavedRope(rope.geometry, spot.patched.turning.get(name), layer_type, scaled)
                ropes[f"{spot.path}.{name}" if len(spots) > 1 else name] = known
    return ropes


def _as_json(rope: SavedRope) -> dict[str, Any]:
    described = asdict(rope)
    return {**described, "geometry": {k: v for k, v in described["geometry"].items() if not k.startswith("_")}}


def _from_json(path: Path, name: str, described: dict[str, Any]) -> SavedRope:
    try:
        geometry = Geometry(**described["geometry"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: ropes.{name}.geometry: {error}; save the patch anew") from error
    turning = described["turning"]
    if turning is not None:
        bools = len(turning) == geometry.dim // 2 and all(isinstance(turns, bool) for turns in turning)
        _require(path, f"ropes.{name}.turning", turning, bools, f"a list of {geometry.dim // 2} times true or false")
        turning = tuple(turning)
    return SavedRope(geometry, turning, described["layer_type"], described["scaled"])


def _weights_name(digest: str) -> str:
    return f"ropex.{digest[:16]}.safetensors"


def _weights_of(directory: Path, digest: str) -> bytes | None:
    """The file with this hash; None where there is none."""
    for name in (_weights_name(digest), _WEIGHTS_OF_1):
        try:
            data = (directory / name).read_bytes()
        except FileNotFoundError:  # or a writer has put another save in the place of this one
            continue
        if _hash_of(data) != digest:
            raise ValueError(
                f"{directory / name}: was changed after it was written (its hash does not fit); save the patch anew"
            )
        return data
    return None


def _checked_weights(path: Path, data: bytes, content: dict[str, Any]) -> dict[str, Tensor]:
    try:
        weights = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: weights: must be a safetensors file: {error}; save the patch anew") from error
    for name, value in weights.items():
        found = str(value.dtype).removeprefix("torch.")
        fits = found == content["dtype"] if content["format"] > 1 else value.is_floating_point()
        _require(path, f"the dtype of the learned {name}", found, fits, content["dtype"] or "a floating-point one")
        finite = bool(torch.isfinite(value).all())
        _require(path, f"the learned {name}", value.flatten()[:4].tolist(), finite, "finite; train it anew")
    return weights


def _dtype_of(weights: dict[str, Tensor]) -> str | None:
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in weights.values()})
    if len(dtypes) > 1:
        raise ValueError(
            f"what was learned has the dtypes {', '.join(dtypes)}: must have one; cast the model as a whole"
        )
    return dtypes[0] if dtypes else None


def _hash(content: dict[str, Any]) -> str:
    """Of all that the file says, but for the hash itself."""
    said = {key: value for key, value in content.items() if key != "hash"}
    return _hash_of(json.dumps(said, sort_keys=True).encode())


def _hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

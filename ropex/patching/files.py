"""A patch on disk: `ropex.json` says what it is, `ropex.safetensors` holds what its method has learned."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ropex._version import __version__
from ropex.patching.detect import find_active
from ropex.patching.swap import channels_of
from ropex.rotary import RotaryEmbedding
from ropex.rotation import Geometry
from ropex.scaling import FrequencySchedule
from ropex.scaling.registry import from_dict

__all__ = ["DESCRIPTION", "WEIGHTS", "Saved", "SavedRope", "read", "restore", "save"]

DESCRIPTION, WEIGHTS = "ropex.json", "ropex.safetensors"
_FORMAT = 1
_KEYS = {
    "format",
    "ropex",
    "torch",
    "model_type",
    "schedule",
    "settings",
    "ropes",
    "channels",
    "softmax_factor",
    "weights",
    "hash",
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
    """Write the files of a patched model; each is complete or not there."""
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
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if weights:
        save_file(weights, directory / f"{WEIGHTS}.new")
        (directory / f"{WEIGHTS}.new").replace(directory / WEIGHTS)
    else:
        (directory / WEIGHTS).unlink(missing_ok=True)
    config = getattr(model, "config", None)
    content = {
        "format": _FORMAT,
        "ropex": __version__,
        "torch": torch.__version__,
        "model_type": getattr(config, "model_type", None),
        "schedule": described,
        "settings": patched.settings,
        "ropes": {name: _as_json(rope) for name, rope in _ropes(model).items()},
        "channels": channels_of(model),
        "softmax_factor": patched.softmax_factor,
        "weights": _hash_of((directory / WEIGHTS).read_bytes()) if weights else None,
    }
    content["hash"] = _hash(content)
    (directory / f"{DESCRIPTION}.new").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (directory / f"{DESCRIPTION}.new").replace(directory / DESCRIPTION)


def read(directory: str | Path) -> Saved:
    """Read the files, and check that they are ours, whole, and unchanged.

    Raises:
        ValueError: they are not.
    """
    directory = Path(directory)
    path = directory / DESCRIPTION
    if not path.is_file():
        raise ValueError(f"{directory}: must be a directory with {DESCRIPTION}; pass one that Patch.save wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON, and is not ({error}); save the patch anew") from error
    if not isinstance(content, dict) or "ropex" not in content or not _is_format(content.get("format")):
        raise ValueError(f"{path}: was not written by ropex; pass a directory that Patch.save wrote")
    if content["format"] > _FORMAT:
        raise ValueError(
            f"{path}: has format {content['format']}, written by ropex {content['ropex']}; this is ropex "
            f"{__version__}, which reads up to {_FORMAT}: update it"
        )
    if set(content) != _KEYS or content["hash"] != _hash(content):
        raise ValueError(f"{path}: was changed after it was written (its hash does not fit); save the patch anew")
    weights: dict[str, Tensor] = {}
    if content["weights"] is not None:
        weights = _read_weights(directory / WEIGHTS, content["weights"])
    ropes = {name: _from_json(each) for name, each in content["ropes"].items()}
    schedule = from_dict(content["schedule"])
    plain = {name: content[name] for name in ("settings", "channels", "softmax_factor", "model_type")}
    return Saved(directory=directory, schedule=schedule, ropes=ropes, weights=weights, **plain)


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
            f"{saved.directory / WEIGHTS}: holds {shapes[1]}, and the patch needs {shapes[0]}; save it anew"
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


def _from_json(described: dict[str, Any]) -> SavedRope:
    turning = described["turning"]
    geometry = Geometry(**described["geometry"])
    return SavedRope(
        geometry, None if turning is None else tuple(turning), described["layer_type"], described["scaled"]
    )


def _is_format(number: Any) -> bool:
    return isinstance(number, int) and number >= 1


def _read_weights(path: Path, wanted: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: is missing, and {DESCRIPTION} says that it holds what was learned; copy both")
    if _hash_of(path.read_bytes()) != wanted:
        raise ValueError(f"{path}: was changed after it was written (its hash does not fit); save the patch anew")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: must be a safetensors file: {error}") from error


def _hash(content: dict[str, Any]) -> str:
    """Of all that the file says, but for the hash itself."""
    said = {key: value for key, value in content.items() if key != "hash"}
    return _hash_of(json.dumps(said, sort_keys=True).encode())


def _hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

"""A patch for engines that do not know ropex: transformers, vLLM, llama.cpp."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ropex._checks import first_line, require_choice, require_path
from ropex._disk import make_folder, read_object, unfinished_folder
from ropex.patching import files
from ropex.patching.attention import settings_under
from ropex.patching.config import rope_parameters, silently, text_config, words_beside
from ropex.patching.gguf_file import write_gguf
from ropex.patching.module import PatchedRotary
from ropex.patching.native import divisors_of, written
from ropex.patching.patch import Patch, load
from ropex.patching.probe import Claim, fresh_rotary, makes_tables_of
from ropex.patching.swap import Rotating
from ropex.scaling import LongRoPE

__all__ = ["Export", "Target", "export"]

Target = Literal["transformers", "vllm", "gguf"]
_LOCAL = {"local_files_only": True, "trust_remote_code": False}  # nothing is downloaded, and no code of a model is run
# The names under which a checkpoint holds what a method has learned.
_LEARNED = re.compile(r"\.ropes\.\w+\.(learned\.|step$)")


@dataclass(frozen=True)
class Export:
    """What `export` wrote.

    Attributes:
        path: the new directory or file.
        rope_type: the type of scaling that it carries.
        length: the context length in tokens that it is good for.
        command: how to load or serve it.
        lost: what the engine will do otherwise than ropex, one sentence each.
    """

    path: Path
    rope_type: str
    length: int
    command: str
    lost: tuple[str, ...]

    def __str__(self) -> str:
        lost = "".join(f"\nnot the same: {sentence}" for sentence in self.lost)
        return f"wrote {self.path}: {self.rope_type}, {self.length} tokens\n{self.command}{lost}"


@silently()
def export(
    directory: str | Path,
    to: Target,
    out: str | Path,
    *,
    model: str | Path | None = None,
    length: int | None = None,
) -> Export:
    """Write a model with a saved patch so that an engine without ropex loads it.

    The config gets the engine's own type where there is one (`linear`, `yarn`, `llama3`, `dynamic`); any other method
    becomes one divisor per pair under the type `longrope`, with the amplitude. Both the names of transformers 5 and
    those of 4 are written. Nothing in `directory` or `model` is changed.

    Args:
        directory: where `Patch.save` wrote `ropex.json`.
        to: `transformers`; `vllm`; or `gguf`, for llama.cpp.
        out: the new directory, which must not exist or be empty; for `gguf` the new file.
        model: the directory of the model, with its config and weights; for `gguf` the converted file. By default
            `directory`, and the one GGUF file in it.
        length: the context length in tokens at which a method that depends on it is frozen.

    Raises:
        ValueError: files that do not fit, a method that the engine cannot be told, or an engine that would ignore it.
    """
    require_choice("to", to, get_args(Target))
    saved, out = files.read(directory), require_path("out", out)
    if to == "gguf":
        reach, amplitude = write_gguf(saved, out, model, length)
        inexact = (
            "llama.cpp multiplies by the amplitude as rope.scaling.attn_factor, which builds before 2024 do not read"
        )
        command = f"llama-server -m {out} -c {reach}"
        return Export(out, "rope_freqs", reach, command, (inexact,) if amplitude != 1 else ())
    source = saved.directory if model is None else require_path("model", model)
    config = read_config(source)
    for each in (source, saved.directory):
        _require_apart(each, out)
    patch = load(empty_model(source), saved.directory)  # which the patch must fit
    before = config.get("text_config", config).get(_length_key(patch.rotary))
    parameters, reach = _write_method(saved, config, length, to, patch)
    lost: list[str] = []
    if parameters["rope_type"] == "dynamic":
        lost.append("transformers follows the growing length in the middle of a generation, and its cache does not")
    if saved.softmax_factor != 1:
        lost.append(
            f"the amplitude {saved.softmax_factor**0.5:.4f}: the model normalises queries and keys after the rotation, "
            "which cancels it; the patch has it in the softmax scale"
        )
    if saved.settings["precision"] == "float32":
        lost.append('precision="float32": scores are computed in the dtype of the model')
    make_folder(out.parent)
    with unfinished_folder(out.parent) as made:
        checked = made / "config"
        checked.mkdir()
        (checked / "config.json").write_text(json.dumps(config), encoding="utf-8")
        _require_read_back(saved, checked, patch, parameters, reach, length)
        new = made / "model"  # complete before it gets its name
        ours = shutil.ignore_patterns("ropex.*", ".ropex*", "checkpoint-*")
        shutil.copytree(source, new, ignore=ours, copy_function=shutil.copyfile)
        for folder, _, _ in os.walk(new):  # which may be copies of folders that cannot be written
            Path(folder).chmod(Path(folder).stat().st_mode | 0o700)
        _drop_learned(new)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _update_lengths(new, before, reach)
        try:
            if out.exists():
                out.rmdir()  # empty, as was checked
            new.replace(out)
        except OSError as error:  # it is no longer empty
            raise ValueError(
                f"out={str(out)!r}: must be a new directory; {error.strerror}; pass another one"
            ) from error
    commands = {
        "transformers": f'AutoModelForCausalLM.from_pretrained("{out}")',
        "vllm": f"vllm serve {out} --max-model-len {reach}",
    }
    return Export(out, parameters["rope_type"], reach, commands[to], tuple(lost))


def _require_apart(source: Path, out: Path) -> None:
    """Raise where the new directory is not new, or would be copied into itself."""
    if out.is_symlink():
        raise ValueError(f"out={str(out)!r}: is a link; pass the path of a new directory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={str(out)!r}: must be a new or empty directory; pass another one")
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(
            f"out={str(out)!r}: lies in {str(source)!r}, which stays as it is; pass a directory outside of it"
        )


def read_config(source: Path) -> dict[str, Any]:
    """What a directory's `config.json` says.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    try:
        there = (source / "config.json").is_file()
    except OSError:  # of a name that is too long
        there = False
    if not there:
        raise ValueError(f"{str(source)[:300]!r}: must be a directory with config.json; pass the model's directory")
    return read_object(source / "config.json", "a model's config")


def empty_model(source: Path) -> Any:
    """The language model that a directory's config describes, on the meta device.

    Raises:
        ValueError: a config that transformers cannot make a model of.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM

    failure: Exception | None = None
    read_config(source)
    try:
        config = AutoConfig.from_pretrained(source, **_LOCAL)
    except Exception as error:  # a broken config can fail in as many ways as it has keys
        raise ValueError(f"{str(source)!r}: its config.json cannot be loaded: {error}") from error
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM):
        try:
            with torch.device("meta"):
                return auto.from_config(config, trust_remote_code=False)
        except Exception as error:  # in a class of its own
            failure = failure or error
    raise ValueError(f"{str(source)!r}: its config.json cannot be loaded: {failure}") from failure


def _write_method(
    saved: files.Saved, config: dict[str, Any], length: int | None, to: Target, patch: Patch
) -> tuple[dict[str, Any], int]:
    """Put the method in a config, in place: as the engine's own type, or as `longrope` where it takes no other.

    Returns:
        The parameters and the context length that they reach.
    """
    from transformers import AutoConfig

    rotary = patch.rotary
    text = config.get("text_config", config)
    text["ropex"] = {"trained_length": rotary.stated_length, **saved.schedule.to_dict()}
    if rotary.unchanged and length is None:  # the config says it already
        text[_length_key(rotary)] = rotary.target
        layer_type = next(rope.layer_type for rope in saved.ropes.values() if rope.scaled)
        return rope_parameters(rotary.config, layer_type), rotary.target
    before, refusal = copy.deepcopy(text), None
    for words in ({}, {"own_types": False}, {"own_types": False, "mscales": False}):
        layer_type, parameters, reach = _parameters(saved, length, **words)
        if to == "vllm" and not _for_vllm(saved, parameters, rotary.axes):
            continue
        text.clear()
        text |= copy.deepcopy(before)
        _write_parameters(text, layer_type, parameters, reach, rotary)
        try:
            AutoConfig.for_model(**copy.deepcopy(config))
        except Exception as error:  # in a class of its own
            refusal = error
        else:
            return parameters, reach
    raise ValueError(f"{saved.directory}: transformers does not take the config: {refusal}") from refusal


def _length_key(rotary: PatchedRotary) -> str:
    """By which name a config's file states the context length."""
    names: dict[str, str] = getattr(rotary.config, "attribute_map", {})
    return names.get("max_position_embeddings", "max_position_embeddings")


def _require_read_back(
    saved: files.Saved, new: Path, patch: Patch, parameters: dict[str, Any], reach: int, length: int | None
) -> None:
    """Raise unless a reader of the new config finds the parameters in it, and an attention and rotation as patched.

    Engines read the config as transformers does, which prefers one copy of the parameters to the other.
    """
    from transformers import AutoConfig

    rotary = patch.rotary
    if rotary.unchanged and length is None:
        return
    rope = saved.scaled_rope()
    config = text_config(AutoConfig.from_pretrained(new, **_LOCAL))
    read = rope_parameters(config, rope.layer_type)
    read["max_position_embeddings"] = config.max_position_embeddings
    said = {**parameters, "max_position_embeddings": reach}
    wrong = {key: read.get(key) for key, value in said.items() if _plain(read.get(key)) != _plain(value)}
    if wrong:
        wanted = {key: said[key] for key in wrong}
        raise ValueError(f"{saved.directory}: the new config would be read with {wrong}, and the patch has {wanted}")
    if saved.softmax_factor == 1:
        for module in patch.model.modules():
            made = settings_under(module, config, rotary.config) if isinstance(module, Rotating) else None
            for name in ("scaling", "softmax_scale"):
                if made is not None and name in made and made[name] != getattr(module, name):
                    raise ValueError(
                        f"{saved.directory}: an attention made of the new config has {name}={made[name]}, and the "
                        f"patch {getattr(module, name)}"
                    )
    if parameters["rope_type"] == "dynamic" or rotary.unchanged:  # it follows each length; or nothing was changed
        return
    trained = rope.geometry.trained_length
    divisors, amplitude = divisors_of(saved.trained_schedule(), rope.geometry, rope.turning, length)
    schedule = LongRoPE(max(reach / trained, 1.0), divisors, divisors, amplitude=amplitude)
    count = max(rotary.axes) + 1 if rotary.axes is not None else None
    lengths = (min(64, reach), min(trained, reach), reach)
    with torch.device("cpu"):
        fresh = fresh_rotary(type(patch.model).__name__, rotary.original, config)
        claim = Claim(schedule, rope.geometry, lengths, None, rope.layer_type, count, rotary.axes)
        if not makes_tables_of(fresh, rotary.layout, claim):
            raise ValueError(f"{saved.directory}: the new config makes other cos and sin than the patch")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _parameters(saved: files.Saved, length: int | None, **words: bool) -> tuple[str | None, dict[str, Any], int]:
    """The layer type that the parameters are for, the parameters, and the context length that they reach."""
    rope, schedule = saved.scaled_rope(), saved.trained_schedule()
    parameters = written(schedule, rope.geometry, rope.turning, length, **words)
    reach = length or schedule.target_length(rope.geometry.trained_length)
    if parameters["rope_type"] == "dynamic":  # which counts from what the config says is the maximum
        reach = rope.geometry.trained_length
    return rope.layer_type, parameters, reach


def _write_parameters(
    text: dict[str, Any], layer_type: str | None, parameters: dict[str, Any], reach: int, rotary: PatchedRotary
) -> None:
    """Put the parameters in a config, in the words of transformers 5 and, where there are any, of 4.

    What else a config says of its rotary embedding is taken from the model's own, which transformers has read.
    """
    beside = words_beside(rope_parameters(rotary.config, layer_type), widened=rotary.settings["on_scaled"] == "keep")
    whole = {**beside, **parameters}
    text.pop("rope_scaling", None)
    if layer_type is not None:
        text["rope_parameters"] = {**rotary.config.rope_parameters, layer_type: whole}
    else:
        text["rope_parameters"] = whole
        legacy = {key: value for key, value in whole.items() if key != "rope_theta"}
        text["rope_theta"] = parameters["rope_theta"]
        text["rope_scaling"] = None if legacy == {"rope_type": "default"} else legacy
        if "partial_rotary_factor" in whole:
            text["partial_rotary_factor"] = whole["partial_rotary_factor"]
        if "rotary_pct" in text or text.get("model_type") == "gpt_neox":
            text["rotary_pct"] = whole.get("partial_rotary_factor", text.get("rotary_pct", 0.25))
            text["rotary_emb_base"] = parameters["rope_theta"]
    text[_length_key(rotary)] = reach
    if "original_max_position_embeddings" in text:
        text["original_max_position_embeddings"] = parameters.get("original_max_position_embeddings", reach)


def _for_vllm(saved: files.Saved, parameters: dict[str, Any], axes: tuple[int, ...] | None) -> bool:
    """Whether vLLM and SGLang follow these parameters; False: `longrope` may do instead."""
    kind, halves = parameters["rope_type"], saved.channels == "half"
    if kind == "dynamic":
        raise ValueError(
            f"{saved.directory}: vLLM and SGLang know one length alone, and serve {saved.schedule!r} unscaled: pass "
            "length=, the context length in tokens to freeze it at"
        )
    if kind == "yarn":
        # SGLang and older versions of vLLM read neither of these; for MLA they read the pair of mscale themselves.
        unread = {"attention_factor", "truncate", *(["mscale"] if halves else [])} & set(parameters)
        return not unread
    if kind == "longrope" and (not halves or axes is not None):
        pairs = f"pairs {saved.channels} channels" if not halves else "has positions with several axes"
        raise ValueError(
            f"{saved.directory}: {pairs}, and vLLM takes one divisor per pair only for halves of text models; use a "
            'method with a type of its own ("linear", "yarn", "llama3")'
        )
    return kind != "longrope" or "long_mscale" in parameters  # it does not read attention_factor


def _drop_learned(out: Path) -> None:
    """Rewrite the weights without what a method has learned, which is in the config by now."""
    for path in sorted(out.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as weights:
                names = list(weights.keys())
                if not any(map(_LEARNED.search, names)):
                    continue
                kept = {name: weights.get_tensor(name) for name in names if not _LEARNED.search(name)}
                metadata = weights.metadata()
            save_file(kept, path, metadata)
        except SafetensorError as error:
            raise ValueError(f"{path.name}: cannot be read and written: {first_line(error)}") from error
    for path in sorted(out.glob("pytorch_model*.bin")):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{path.name}: must hold tensors and nothing else: {first_line(error)}; save the model as safetensors"
            ) from error
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise ValueError(f"{path.name}: must hold tensors by name; save the model as safetensors")
        if any(map(_LEARNED.search, state)):
            torch.save({name: value for name, value in state.items() if not _LEARNED.search(name)}, path)
    for index in (*out.glob("*.safetensors.index.json"), *out.glob("*.bin.index.json")):
        content = read_object(index, "the index of a model's weights")
        if not isinstance(places := content.get("weight_map"), dict):
            raise ValueError(f"{index.name}: must have a weight_map; save the model anew")
        content["weight_map"] = {name: place for name, place in places.items() if not _LEARNED.search(name)}
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _update_lengths(out: Path, before: int | None, reach: int) -> None:
    """Raise the tokenizer's length, and that of generation where it was the model's."""
    for name, key, old in (
        ("tokenizer_config.json", "model_max_length", None),
        ("generation_config.json", "max_length", before),
    ):
        path = out / name
        content = read_object(path, "settings") if path.is_file() else {}
        stated = content.get(key)
        if isinstance(stated, int) and stated < reach and old in (None, stated):
            content[key] = reach
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

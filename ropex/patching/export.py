"""A patch for engines that do not know ropex: transformers, vLLM, llama.cpp."""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ropex._checks import require_choice
from ropex.patching import files
from ropex.patching.config import without_scaling
from ropex.patching.native import divisors_of, written
from ropex.rotary import RotaryEmbedding
from ropex.scaling import FrequencySchedule

__all__ = ["Export", "Target", "export"]

Target = Literal["transformers", "vllm", "gguf"]
# The names under which a checkpoint holds what a method has learned.
_LEARNED = re.compile(r"\.ropes\.\w+\.(learned\.|step$)")
# Architectures whose loader in llama.cpp reads the tensor `rope_freqs.weight`.
_GGUF_READS_FREQUENCIES = ("llama",)


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
    saved = files.read(directory)
    if to == "gguf":
        return _to_gguf(saved, Path(out), model, length)
    source, out = Path(model if model is not None else directory), Path(out)
    config_path = source / "config.json"
    if not config_path.is_file():
        raise ValueError(f"{source}: must hold the model's config.json; pass model=, the model's directory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={str(out)!r}: must be a new or empty directory; pass another one")
    config = json.loads(config_path.read_text(encoding="utf-8"))
    before = config.get("text_config", config).get("max_position_embeddings")
    parameters, reach = _write_method(saved, config, length, to)
    lost: list[str] = []
    if to == "vllm":
        lost += _for_vllm(saved, parameters)
    elif parameters["rope_type"] == "dynamic":
        lost.append("transformers follows the growing length in the middle of a generation, and its cache does not")
    if saved.softmax_factor != 1:
        lost.append(
            f"the amplitude {saved.softmax_factor**0.5:.4f}: the model normalises queries and keys after the rotation, "
            "which cancels it; the patch has it in the softmax scale"
        )
    if saved.settings["precision"] == "float32":
        lost.append('precision="float32": scores are computed in the dtype of the model')
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".ropex-") as made:
        new = Path(made) / "model"  # complete before it gets its name
        shutil.copytree(source, new, ignore=shutil.ignore_patterns("ropex.*", "checkpoint-*", out.name))
        _drop_learned(new)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _update_lengths(new, before, reach)
        if out.exists():
            out.rmdir()  # empty, as was checked
        new.replace(out)
    commands = {
        "transformers": f'AutoModelForCausalLM.from_pretrained("{out}")',
        "vllm": f"vllm serve {out} --max-model-len {reach}",
    }
    return Export(out, parameters["rope_type"], reach, commands[to], tuple(lost))


def _write_method(
    saved: files.Saved, config: dict[str, Any], length: int | None, to: Target
) -> tuple[dict[str, Any], int]:
    """Put the method in a config, in place: as the engine's own type, or as `longrope` where its class takes no other.

    Returns:
        The parameters and the context length that they reach.
    """
    from transformers import AutoConfig

    text = config.get("text_config", config)
    text["ropex"] = {"trained_length": _rope(saved).geometry.trained_length, **saved.schedule.to_dict()}
    before = copy.deepcopy(text)
    for own_types in (True, False):
        layer_type, parameters, reach = _parameters(saved, length, own_types=own_types)
        # vLLM multiplies where transformers replaces the amplitude, and has no word for a ramp that is not truncated.
        if to == "vllm" and parameters["rope_type"] == "yarn" and {"attention_factor", "truncate"} & set(parameters):
            continue
        text.clear()
        text |= copy.deepcopy(before)
        _write_parameters(text, layer_type, parameters, reach)
        try:
            AutoConfig.for_model(**copy.deepcopy(config))
        except Exception as error:  # in a class of its own
            refusal = error
        else:
            return text["rope_parameters"] if layer_type is None else text["rope_parameters"][layer_type], reach
    raise ValueError(f"{saved.directory}: transformers does not take the config: {refusal}") from refusal


def _rope(saved: files.Saved) -> files.SavedRope:
    """The one embedding that follows the schedule."""
    if len(saved.ropes) > 1 and any(rope.layer_type is None for rope in saved.ropes.values()):
        raise ValueError(
            f"{saved.directory}: some layers keep the model's own angles and share their parameters with others, which "
            'no config can say; patch with sliding="scale", or load it with ropex.load'
        )
    scaled = [rope for rope in saved.ropes.values() if rope.scaled]
    if len(scaled) > 1:
        raise ValueError(f"{saved.directory}: several layer types are scaled; load it with ropex.load")
    return scaled[0]


def _schedule(saved: files.Saved) -> FrequencySchedule:
    """The schedule, with what it has learned."""
    name = next(name for name, rope in saved.ropes.items() if rope.scaled)
    rope = RotaryEmbedding(saved.ropes[name].geometry, saved.schedule)
    with torch.no_grad():
        for parameter_name, parameter in rope.named_parameters(prefix=name):
            parameter.copy_(saved.weights[parameter_name])
    return rope.eval().schedule


def _parameters(saved: files.Saved, length: int | None, *, own_types: bool) -> tuple[str | None, dict[str, Any], int]:
    """The layer type that the parameters are for, the parameters, and the context length that they reach."""
    rope, schedule = _rope(saved), _schedule(saved)
    parameters = written(schedule, rope.geometry, rope.turning, length, own_types=own_types)
    reach = length or schedule.target_length(rope.geometry.trained_length)
    if parameters["rope_type"] == "dynamic":  # which counts from what the config says is the maximum
        reach = rope.geometry.trained_length
    return rope.layer_type, parameters, reach


def _write_parameters(text: dict[str, Any], layer_type: str | None, parameters: dict[str, Any], reach: int) -> None:
    """Put the parameters in a config, in the words of transformers 5 and, where there are any, of 4."""
    before = text.get("rope_parameters") or {}
    if layer_type is not None:
        text["rope_parameters"] = {**before, layer_type: parameters}
    else:
        kept = without_scaling({**(text.get("rope_scaling") or {}), **before})
        text["rope_parameters"] = {**kept, **parameters}
        legacy = {key: value for key, value in text["rope_parameters"].items() if key != "rope_theta"}
        text["rope_theta"] = parameters["rope_theta"]
        text["rope_scaling"] = None if legacy == {"rope_type": "default"} else legacy
        if "partial_rotary_factor" in kept:
            text["partial_rotary_factor"] = kept["partial_rotary_factor"]
        if "rotary_pct" in text or text.get("model_type") == "gpt_neox":
            text["rotary_pct"] = kept.get("partial_rotary_factor", text.get("rotary_pct", 0.25))
            text["rotary_emb_base"] = parameters["rope_theta"]
    text["max_position_embeddings"] = reach
    if "original_max_position_embeddings" in text:
        text["original_max_position_embeddings"] = parameters.get("original_max_position_embeddings", reach)


def _for_vllm(saved: files.Saved, parameters: dict[str, Any]) -> Iterator[str]:
    """Make parameters vLLM's, and say what it does otherwise."""
    if parameters["rope_type"] == "longrope":
        if saved.channels != "half":
            raise ValueError(
                f"{saved.directory}: pairs {saved.channels} channels, and vLLM takes one divisor per pair only for "
                'halves; use a method with a type of its own ("linear", "yarn", "llama3")'
            )
        for name in ("short_mscale", "long_mscale"):  # it does not read attention_factor
            parameters[name] = parameters["attention_factor"]
    if parameters["rope_type"] == "dynamic":
        yield "vLLM scales every context for the longest one, whatever its length"


def _drop_learned(out: Path) -> None:
    """Rewrite the weights without what a method has learned, which is in the config by now."""
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            names = list(weights.keys())
            if not any(map(_LEARNED.search, names)):
                continue
            kept = {name: weights.get_tensor(name) for name in names if not _LEARNED.search(name)}
            metadata = weights.metadata()
        save_file(kept, path, metadata)
    for path in sorted(out.glob("pytorch_model*.bin")):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if any(map(_LEARNED.search, state)):
            torch.save({name: value for name, value in state.items() if not _LEARNED.search(name)}, path)
    for index in (*out.glob("*.safetensors.index.json"), *out.glob("*.bin.index.json")):
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {k: v for k, v in content["weight_map"].items() if not _LEARNED.search(k)}
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _update_lengths(out: Path, before: int | None, reach: int) -> None:
    """Raise the tokenizer's length, and that of generation where it was the model's."""
    for name, key, old in (
        ("tokenizer_config.json", "model_max_length", None),
        ("generation_config.json", "max_length", before),
    ):
        path = out / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        stated = content.get(key)
        if isinstance(stated, int) and stated < reach and old in (None, stated):
            content[key] = reach
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def _to_gguf(saved: files.Saved, out: Path, model: str | Path | None, length: int | None) -> Export:
    """A copy of a converted file with one divisor per pair as the tensor `rope_freqs.weight`."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError('to="gguf" needs the gguf package: pip install gguf') from error
    source = Path(model) if model is not None else _one_gguf(saved.directory)
    if out.exists():
        raise ValueError(f"out={str(out)!r}: exists; pass a new file name")
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, OSError, IndexError) as error:
        raise ValueError(f"{source}: must be a GGUF file that llama.cpp's converter wrote: {error}") from error
    field = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    arch = field.contents() if field is not None else None
    if arch not in _GGUF_READS_FREQUENCIES:
        raise ValueError(
            f'{source}: has the architecture "{arch}", whose loader in llama.cpp does not read rope_freqs.weight, so '
            f"that the patch would be ignored: must be {' or '.join(_GGUF_READS_FREQUENCIES)}; serve it with "
            "transformers or vLLM"
        )
    rope, schedule = _rope(saved), _schedule(saved)
    divisors, amplitude = divisors_of(schedule, rope.geometry, rope.turning, length)
    reach = length or schedule.target_length(rope.geometry.trained_length)
    dimension = reader.get_field(gguf.Keys.Rope.DIMENSION_COUNT.format(arch=arch))
    if dimension is not None and int(dimension.contents()) != rope.geometry.dim:
        raise ValueError(
            f"{source}: rotates {dimension.contents()} channels, and the patch {rope.geometry.dim}: convert the model "
            "that the patch was made for"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.new")
    writer = gguf.GGUFWriter(partial, arch=arch)
    _copy_fields(gguf, reader, writer, arch)
    writer.add_context_length(reach)
    if amplitude != 1:
        writer.add_rope_scaling_attn_factors(amplitude)
    for tensor in reader.tensors:
        if tensor.name != "rope_freqs.weight":
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor("rope_freqs.weight", torch.tensor(divisors, dtype=torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(out)
    lost = ("llama.cpp multiplies by the amplitude as rope.scaling.attn_factor, which builds before 2024 do not read",)
    command = f"llama-server -m {out} -c {reach}"
    return Export(out, "rope_freqs", reach, command, lost if amplitude != 1 else ())


def _one_gguf(directory: Path) -> Path:
    found = sorted(directory.glob("*.gguf"))
    if len(found) != 1:
        raise ValueError(
            f"{directory}: holds {len(found)} GGUF files; pass model=, the file that llama.cpp's "
            "convert_hf_to_gguf.py made of the model"
        )
    return found[0]


def _copy_fields(gguf: Any, reader: Any, writer: Any, arch: str) -> None:
    replaced = {gguf.Keys.General.ARCHITECTURE, gguf.Keys.LLM.CONTEXT_LENGTH.format(arch=arch)}
    for name, field in reader.fields.items():
        if name in replaced or name.startswith(("GGUF.", f"{arch}.rope.scal")):
            continue
        kind, *inner = field.types
        writer.add_key_value(name, field.contents(), kind, sub_type=inner[-1] if inner else None)

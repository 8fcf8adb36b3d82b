"""A patch in a GGUF file, for llama.cpp."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ropex._checks import require_path
from ropex._disk import make_folder, unfinished_folder
from ropex.patching.files import Saved
from ropex.patching.native import divisors_of
from ropex.rotation import Geometry

__all__ = ["write_gguf"]

# Architectures whose loader in llama.cpp reads the tensor `rope_freqs.weight`.
_READS_FREQUENCIES = ("llama",)


def write_gguf(saved: Saved, out: Path, model: str | Path | None, length: int | None) -> tuple[int, float]:
    """Write a copy of a converted file with one divisor per pair as the tensor `rope_freqs.weight`.

    Returns:
        The context length in tokens that it reaches, and the amplitude that it carries.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError('to="gguf" needs the gguf package: pip install gguf') from error
    source = require_path("model", model) if model is not None else _one_file(saved.directory)
    if out.exists() or out.is_symlink():
        raise ValueError(f"out={str(out)!r}: exists; pass a new file name")
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, OSError, IndexError) as error:
        raise ValueError(f"{source}: must be a GGUF file that llama.cpp's converter wrote: {error}") from error
    field = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    arch = field.contents() if field is not None else None
    if arch not in _READS_FREQUENCIES:
        raise ValueError(
            f'{source}: has the architecture "{arch}", whose loader in llama.cpp does not read rope_freqs.weight, so '
            f"that the patch would be ignored: must be {' or '.join(_READS_FREQUENCIES)}; serve it with "
            "transformers or vLLM"
        )
    rope, schedule = saved.scaled_rope(), saved.trained_schedule()
    divisors, amplitude = divisors_of(schedule, rope.geometry, rope.turning, length)
    reach = length or schedule.target_length(rope.geometry.trained_length)
    _require_fits(gguf, reader, source, arch, rope.geometry)
    make_folder(out.parent)
    with unfinished_folder(out.parent) as made:
        writer = gguf.GGUFWriter(made / "model.gguf", arch=arch)
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
        (made / "model.gguf").replace(out)
    return reach, amplitude


def _require_fits(gguf: Any, reader: Any, source: Path, arch: str, geometry: Geometry) -> None:
    """Raise unless a file is whole, and of the model that the patch was made for."""

    def said(key: str, default: Any) -> Any:
        field = reader.get_field(key.format(arch=arch))
        return field.contents() if field is not None else default

    if (shards := said(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, 1)) > 1:
        raise ValueError(f"{source}: is one of {shards} files; join them with llama-gguf-split --merge first")
    if (dimension := said(gguf.Keys.Rope.DIMENSION_COUNT, geometry.dim)) != geometry.dim:
        raise ValueError(
            f"{source}: rotates {dimension} channels, and the patch {geometry.dim}: convert the model "
            "that the patch was made for"
        )
    base = said(gguf.Keys.Rope.FREQ_BASE, 10_000.0)  # llama.cpp's default
    if not math.isclose(base, geometry.base, rel_tol=1e-6):
        raise ValueError(
            f"{source}: has the base {base:g}, and the patch {geometry.base:g}: convert the model that the patch was "
            "made for"
        )


def _one_file(directory: Path) -> Path:
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

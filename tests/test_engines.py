"""Exports in the engines' own code where it is installed; `tools/engines` measures them and writes the figures down."""

from __future__ import annotations

import importlib.util
import json
import types
from pathlib import Path

import pytest

import ropex

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def tool(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / "engines" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", sorted(ropex.methods()))
def test_llama_cpp_gives_the_patched_logits(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.syspath_prepend(ROOT / "tools" / "engines")
    gguf_logits = tool("gguf_logits")
    row = gguf_logits.row(method, gguf_logits.options_of(method, gguf_logits.TRAINED))
    assert row["error"] < 1e-4
    assert method == "none" or row["effect"] > 1


def test_the_published_figures_of_llama_cpp() -> None:
    published = json.loads((RESULTS / "llama_cpp.json").read_text(encoding="utf-8"))["methods"]
    assert set(published) == set(ropex.methods())
    assert max(row["error"] for row in published.values()) < 1e-4


def test_the_published_figures_of_vllm_and_sglang() -> None:
    """Every exported method, at float32's own error over the positions; what is not is named."""
    published = json.loads((RESULTS / "engines.json").read_text(encoding="utf-8"))
    assert set(published["engines"]) == {"vllm", "sglang"}
    assert set(ropex.methods()) <= set(published["methods"])
    for row in published["methods"].values():
        for engine in published["engines"]:
            assert row[engine]["export"] < 1e-3

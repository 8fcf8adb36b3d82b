"""Rope sections of released models: read as what the model does, and kept as it is.

Each file in `configs/` is one release: public facts, as in its `config.json`. To add a model, add a file: `model_type`
(`as` where transformers has no such type, and its code is that of another), `head_dim`, the section as released, and in
`expect` what `ropex.inspect` shall say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import ropex
from tests.families import EXPERTS, FIVE, MLA, SIZES

pytestmark = pytest.mark.skipif(not FIVE, reason="read as transformers 5 reads it")

RELEASES = {
    path.stem: json.loads(path.read_text()) for path in sorted(Path(__file__).with_name("configs").glob("*.json"))
}
LENGTH = 48
SMALL = {"n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
SMALL |= {
    "index_n_heads": 4,
    "index_head_dim": 128,
    "index_topk": 64,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
}


def tiny(release: dict[str, Any]) -> nn.Module:
    """A random model of four small layers with this rope section, and heads of the width that the release has."""
    family, section = release.get("as", release["model_type"]), dict(release["config"])
    sizes = {**SIZES, **EXPERTS, **SMALL, "num_hidden_layers": release.get("layers", 4)}
    sizes |= {"head_dim": release["head_dim"]}
    if "qk_rope_head_dim" in section:
        heads = ("qk_rope_head_dim", "qk_nope_head_dim")
        sizes |= MLA | {"head_dim": release["head_dim"]}
        section = {key: value for key, value in section.items() if key not in MLA or key in heads}
    sizes["hidden_size"] = 4 * sizes["head_dim"]  # where no head_dim is read, heads are as wide
    if len(section.get("layer_types", ())) > 4:
        section["layer_types"] = section["layer_types"][:4]
    del sizes["max_position_embeddings"]
    config = AutoConfig.for_model(family, **{**sizes, **json.loads(json.dumps(section))})
    config.vocab_size = SIZES["vocab_size"]
    torch.manual_seed(0)
    causal = type(config) in AutoModelForCausalLM._model_mapping
    model = (AutoModelForCausalLM if causal else AutoModel).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.0 / parameter.shape[-1] ** 0.5)
    return model


def described(seen: ropex.Inspection) -> dict[str, Any]:
    """What an inspection says of a model's own scaling, as the files spell it."""
    own = seen.own
    return {
        "scaling": seen.scaling,
        "method": None if own is None else own.method,
        "factor": getattr(own, "factor", None),
        "trained_length": seen.geometry.trained_length if seen.length_known else None,
        "length": seen.length,
        "layers": {f"{kind.name}, {kind.window or 'all'}, {kind.geometry.base:g}": kind.layers for kind in seen.kinds},
    }


@pytest.mark.parametrize("name", RELEASES)
def test_a_release(name: str) -> None:
    release = RELEASES[name]
    if release.get("as", release["model_type"]) not in CONFIG_MAPPING_NAMES:
        pytest.skip("not in this version of transformers")
    model = tiny(release)
    if reason := release["expect"].get("refused"):
        with pytest.raises(ropex.UnsupportedModelError, match=reason):
            ropex.inspect(model)
        return
    seen = ropex.inspect(model)
    assert described(seen) == release["expect"]
    ids = torch.randint(3, SIZES["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(0))
    # The last token stands far beyond the trained length, and what follows the length follows it.
    near = torch.arange(LENGTH)[None]
    far = torch.cat((near[:, :-1], torch.tensor([[2 * seen.geometry.trained_length]])), dim=1)
    with torch.no_grad():
        want = [model(input_ids=ids, position_ids=positions)[0][:, :-1] for positions in (near, far)]
        with ropex.patch(model, None if seen.scaling else "none", on_scaled="keep", sliding="scale"):
            got = [model(input_ids=ids, position_ids=positions)[0][:, :-1] for positions in (near, far)]
            assert ropex.inspect(model).written == (seen.scaling or "default")
    for has, wanted in zip(got, want, strict=True):
        assert (has - wanted).abs().max() < 1e-5 * max(1.0, wanted.abs().max().item())


def test_there_are_many() -> None:
    assert len(RELEASES) >= 50
    assert {"linear", "dynamic", "yarn", "llama3", "longrope", None} <= {
        each["expect"].get("scaling") for each in RELEASES.values()
    }

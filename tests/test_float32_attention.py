"""`precision="float32"`: rotated queries and keys stay float32 through the scores, in a model of any dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ropex
from tests.families import logits_of, model_of, tokens
from tests.oracles import tiny_model, tiny_tokens

FAMILIES = ["llama", "qwen3", "gpt_neox", "phi", "cohere", "gemma2", "deepseek_v3", "gpt_oss", "nanochat"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float32_model_is_the_same(family: str) -> None:
    model, ids = model_of(family), tokens()
    with ropex.patch(model, "yarn", factor=4, sliding="scale"):
        want = logits_of(model, ids)
    with ropex.patch(model, "yarn", factor=4, sliding="scale", precision="float32"):
        assert (logits_of(model, ids) - want).abs().max() < 1e-5
        assert ropex.inspect(model).precision == "float32"
    assert ropex.inspect(model).precision == "model"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_model_attends_in_float32(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(family).to(torch.bfloat16), tokens(50)
    model.set_attn_implementation("eager")
    want = logits_of(model, ids).float()
    seen: list[torch.dtype] = []
    softmax = nn.functional.softmax

    def watched(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        seen.append(x.dtype)
        return softmax(x, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "softmax", watched)
    with ropex.patch(model, "none", precision="float32", sliding="scale"):
        seen.clear()  # what a patch looks at is not what the model does
        got = logits_of(model, ids)
    assert got.dtype == torch.bfloat16
    scores = [dtype for dtype in seen if dtype in (torch.float32, torch.bfloat16)]
    assert scores
    assert scores[0] == torch.float32
    assert (got.float() - want).abs().max() < 0.05 * want.abs().max() + 0.01


def test_scores_depend_on_relative_positions_alone() -> None:
    """A shift of all positions changes nothing but the last bits, where a bfloat16 store changes percents."""
    model, ids = tiny_model("llama").to(torch.bfloat16), tiny_tokens(200)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(30)  # peaked attention, which shows what scores lose
            layer.self_attn.k_proj.weight.mul_(30)
    moved = {}
    for precision in ("model", "float32"):
        with ropex.patch(model, "none", precision=precision), torch.no_grad():
            first, second = (
                model(input_ids=ids, position_ids=torch.arange(200)[None] + shift, use_cache=False).logits.float()
                for shift in (0, 1000)
            )
        moved[precision] = (first - second).pow(2).mean().sqrt().item()
    assert moved["float32"] < 0.2 * moved["model"]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_caches_training_and_autocast(implementation: str) -> None:
    model, ids = tiny_model("qwen3").to(torch.bfloat16), tiny_tokens(60)
    model.set_attn_implementation(implementation)
    ropex.patch(model, "yarn", factor=4, precision="float32")
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))
    model.train()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.bfloat16 for p in model.parameters())
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(model(input_ids=ids).logits).all()


def test_padding_stays_hidden() -> None:
    """A mask whose lowest number is that of bfloat16 hides as well as float32's."""
    model, ids = tiny_model("llama").to(torch.bfloat16), tiny_tokens(40)
    model.set_attn_implementation("eager")
    padded = torch.cat((torch.full((1, 10), 7), ids), dim=1)
    mask = (torch.arange(50) >= 10).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with ropex.patch(model, "none", precision="float32"), torch.no_grad():
        alone = model(input_ids=ids).logits
        got = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 10:]
    assert (got - alone).abs().max() < 0.01


def test_what_cannot_attend_in_float32() -> None:
    static = tiny_model("llama")
    ropex.patch(static, "yarn", factor=2, precision="float32")
    with pytest.raises(ValueError, match=r'static cache with precision="float32": it is allocated in one dtype'):
        static.generate(tiny_tokens(9), max_new_tokens=4, cache_implementation="static", disable_compile=True)
    falcon = model_of("falcon")
    with pytest.raises(ropex.UnsupportedModelError, match=r"FalconAttention does not attend through transformers' att"):
        ropex.patch(falcon, "yarn", factor=2, precision="float32")
    assert not ropex.inspect(falcon).patched
    model = tiny_model("llama")
    ropex.patch(model, "yarn", factor=2, precision="float32")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r'attn_implementation="flash_attention_2" with precision="float32"'):
        model.model.layers[0].self_attn(
            torch.zeros(1, 3, 64), position_embeddings=model.model.rotary_emb(torch.zeros(()), torch.arange(3)[None]),
            attention_mask=None,
        )  # fmt: skip

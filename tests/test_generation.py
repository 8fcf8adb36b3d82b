"""One length per generation: cached decoding is the full pass at that length, whatever the method and the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, StaticCache

import ropex
from ropex.patching import cache_of
from tests.oracles import FAMILIES, TRAINED_LENGTH, cached, logits, tiny_model, tiny_tokens

SHORT = 64  # a trained length that cached decoding outgrows three times within a test
OPTIONS: dict[str, dict[str, Any]] = {
    "abf": {"base": 50_000.0},
    "dynamic_ntk": {"factor": 2},
    "proportional": {"fraction": 0.5},
    "none": {},
    "drope": {},
    "dynamic_yarn": {},
    "clex": {},
}
FOUR = ["llama", "mistral", "qwen3", "gpt_neox"]
DEPENDENT = ("dynamic_ntk", "dynamic_yarn", "longrope", "clex", "e2llm")


def options_of(method: str) -> dict[str, Any]:
    if method == "e2llm":
        return {"factor": "auto"}
    return OPTIONS.get(method, {"factor": 4})


def short_model(family: str = "llama", **options: Any) -> nn.Module:
    """A tiny model trained at 64 tokens, whose next token depends on the rotation."""
    model = tiny_model(family, max_position_embeddings=SHORT, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)  # logits far enough apart for greedy tokens to say something
    return model


def patched(method: str, family: str = "llama") -> tuple[nn.Module, ropex.Patch]:
    model = short_model(family)
    patch = ropex.patch(model, method, **options_of(method))
    learned = [p for name, p in model.named_parameters() if ".learned." in name]
    with torch.no_grad():
        for parameter in learned:
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model, patch


def generate(model: nn.Module, ids: torch.Tensor, new: int, **options: Any) -> torch.Tensor:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **settings)


@pytest.mark.parametrize("method", sorted(ropex.methods()))
def test_cached_decoding_is_the_full_pass(method: str) -> None:
    """Over three times the trained length: greedy tokens equal, and the logits of every step within 1e-4."""
    model, patch = patched(method)
    prompt, new = tiny_tokens(50), 3 * SHORT - 50
    out = generate(model, prompt, new, return_dict_in_generate=True, output_logits=True)
    stepped = torch.stack(out.logits, dim=1)
    assert out.sequences.shape[1] == 3 * SHORT
    with patch.pin_length(3 * SHORT):
        whole = logits(model, out.sequences)[:, 49:-1]
    assert (stepped - whole).abs().max() < 1e-4
    assert torch.equal(whole.argmax(-1), out.sequences[:, 50:])
    assert ropex.inspect(model).pinned_length is None, "generate takes its pin off again"


@pytest.mark.parametrize("family", [*FAMILIES])
@pytest.mark.parametrize("method", ["dynamic_ntk", "clex"])
def test_generate_pins_by_itself_on_every_family(family: str, method: str) -> None:
    model, patch = patched(method, family)
    prompt = tiny_tokens(40, batch=2)
    want = generate(model, prompt, 60)
    with patch.pin_length(100):
        assert torch.equal(generate(model, prompt, 60, use_cache=False), want)


@pytest.mark.parametrize("method", DEPENDENT)
def test_a_pin_matters(method: str) -> None:
    """A test that any length would pass shows nothing."""
    model, patch = patched(method)
    ids = tiny_tokens(SHORT - 10)
    with patch.pin_length(4 * SHORT):
        long = logits(model, ids)
    changes = (logits(model, ids) - long).abs().max() > 1e-3
    assert changes or not patch.schedule.length_dependent


@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize("method", ["dynamic_ntk", "dynamic_yarn", "longrope"])
def test_rows_of_a_padded_batch_have_lengths_of_their_own(method: str, family: str) -> None:
    model, _ = patched(method, family)
    prompts = [tiny_tokens(length) for length in (70, 100, 30)]
    batch = torch.cat([torch.nn.functional.pad(ids, (100 - ids.shape[1], 0)) for ids in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(ids), (100 - ids.shape[1], 0)) for ids in prompts])
    together = generate(model, batch, 20, attention_mask=mask)
    for row, ids in enumerate(prompts):
        alone = generate(model, ids, 20)
        assert torch.equal(together[row, 100:], alone[0, ids.shape[1] :])


@pytest.mark.parametrize("family", FOUR)
def test_beams_and_several_sequences_keep_the_length_of_their_row(family: str) -> None:
    model, patch = patched("dynamic_ntk", family)
    ids = torch.cat((torch.nn.functional.pad(tiny_tokens(60), (20, 0)), tiny_tokens(80)))
    mask = (ids != 0).long()
    beams = generate(model, ids, 12, attention_mask=mask, num_beams=3, num_return_sequences=2)
    alone = generate(model, ids[:1, 20:], 12, num_beams=3, num_return_sequences=2)
    assert torch.equal(beams[:2, 80:], alone[:, 60:])
    with patch.pin_length(92):
        assert torch.equal(generate(model, ids[1:], 12, num_beams=3, use_cache=False), beams[2:3])


@pytest.mark.parametrize("family", FOUR)
def test_inputs_embeds_count_as_context(family: str) -> None:
    model, _ = patched("dynamic_ntk", family)
    ids = tiny_tokens(90)
    embeds = model.get_input_embeddings()(ids).detach()
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 10}
    got = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(got, generate(model, ids, 10)[:, 90:])


@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize("cache", ["static", "offloaded", "dynamic"])
def test_every_cache_gives_the_same(cache: str, family: str) -> None:
    if cache == "offloaded" and not torch.cuda.is_available():
        pytest.skip("transformers offloads caches from a GPU only")
    model, _ = patched("dynamic_ntk", family)
    ids = tiny_tokens(80)
    want = generate(model, ids, 16)
    assert torch.equal(generate(model, ids, 16, cache_implementation=cache, disable_compile=True), want)


def test_sliding_caches() -> None:
    """A model with layers of both kinds: its cache keeps the window's tokens only in those that slide."""
    both = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32, "use_sliding_window": True}
    model = short_model("qwen2", **both)
    ids = tiny_tokens(80)
    ropex.patch(model, "dynamic_ntk", factor=2)
    want = generate(model, ids, 30, use_cache=False)
    assert torch.equal(generate(model, ids, 30), want)


@pytest.mark.parametrize("family", FOUR)
def test_assisted_decoding(family: str) -> None:
    model, _ = patched("dynamic_ntk", family)
    assistant, ids = short_model(family), tiny_tokens(80)
    want = generate(model, ids, 16)
    assert torch.equal(generate(model, ids, 16, assistant_model=assistant), want)
    ropex.patch(assistant, "yarn", factor=4)
    assert torch.equal(generate(model, ids, 16, assistant_model=assistant), want)


@pytest.mark.parametrize("family", FOUR)
def test_packed_rows_take_their_longest_document(family: str) -> None:
    model, patch = patched("dynamic_ntk", family)
    documents = [tiny_tokens(100), tiny_tokens(40)]
    positions = torch.cat([torch.arange(100), torch.arange(40)])[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat(documents, dim=1), position_ids=positions, use_cache=False).logits
        first = logits(model, documents[0])
        with patch.pin_length(100):
            second = logits(model, documents[1])
    assert (packed[:, :100] - first).abs().max() < 1e-5
    assert (packed[:, 100:] - second).abs().max() < 1e-4


# --- outgrowing -------------------------------------------------------------------------------------------------------


def test_a_static_cache_that_outgrows_its_pin_is_noticed() -> None:
    model, patch = patched("dynamic_ntk")
    ids = tiny_tokens(100)
    cache = StaticCache(config=model.config, max_cache_len=200)
    with patch.pin_length(101), torch.no_grad():
        model(input_ids=ids, **cached(model, cache), use_cache=True)
        model(input_ids=ids[:, :1], **cached(model, cache), use_cache=True)
        with pytest.raises(ValueError, match=r"context of 102 tokens under pin_length\(101\): must not outgrow"):
            model(input_ids=ids[:, :1], **cached(model, cache), use_cache=True)


def test_a_cache_of_another_generation_is_refused() -> None:
    model, _ = patched("dynamic_ntk")
    ids = tiny_tokens(80)
    out = generate(model, ids, 8, return_dict_in_generate=True)
    longer = torch.cat((out.sequences, tiny_tokens(20)), dim=1)
    with pytest.raises(ValueError, match=r"cache with 87 tokens filled under pin_length\(88\), now pin_length\(116\)"):
        generate(model, longer, 8, **cached(model, cache_of(out)))
    assert ropex.inspect(model).pinned_length is None


def test_one_pin_serves_a_conversation() -> None:
    model, patch = patched("dynamic_ntk")
    ids = tiny_tokens(80)
    with patch.pin_length(200):
        out = generate(model, ids, 8, return_dict_in_generate=True)
        longer = torch.cat((out.sequences, tiny_tokens(20)), dim=1)
        continued = generate(model, longer, 8, **cached(model, cache_of(out)))
        assert torch.equal(continued, generate(model, longer, 8, use_cache=False))


def test_outgrowing_a_pin_in_generate_is_an_error_by_default() -> None:
    model, patch = patched("dynamic_ntk")
    with (
        patch.pin_length(90),
        pytest.raises(ValueError, match=r'91 tokens under pin_length\(90\).*outgrown="reprefill"'),
    ):
        generate(model, tiny_tokens(80), 40)


def test_a_generation_begins_anew_with_a_longer_pin_on_request() -> None:
    model, patch = patched("dynamic_ntk")
    ids = tiny_tokens(80)
    with patch.pin_length(90, outgrown="reprefill"):
        got = generate(model, ids, 120)
    assert got.shape[1] == 200
    want = ids
    for pin in (90, 180, 200):  # by hand: to the pin, then all tokens so far as the prompt of twice the length
        with patch.pin_length(pin):
            want = generate(model, want, pin - want.shape[1])
    assert torch.equal(got, want)
    assert ropex.inspect(model).pinned_length is None


def test_rows_that_ended_stay_as_they_are_when_others_begin_anew() -> None:
    model, patch = patched("dynamic_ntk")
    ids = torch.cat((tiny_tokens(80), tiny_tokens(81)[:, 1:]))
    free = generate(model, ids, 8)
    end = int(free[0, 82])
    with patch.pin_length(90, outgrown="reprefill"):
        got = generate(model, ids, 60, eos_token_id=end)
    first = (got[0, 80:] == end).nonzero()[0].item()
    assert (got[0, 80 + first + 1 :] == 0).all()
    assert got.shape[1] > 90 or (got[1, 80:] == end).any()


@pytest.mark.parametrize("bad", [{"num_beams": 2}, {"return_dict_in_generate": True}])
def test_what_cannot_begin_anew_is_refused(bad: dict[str, Any]) -> None:
    model, patch = patched("dynamic_ntk")
    with patch.pin_length(90, outgrown="reprefill"), pytest.raises(ValueError, match=r"must be given token ids alone"):
        generate(model, tiny_tokens(80), 40, **bad)
    with pytest.raises(ValueError, match=r"outgrown='grow': must be one of \"error\", \"reprefill\""):
        patch.pin_length(90, outgrown="grow")


# --- under a pin ------------------------------------------------------------------------------------------------------


def test_learned_frequencies_are_evaluated_once_under_a_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    model, patch = patched("clex")
    calls = 0
    rotation = type(patch.schedule).rotation

    def counted(self: Any, request: ropex.Request) -> ropex.Rotation:
        nonlocal calls
        calls += 1
        return rotation(self, request)

    monkeypatch.setattr(type(patch.schedule), "rotation", counted)
    ids = tiny_tokens(90)
    generate(model, ids, 20)
    assert calls == 1
    with patch.pin_length(150):
        first = logits(model, ids)
        assert torch.equal(logits(model, ids), first)
        assert calls == 2
        with torch.no_grad():
            model.model.rotary_emb.rope.learned.down_proj.add_(0.5)
        assert not torch.equal(logits(model, ids), first), "a new version of a parameter is seen"
        assert calls == 3
        model.model.rotary_emb.rope.learned.down_proj.data = model.model.rotary_emb.rope.learned.down_proj.data - 0.5
        assert (logits(model, ids) - first).abs().max() < 1e-5
    with patch.pin_length(200):
        logits(model, ids)
    assert calls == 5
    logits(model, ids)
    logits(model, ids)
    assert calls == 7, "without a pin, each pass asks"


def test_rows_must_fit_the_batch() -> None:
    rope = ropex.RotaryEmbedding(ropex.Geometry(16, 10_000.0, SHORT), ropex.schedule("dynamic_ntk"))
    rope.pin_length(200, torch.tensor([100, 200]))
    assert rope(torch.arange(9).expand(4, -1)).inv_freq.shape == (4, 1, 8)
    assert rope(torch.arange(9)[None]).inv_freq.shape == (2, 1, 8)
    with pytest.raises(ValueError, match=r"length pinned for each of 2 rows: must have 2 rows or a multiple"):
        rope(torch.arange(9).expand(3, -1))
    rope.pin_length(None)
    assert rope.pinned.dim() == 0


def test_padding_without_a_mask_is_seen_as_transformers_sees_it() -> None:
    model, _ = patched("dynamic_ntk")
    ids = torch.nn.functional.pad(tiny_tokens(70), (30, 0))
    with_mask = generate(model, ids, 12, attention_mask=(ids != 0).long(), eos_token_id=2)
    assert torch.equal(generate(model, ids, 12, attention_mask=None, eos_token_id=2), with_mask)


def test_a_static_cache_that_transformers_uses_again() -> None:
    model, _ = patched("dynamic_ntk")
    for length, new in ((80, 16), (70, 6), (60, 30)):
        ids = tiny_tokens(length)
        got = generate(model, ids, new, cache_implementation="static", disable_compile=True)
        assert torch.equal(got, generate(model, ids, new))


def test_generating_in_inference_mode_leaves_nothing_that_cannot_be_pinned() -> None:
    model, patch = patched("dynamic_ntk")
    with torch.inference_mode():
        want = generate(model, tiny_tokens(80), 5)
    with patch.pin_length(85):
        assert torch.equal(generate(model, tiny_tokens(80), 5), want)


def test_an_error_in_generate_leaves_no_pin() -> None:
    model, _ = patched("dynamic_ntk")

    def fails(*args: Any) -> bool:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        generate(model, tiny_tokens(80), 5, stopping_criteria=[fails])
    assert ropex.inspect(model).pinned_length is None
    assert model.model.rotary_emb.generating is None


def test_an_inner_model_that_was_unpatched_alone() -> None:
    model, _ = patched("dynamic_ntk")
    want = generate(short_model(), tiny_tokens(80), 5)
    ropex.unpatch(model.model)
    assert torch.equal(generate(model, tiny_tokens(80), 5), want)
    ropex.patch(model, "dynamic_ntk", factor=2)
    same, _ = patched("dynamic_ntk")
    assert torch.equal(generate(model, tiny_tokens(80), 5), generate(same, tiny_tokens(80), 5))


@pytest.mark.parametrize("place", ["call", "object", "model"])
def test_stretches_follow_a_generation_config_wherever_it_stands(place: str) -> None:
    model, patch = patched("dynamic_ntk")
    ids = torch.nn.functional.pad(tiny_tokens(70), (10, 0))
    with patch.pin_length(90, outgrown="reprefill"):
        want = generate(model, ids, 40, attention_mask=(ids != 0).long(), eos_token_id=2)
    asked = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    with patch.pin_length(90, outgrown="reprefill"):
        if place == "call":
            got = model.generate(ids, **asked)
        elif place == "object":
            got = model.generate(ids, generation_config=GenerationConfig(**asked))
        else:
            model.generation_config = GenerationConfig(**asked)
            got = model.generate(ids)
    assert torch.equal(got, want)
    with patch.pin_length(90, outgrown="reprefill"), pytest.raises(ValueError, match=r"must be given token ids alone"):
        model.generate(ids, generation_config=GenerationConfig(**asked, num_beams=2))
    with patch.pin_length(90, outgrown="reprefill"):
        several = GenerationConfig(max_new_tokens=40, do_sample=True, num_return_sequences=2, pad_token_id=0)
        assert model.generate(ids, generation_config=several).shape[0] == 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("patch_first", [True, False])
def test_generate_of_a_peft_model_pins_too(patch_first: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model, ids = short_model(), tiny_tokens(80)
    if patch_first:
        ropex.patch(model, "dynamic_ntk", factor=2)
        wrapped = peft.get_peft_model(model, config)
    else:
        wrapped = peft.get_peft_model(model, config)
        ropex.patch(wrapped, "dynamic_ntk", factor=2)
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 10}
    got = wrapped.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    same, _ = patched("dynamic_ntk")
    assert torch.equal(got, generate(same, ids, 10))
    ropex.unpatch(wrapped)
    assert not any(type(module).__name__ == "PatchedRotary" for module in wrapped.modules())


def test_a_dynamic_cache_by_hand() -> None:
    model, patch = patched("dynamic_yarn")
    ids = tiny_tokens(TRAINED_LENGTH // 4)
    with patch.pin_length(ids.shape[1]), torch.no_grad():
        cache = DynamicCache()
        parts = [model(input_ids=ids[:, i : i + 16], **cached(model, cache)).logits for i in range(0, ids.shape[1], 16)]
        whole = logits(model, ids)
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-4

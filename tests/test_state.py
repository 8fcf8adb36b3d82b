"""State that travels: casts, saves, resumes, wrappers put on top, and lengths that others read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import ropex
from tests.families import FIVE, logits_of, model_of, tokens

# --- casts ------------------------------------------------------------------------------------------------------------


def cast_all(model: nn.Module) -> None:
    """As FSDP's `buffer_dtype` and loops in training scripts do, whatever a buffer holds."""
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                buffer.data = buffer.data.to(torch.bfloat16)
                module._buffers[name] = buffer.clone()


@pytest.mark.parametrize("method", ["linear", "yarn", "dynamic_ntk", "truncated"])
def test_frequencies_survive_what_walks_buffers(method: str) -> None:
    model = model_of("llama")
    positions = torch.arange(900, 932)[None]
    with ropex.patch(model, method, factor=2) as patch:
        want = patch.rotary(torch.zeros(()), positions)
        with patch.pin_length(1000):
            pinned = patch.rotary(torch.zeros(()), positions)
            cast_all(model)
            assert all(map(torch.equal, patch.rotary(torch.zeros(()), positions), pinned))
        assert all(map(torch.equal, patch.rotary(torch.zeros(()), positions), want))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(map(torch.equal, patch.rotary(torch.zeros(()), positions), want))


def test_a_cast_that_would_repeat_draws_is_noticed() -> None:
    model = model_of("llama").train()
    ropex.patch(model, "pose", factor=4)
    cast_all(model)
    with pytest.raises(
        RuntimeError, match=r"step has become torch\.bfloat16: must be int64, or what is drawn would rep"
    ):
        model(tokens(20))


# --- saved ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("llama", "dynamic_ntk", {"length": 2048}),
        ("qwen3", "clex", {}),
        ("gpt_oss", "yarn", {"factor": 4}),  # whose sliding layers share their parameters with the others
        ("mistral", "resonance", {"inner": "dynamic_ntk", "factor": 2}),
    ],
)
def test_a_saved_config_claims_no_more_than_it_says(
    family: str, method: str, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = model_of(family, **({"sliding_window": None} if family == "mistral" else {})), tokens(100)
    plain = logits_of(model, ids)
    patch = ropex.patch(model, method, **options)
    assert model.config.max_position_embeddings == patch.rotary.target > 512
    with caplog.at_level(logging.WARNING, "ropex"):
        model.save_pretrained(tmp_path)
    assert "no config can say" in caplog.text
    assert "ropex.load" in caplog.text
    assert model.config.max_position_embeddings == patch.rotary.target, "what is in memory still reaches as far"
    assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == 512
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (logits_of(again, ids) - plain).abs().max() < 1e-5
    inner = AutoModelForCausalLM.from_pretrained(tmp_path).model
    with ropex.patch(inner, "dynamic_yarn"), caplog.at_level(logging.WARNING, "ropex"):
        caplog.clear()
        inner.save_pretrained(tmp_path / "inner")
    assert "no config can say" in caplog.text, "a part that does not generate tells it, too"


def test_a_save_that_says_all_is_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for method, options in (("none", {}), ("yarn", {"factor": 4})):
        with ropex.patch(model := model_of("llama"), method, **options), caplog.at_level(logging.WARNING, "ropex"):
            model.save_pretrained(tmp_path / method)
    assert caplog.text == ""


@pytest.mark.parametrize(("method", "options"), [("clex", {}), ("resonance", {"inner": "clex"})])
def test_what_was_trained_is_not_lost_in_silence(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = model_of("llama")
    patch = ropex.patch(model, method, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".learned." in name:
                parameter.normal_(std=0.05)
    want = logits_of(model, tokens(700))
    model.save_pretrained(tmp_path)
    patch.save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with pytest.raises(
        ValueError, match=rf"trained with '{method}'.*would be lost.*ropex\.load\(model, .*del model\.conf"
    ):
        ropex.patch(again, method, **options)
    with ropex.load(again, tmp_path):
        assert torch.equal(logits_of(again, tokens(700)), want)
    with ropex.patch(again, "yarn", factor=4):
        pass
    del again.config.ropex
    ropex.patch(again, method, **options)


# --- resumed ----------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = tokens(64 + index)[0, :64]
        return {"input_ids": row, "labels": row}


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.skipif(not FIVE, reason="transformers 4 keeps no state of callbacks this way")
def test_draws_go_on_where_a_checkpoint_holds_an_adapter_alone(tmp_path: Path) -> None:
    """An adapter's checkpoint has no buffers: the step of the draws travels in the state of the Trainer."""

    def run(resume: bool, steps: int) -> list[int]:
        torch.manual_seed(0)
        model = model_of("llama")
        ropex.patch(model, "pose", factor=4)
        lora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        rope = next(module for module in lora.modules() if isinstance(module, ropex.RotaryEmbedding))
        drawn: list[int] = []
        rope.register_forward_pre_hook(lambda module, args: drawn.append(int(module.step)) if module.training else None)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=3, per_device_train_batch_size=2, report_to=[],
            use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(lora, arguments, train_dataset=Rows(), callbacks=[ropex.RopexCallback()])
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        return drawn

    assert run(False, 3) == [0, 1, 2]
    assert "step" not in str(list((tmp_path / "checkpoint-3").glob("*.safetensors")))
    assert run(True, 6) == [3, 4, 5]


# --- wrapped ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["attention", "layer"])
@pytest.mark.parametrize("method", ["yarn", "dynamic_ntk"])
def test_removal_keeps_the_class_that_fsdp_put_on_top(method: str, part: str, tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = model_of("llama")
        patch = ropex.patch(model, method, factor=2)
        shards = [layer.self_attn if part == "attention" else layer for layer in model.model.layers] + [model]
        for shard in shards:
            fully_shard(shard, mesh=mesh)
        patch.remove()
        assert all(isinstance(shard, FSDPModule) for shard in shards)
        assert not any(hasattr(type(module), "ropex_made_from") for module in model.modules())
        model.set_requires_gradient_sync(False)
        assert [type(shard).__name__[:4] for shard in shards] == ["FSDP"] * 3
        loss = model(input_ids=tokens(20), labels=tokens(20)).loss
        loss.backward()
        ropex.patch(model, method, factor=2).remove()
    finally:
        distributed.destroy_process_group()


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_short_generations_stay_as_they_were() -> None:
    """Within the trained length dynamic_ntk changes nothing, also where the model states its own max_length."""
    model = model_of("llama")
    model.generation_config.max_length = 512
    ids = tokens(10)

    def answer() -> torch.Tensor:
        def stop(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(ids),), ids.shape[1] >= 30)

        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "stopping_criteria": [stop]}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    want = answer()
    with ropex.patch(model, "dynamic_ntk", factor=4):
        assert model.generation_config.max_length == 512
        assert torch.equal(answer(), want)


def test_a_run_is_held_to_what_the_schedule_reaches() -> None:
    """Qwen 2.5's documented config leaves the maximum at the short length."""
    scaling = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    if not FIVE:
        pytest.skip(f"transformers {transformers.__version__} spells it otherwise")
    model = model_of("qwen2", rope_parameters=scaling)
    assert ropex.inspect(model).length == 2048
    with ropex.patch(model, on_scaled="keep") as patch:
        assert ropex.inspect(model).length == patch.rotary.target == 2048
        ropex.RopexCallback(max_length=2048).on_train_begin(None, None, None, model=model)
        with pytest.raises(ValueError, match=r"samples of up to 2049 tokens .* reaches 2048"):
            ropex.RopexCallback(max_length=2049).on_train_begin(None, None, None, model=model)

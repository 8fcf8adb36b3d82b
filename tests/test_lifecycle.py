"""A patched model through what users do to models: compiled, exported, cast, checkpointed, wrapped, spread, trained."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM

import ropex
from ropex.patching import files
from ropex.patching.swap import Rotating
from tests.conftest import thinned
from tests.oracles import LOGIT_ERROR, TRAINED_LENGTH, cached, logits, tiny_config, tiny_model, tiny_tokens

four_families = pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt_neox"])
EFFECT = 1e-3
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated:FutureWarning"),
]


def learned_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".learned." in name}


def patched(family: str, method: str = "yarn", **options: Any) -> nn.Module:
    model = tiny_model(family)
    ropex.patch(model, method, factor=4, **options)
    for parameter in learned_of(model).values():
        nn.init.normal_(parameter, std=0.02)
    return model


def checkpoint(model: nn.Module, reentrant: bool | None) -> None:
    """Turn activation checkpointing on, of this kind, or off."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if reentrant is None:
        getattr(model, f"{name}_checkpointing_disable")()
    else:
        getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": {"use_reentrant": reentrant}})


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- compiled and exported --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", thinned(["llama", "mistral", "qwen3", "gpt_neox"], "llama"))
def test_compiled_training_with_a_learned_schedule(family: str) -> None:
    torch.compiler.reset()
    model, ids = patched(family, "clex").train(), tiny_tokens(64)
    state = copy.deepcopy(model.state_dict())
    want = gradients(model, ids)
    model.load_state_dict(state)  # the step, too: what is drawn is the same
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, gradient in want.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-6)
    assert len([name for name in want if ".learned." in name]) == 2


@pytest.mark.parametrize("method", thinned(ropex.methods(), "yarn", "ntk", "dynamic_ntk", "longrope", "clex"))
def test_one_graph_for_all_lengths(method: str) -> None:
    """As many as an unpatched model has, none of them broken."""
    torch.compiler.reset()
    model, count = tiny_model("llama"), CompileCounter()
    options = {"none": {}, "drope": {}, "proportional": {"fraction": 0.5}, "dynamic_yarn": {"floor": 1024}}
    ropex.patch(model, method, **options.get(method, {"factor": 4}))
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=count)
    for length in (30, 41, TRAINED_LENGTH + 90):
        ids = tiny_tokens(length)
        with torch.no_grad():
            got = compiled(input_ids=ids, use_cache=False).logits
        assert (got - logits(model, ids)).abs().max() < LOGIT_ERROR
    assert count.frame_count == 1


@four_families
@pytest.mark.parametrize("method", ["yarn", "dynamic_ntk"])
def test_export_of_the_graph(family: str, method: str) -> None:
    model, ids = patched(family, method), tiny_tokens(TRAINED_LENGTH + 40)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, use_cache=False).logits

    with torch.no_grad():
        program = torch.export.export(Logits(), (ids,), strict=False)
        assert (program.module()(ids) - logits(model, ids)).abs().max() < LOGIT_ERROR


# --- checkpointed -----------------------------------------------------------------------------------------------------


@four_families
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["yarn", "clex"])
def test_gradient_checkpointing(family: str, reentrant: bool, method: str) -> None:
    model, ids = patched(family, method).train(), tiny_tokens(100)
    state = copy.deepcopy(model.state_dict())
    want = gradients(model, ids)
    model.load_state_dict(state)
    checkpoint(model, reentrant)
    got = gradients(model, ids)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-7)
    checkpoint(model, None)
    model.load_state_dict(state)
    again = gradients(model, ids)
    assert all(torch.equal(again[name], want[name]) for name in want)


def test_gradients_accumulate_over_reentrant_passes() -> None:
    model, ids = patched("llama", "clex").train(), tiny_tokens(100)
    state = copy.deepcopy(model.state_dict())
    once = gradients(model, ids)
    model.load_state_dict(state)
    checkpoint(model, True)
    model.zero_grad()
    for _ in range(2):
        model.load_state_dict(state)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in learned_of(model).items():
        torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-4, atol=1e-7)


# --- cast and moved ---------------------------------------------------------------------------------------------------


@four_families
def test_half_and_autocast(family: str) -> None:
    model, ids = patched(family), tiny_tokens(100)
    want = logits(model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(input_ids=ids, labels=ids, use_cache=False)
        assert torch.isfinite(low.loss)
        low.loss.backward()
    assert (low.logits.float() - want).abs().max() < 0.05
    assert (logits(model.half(), ids).float() - want).abs().max() < 0.02
    assert model.get_submodule(ropex.inspect(model).rotary).rope.inv_freq.dtype == torch.float64


@four_families
@pytest.mark.parametrize("method", ["yarn", "clex"])
def test_meta_and_back(family: str, method: str) -> None:
    source, ids = patched(family, method), tiny_tokens(100)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    ropex.patch(model, method, factor=4)
    assert ropex.inspect(model).patched
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(logits(model.eval(), ids), logits(source, ids))
    moved = copy.deepcopy(source).to("meta").to_empty(device="cpu")
    moved.load_state_dict(source.state_dict())
    assert torch.equal(logits(moved, ids), logits(source, ids))


def test_a_model_that_comes_to_life_is_probed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    ropex.patch(model, "yarn", factor=4)
    checked = []
    monkeypatch.setattr(
        type(model.model.rotary_emb), "check", lambda self: checked.append(self.rope.inv_freq.device.type)
    )
    model.to_empty(device="cpu")
    assert checked == ["cpu"]
    model.to(torch.bfloat16)
    assert checked == ["cpu"], "only then"


# --- wrapped ----------------------------------------------------------------------------------------------------------


@four_families
def test_lora_before_and_after(family: str) -> None:
    peft = pytest.importorskip("peft")
    targets = ["query_key_value"] if family == "gpt_neox" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    ids = tiny_tokens(TRAINED_LENGTH + 20)
    torch.manual_seed(1)
    first = peft.get_peft_model(patched(family), config).eval()
    torch.manual_seed(1)
    second = peft.get_peft_model(tiny_model(family), config).eval()
    unpatched = logits(second, ids)
    ropex.patch(second, "yarn", factor=4)
    want = logits(first, ids)
    assert torch.equal(logits(second, ids), want)
    assert (want - unpatched).abs().max() > EFFECT
    merged = first.merge_and_unload()
    assert (logits(merged, ids) - want).abs().max() < LOGIT_ERROR
    ropex.unpatch(second)
    assert torch.equal(logits(second, ids), unpatched)
    assert torch.equal(logits(second.unload(), ids), logits(tiny_model(family), ids))


@four_families
def test_lora_with_a_learned_schedule(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    targets = ["query_key_value"] if family == "gpt_neox" else ["q_proj", "v_proj"]
    ids = tiny_tokens(64)
    plain = peft.get_peft_model(patched(family, "clex"), peft.LoraConfig(target_modules=targets))
    assert not any(p.requires_grad for p in learned_of(plain).values())
    with pytest.raises(ValueError, match=r'requires? a gradient.*modules_to_save=\["rotary_emb"\]'):
        ropex.RopexCallback().on_train_begin(types.SimpleNamespace(), None, None, model=plain)
    config = peft.LoraConfig(target_modules=targets, modules_to_save=["rotary_emb"])
    model = peft.get_peft_model(patched(family, "clex"), config).train()
    trained = {name: p for name, p in learned_of(model).items() if p.requires_grad}
    assert len(trained) == 2
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for parameter in trained.values():
        assert parameter.grad.abs().max() > 0
        with torch.no_grad():
            parameter.add_(0.1)
    model.eval()
    want = logits(model, ids)
    ropex.RopexCallback().on_train_begin(types.SimpleNamespace(), None, None, model=model)
    files.save(model, tmp_path / "sidecar")
    alone = tiny_model(family)
    ropex.load(alone, tmp_path / "sidecar")
    assert all(torch.equal(p, q) for p, q in zip(learned_of(alone).values(), trained.values(), strict=True))
    model.save_pretrained(tmp_path)
    base = tiny_model(family)
    ropex.patch(base, "clex", factor=4)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert (logits(again, ids) - want).abs().max() < LOGIT_ERROR


class Quantised(nn.Module):
    """A linear layer that keeps its weight in 8 bits, as bitsandbytes' and torchao's do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, (self.weight.to(x.dtype) * self.scale).to(x.dtype), self.bias)


@four_families
@pytest.mark.parametrize("precision", ["model", "float32"])
def test_weight_quantised_models(family: str, precision: str) -> None:
    model, ids = tiny_model(family), tiny_tokens(TRAINED_LENGTH + 20)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name not in ("lm_head", "embed_out"):
                setattr(parent, name, Quantised(child))
    want = logits(model, ids)
    with ropex.patch(model, "none", precision=precision):
        assert (logits(model, ids) - want).abs().max() < LOGIT_ERROR
    with ropex.patch(model, "yarn", factor=4, precision=precision):
        assert (logits(model, ids) - want).abs().max() > EFFECT
    assert torch.equal(logits(model, ids), want)


@four_families
@pytest.mark.parametrize("offload", ["disk", "cpu"])
def test_models_that_accelerate_has_spread(family: str, offload: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    ids = tiny_tokens(TRAINED_LENGTH + 20)
    want, plain = logits(patched(family), ids), logits(tiny_model(family), ids)
    for patch_first in (False, True):
        model = patched(family) if patch_first else tiny_model(family)
        if offload == "cpu":
            model = accelerate.cpu_offload(model)
        else:
            spread = {
                name: "disk" if "layers" in name else "cpu" for name, _ in model.named_modules() if name.count(".") == 1
            }
            spread |= {name: "cpu" for name, child in model.named_children() if not list(child.children())}
            spread |= {
                f"{name}.{i}": "disk"
                for name, m in model.named_modules()
                if name.endswith("layers")
                for i in range(len(m))
            }
            spread = {k: v for k, v in spread.items() if not k.endswith("layers")}
            model = accelerate.dispatch_model(
                model, spread, main_device="cpu", offload_dir=str(tmp_path / str(patch_first))
            )
        if not patch_first:
            assert (logits(model, ids) - plain).abs().max() < LOGIT_ERROR
            ropex.patch(model, "yarn", factor=4)
        assert (logits(model, ids) - want).abs().max() < LOGIT_ERROR
        ropex.unpatch(model)
        assert (logits(model, ids) - plain).abs().max() < LOGIT_ERROR


def test_accelerate_prepare() -> None:
    accelerate = pytest.importorskip("accelerate")
    ids = tiny_tokens(TRAINED_LENGTH + 20)
    want = logits(patched("llama"), ids)
    model = accelerate.Accelerator(cpu=True).prepare(patched("llama"))
    assert torch.equal(logits(model, ids), want)
    after = accelerate.Accelerator(cpu=True).prepare(tiny_model("llama"))
    ropex.patch(after, "yarn", factor=4)
    assert torch.equal(logits(after, ids), want)


# --- other libraries' kernels -----------------------------------------------------------------------------------------


def test_a_library_that_rebinds_the_rotary_function_does_not_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger and Unsloth put their kernel in the modeling file: before or after, a patched model uses ropex's.

    Liger's gives no gradient to cos and sin, with which a learned schedule would train nothing.
    """
    from transformers.models.llama import modeling_llama

    ids, want = tiny_tokens(TRAINED_LENGTH + 20), logits(patched("llama"), tiny_tokens(TRAINED_LENGTH + 20))
    theirs = types.ModuleType("liger_kernel.transformers.rope")

    def liger_rotary_pos_emb(
        q: Any, k: Any, cos: Any, sin: Any, position_ids: Any = None, unsqueeze_dim: int = 1
    ) -> Any:
        raise RuntimeError("a Triton kernel that needs a GPU")

    liger_rotary_pos_emb.__module__ = theirs.__name__
    monkeypatch.setitem(sys.modules, theirs.__name__, theirs)
    after = patched("llama", "clex").train()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", liger_rotary_pos_emb)
    with pytest.raises(RuntimeError, match="needs a GPU"):
        logits(tiny_model("llama"), ids)
    assert torch.equal(logits(patched("llama"), ids), want)
    assert all(gradients(after, ids)[name].abs().max() > 0 for name in learned_of(after))


def test_a_patch_is_not_in_the_way_of_kernelize() -> None:
    """transformers registers its function with the attention class; the patch's class inherits that and calls ours."""
    model = patched("llama")
    attention = next(module for module in model.modules() if isinstance(module, Rotating))
    assert type(attention).forward.__globals__["apply_rotary_pos_emb"].__module__ == "ropex.patching.swap"
    assert not any(name.endswith("rotary_fn") for name, _ in model.named_modules()), "no child that ZeRO-3 would trace"


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["yarn", "dynamic_ntk"])
def test_decoding_in_a_cuda_graph(method: str, device: torch.device) -> None:
    from transformers import StaticCache

    model, ids = patched("llama", method).to(device), tiny_tokens(64).to(device)
    patch = ropex.Patch(model, model.model.rotary_emb)
    with patch.pin_length(1024), torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=128)
        model(input_ids=ids, **cached(model, cache))
        token, position = ids[:, :1].clone(), torch.tensor([[64]], device=device)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(input_ids=token, position_ids=position, **cached(model, cache))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(input_ids=token, position_ids=position, **cached(model, cache)).logits
        first = out.clone()
        patch.pin_length(2048)
        graph.replay()
        changed = (out - first).abs().max() > 1e-4
    assert changed == (method == "dynamic_ntk"), "the pin is a buffer that the graph reads"

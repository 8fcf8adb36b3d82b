"""A patch is done or not done, whatever goes wrong in the middle of it; and what it makes goes with the last user."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import ropex
from ropex.patching.swap import Rotating
from tests.chaos.interrupts import FAMILIES, METHODS, run_until, state_of
from tests.families import logits_of, model_of, tokens
from tests.oracles import cached


class Refuses:
    """A tokenizer whose length cannot be set, as a frozen or validating one refuses it."""

    def __init__(self, at: int) -> None:
        self._length, self._at, self.set = 100, at, 0

    @property
    def model_max_length(self) -> int:
        return self._length

    @model_max_length.setter
    def model_max_length(self, value: int) -> None:
        self.set += 1
        if self.set == self._at:
            raise RuntimeError("this tokenizer is frozen")
        self._length = value


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_of_a_tokenizer_undoes_the_patch(family: str, method: str) -> None:
    model = model_of(family)
    before, tokenizer = state_of(model), Refuses(at=1)
    want = logits_of(model, tokens(40))
    if method == "clex" and sum("rotary_emb" in name for name, _ in model.named_modules()) > 1:
        pytest.skip("one net for several rotary modules is refused")
    with pytest.raises(RuntimeError, match="this tokenizer is frozen"):
        ropex.patch(model, method, factor=2, tokenizer=tokenizer)
    assert state_of(model) == before
    assert torch.equal(logits_of(model, tokens(40)), want)
    ropex.patch(model, method, factor=2, tokenizer=tokenizer).remove()
    assert tokenizer.model_max_length == 100
    assert state_of(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_an_error_of_a_config_undoes_the_patch(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a config with a limit of its own raises it, whichever of its attributes is set."""
    for name in ("max_position_embeddings", "ropex"):
        model = model_of("llama")
        before = state_of(model)
        plain = type(model.config).__setattr__

        def limited(self: Any, key: str, value: Any, name: str = name, plain: Any = plain) -> None:
            if key == name and value != 512 and "original_max" not in vars(self):
                raise OverflowError(f"{key} is more than this model takes")
            plain(self, key, value)

        monkeypatch.setattr(type(model.config), "__setattr__", limited)
        with pytest.raises(Exception, match="is more than this model takes") as error:
            ropex.patch(model, method, factor=2)
        monkeypatch.undo()
        assert type(error.value) in (OverflowError, ropex.UnsupportedModelError)
        assert state_of(model) == before


def test_an_error_while_unpatching_is_told_when_all_is_put_back() -> None:
    model, tokenizer = model_of("llama"), Refuses(at=2)
    before = state_of(model)
    ropex.patch(model, "dynamic_ntk", factor=2, tokenizer=tokenizer)
    with pytest.raises(RuntimeError, match="this tokenizer is frozen") as error:
        ropex.unpatch(model)
    assert "put back model_max_length=100 of Refuses" in error.value.__notes__[0]
    assert state_of(model) == before
    with pytest.raises(ValueError, match="is not patched"):
        ropex.unpatch(model)


def test_an_error_while_undoing_is_a_note_on_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that takes one length and then none, and a config that fails after it."""
    model, tokenizer = model_of("llama"), Refuses(at=2)
    before, plain = state_of(model), type(model.config).__setattr__

    def fails(self: Any, key: str, value: Any) -> None:
        if key == "ropex":
            raise OverflowError("no such attribute here")
        plain(self, key, value)

    monkeypatch.setattr(type(model.config), "__setattr__", fails)
    with pytest.raises(OverflowError, match="no such attribute here") as error:
        ropex.patch(model, "dynamic_ntk", factor=2, length=1024, tokenizer=tokenizer)
    monkeypatch.undo()
    assert "this tokenizer is frozen" in error.value.__notes__[0]
    assert "put back model_max_length=100 of Refuses" in error.value.__notes__[0]
    assert state_of(model) == before


def test_hooks_of_others_stay_and_theirs_may_fail() -> None:
    """A global hook that watches modules come and go, and fails; and a user's hook on the same module."""
    model = model_of("llama")
    calls: list[int] = []
    model.model.register_forward_pre_hook(lambda module, args: calls.append(1))
    before = state_of(model)

    def fails(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        if module is model.model:
            raise RuntimeError("no module may be put in the place of another")

    handle = nn.modules.module.register_module_module_registration_hook(fails)
    try:
        ropex.patch(model, "dynamic_ntk", factor=2).remove()
    finally:
        handle.remove()
    assert state_of(model) == before
    logits_of(model, tokens(8))
    assert calls == [1]


def test_an_interrupted_load_leaves_nothing_untrained(tmp_path: Path) -> None:
    """At its last step, where the net is in the model, and what it has learned is not."""
    model = model_of("llama")
    with ropex.patch(model, "clex", factor=2) as patch:
        patch.save(tmp_path)
    before = state_of(model)
    lines = run_until(lambda: ropex.load(model, tmp_path), within=("restore",))
    ropex.unpatch(model)
    for at in range(1, lines + 1, lines // 12):
        assert run_until(lambda: ropex.load(model, tmp_path), at, ("restore",)) == at
        assert state_of(model) == before


def test_a_context_that_is_left_by_an_interrupt_is_unpatched() -> None:
    model = model_of("llama")
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt), ropex.patch(model, "yarn", factor=2):
        raise KeyboardInterrupt
    assert state_of(model) == before


def test_threads_leave_the_process_as_it_was() -> None:
    """Planning changes what is one for the process: how transformers logs, and whether torch compiles."""
    logger = logging.getLogger("transformers")
    before = logger.level
    plain = [state_of(model_of("llama", seed)) for seed in range(3)]
    models = [model_of("llama", seed) for seed in range(3)]

    def work(model: Any) -> None:
        for _ in range(4):
            ropex.patch(model, "yarn", factor=2).remove()
            ropex.inspect(model)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert logger.level == before
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert [state_of(model) for model in models] == plain


# --- what goes with the last user -------------------------------------------------------------------------------------


def shadows() -> list[str]:
    gc.collect()
    return [name for name in sys.modules if name.startswith("ropex_shadow")]


def test_classes_and_shadows_go_with_the_last_model() -> None:
    known, classes = shadows(), len(Rotating.__subclasses__())
    one, other = model_of("llama", head_dim=20), model_of("llama", head_dim=20)
    for model in (one, other):
        ropex.patch(model, "yarn", factor=2)
    assert type(one.model.layers[0].self_attn) is type(other.model.layers[0].self_attn), "the compiler shares graphs"
    assert len(shadows()) == len(known) + 1
    ropex.unpatch(one)
    restored = pickle.loads(pickle.dumps(other))
    del other, model
    assert len(shadows()) == len(known) + 1
    logits_of(restored, tokens(8))
    ropex.unpatch(restored)
    assert shadows() == known
    gc.collect()
    assert len(Rotating.__subclasses__()) == classes


def caches(model: Any) -> dict[str, Callable[[], Any]]:
    return {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=64),
    }


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_goes_with_its_last_reference(kind: str) -> None:
    model = model_of("llama")
    ropex.patch(model, "dynamic_ntk", factor=2).pin_length(64)
    gc.collect()
    gc.disable()
    try:
        cache = caches(model)[kind]()
        with torch.no_grad():
            model(input_ids=tokens(8), use_cache=True, **cached(model, cache))
        copied = copy.deepcopy(cache)
        alive = [weakref.ref(cache), weakref.ref(copied)]
        if hasattr(cache, "reset"):
            copied.reset()
            assert copied.ropex_tokens == 0
            assert cache.ropex_tokens == 8, "a copy's reset is its own"
        del cache, copied
        assert [each() for each in alive] == [None, None]
    finally:
        gc.enable()

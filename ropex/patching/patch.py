"""`patch` and `unpatch`: one line on a model, in place, this instance only."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import nn

from ropex._checks import require_choice, require_int, require_length
from ropex.kernels import Angles
from ropex.patching import files
from ropex.patching.config import own_configs, silently
from ropex.patching.detect import Spot, examine, find_patched
from ropex.patching.dry import FirstPass
from ropex.patching.generation import (
    Owned,
    can_own,
    drop_hooks,
    mark_cache,
    note_reentrant,
    owned_class,
    require_evaluation,
    require_growing_cache,
    require_one_length,
)
from ropex.patching.module import PatchedRotary
from ropex.patching.plan import Plan, Wish, plan_for
from ropex.patching.swap import Rotating, class_without, rotating_class, swap_class
from ropex.scaling import FrequencySchedule

__all__ = ["OnScaled", "Patch", "Precision", "Sliding", "find_patch", "load", "patch", "unpatch"]

OnScaled = Literal["error", "replace", "keep"]
Sliding = Literal["keep", "scale"]
Precision = Literal["model", "float32"]
Outgrown = Literal["error", "reprefill"]

# Not in the model: copies and pickles of it have nothing to do with the tokenizer.
_TOKENIZERS: weakref.WeakKeyDictionary[PatchedRotary, tuple[Any, int]] = weakref.WeakKeyDictionary()


class Patch:
    """A patched model; what `patch` returns. As a context manager it removes the patch at the end.

    Attributes:
        model: the model, patched in place.
        schedule: what its rotary embedding follows.
        rotary: what stands in the place of its rotary module, the first where there are several.
    """

    def __init__(self, model: nn.Module, patched: PatchedRotary) -> None:
        self.model = model
        self._patched = patched

    @property
    def rotary(self) -> PatchedRotary:
        return self._patched

    @property
    def schedule(self) -> FrequencySchedule:
        return self.rotary.rope.schedule

    def remove(self) -> None:
        """Put everything back, bit for bit.

        Raises:
            ValueError: this patch was removed before, even if the model carries another one now.
        """
        self._require_in_effect()
        unpatch(self.model)

    def pin_length(self, length: int | None, *, outgrown: Outgrown = "error") -> ExitStack:
        """Serve every pass as part of a context of `length` tokens, until another call, or the end of a `with` block.

        `generate` pins the prompt plus the new tokens by itself, each row of a padded batch its own. Pin by hand to
        decode by hand, to keep a cache from one generation to the next, or to generate at a length of your choice. A
        static method is the same at every length.

        Args:
            length: tokens of the prompt plus those to be generated; None: the length that each pass shows.
            outgrown: what to do with a context that outgrows the pin: `error`; or `reprefill`, with which `generate`
                pins twice the length and begins anew with all tokens so far as its prompt.

        Example:
            >>> with patch.pin_length(32768):  # doctest: +SKIP
            ...     cache = model(prompt, use_cache=True).past_key_values
        """
        self._require_in_effect()
        require_choice("outgrown", outgrown, get_args(Outgrown))
        spots = find_patched(self.model)
        before = self.rotary.rope.pinned_length, self.rotary.outgrown

        def pin(length: int | None, outgrown: str) -> None:
            for spot in spots:
                spot.patched.pin_length(length)
                spot.patched.outgrown = outgrown

        stack = ExitStack()
        stack.callback(pin, *before)
        pin(length, outgrown)
        return stack

    def save(self, directory: str | Path) -> None:
        """Write `ropex.json`, and beside it what the method has learned, for `ropex.load`.

        An earlier save in the directory is replaced at one point in time: a reader, or a process that is killed, finds
        the old one or the new one. Several processes may save to the same directory; they wait for each other.

        Raises:
            ValueError: the patch was removed, or its schedule is your own class, which no file can name.
            OSError: the directory cannot be written; what was there is still there.
        """
        self._require_in_effect()
        files.save(self.model, directory)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._in_effect():
            self.remove()

    def _in_effect(self) -> bool:
        return any(spot.patched is self.rotary for spot in find_patched(self.model))

    def _require_in_effect(self) -> None:
        if not self._in_effect():
            raise ValueError(f"{self!r} is no longer in effect: it was removed; use what the last ropex.patch returned")

    def __repr__(self) -> str:
        return f"Patch({type(self.model).__name__}, {self.schedule!r})"


def patch(
    model: nn.Module,
    method: str | FrequencySchedule | None = None,
    factor: float | Literal["auto"] | None = None,
    length: int | None = None,
    *,
    angles: Angles = "exact",
    precision: Precision = "model",
    sliding: Sliding = "keep",
    on_scaled: OnScaled = "error",
    trained_length: int | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    data_rank: int | None = None,
    **options: Any,
) -> Patch:
    """Extend a model's context window: replace its rotary embedding in place.

    Where the model rotates is found by looking, and probed before and after: a patch that would not take effect is an
    error. An error or an interrupt (ctrl-C) leaves the model as it was. Other models in the process are untouched.
    Angles are exact, the rotation is float32 whatever the model's dtype, and the frequencies survive
    `.to(torch.bfloat16)` (what a learned method has learned is rounded with its weights).

    The config, on a copy that this model then owns, gets the target length, and the method where a config can say it:
    then `save_pretrained` writes a checkpoint that plain transformers loads with the same logits. All is put back by
    `remove()`.

    Args:
        model: a transformers model, or one that contains it; the outermost one at hand, whose config shall tell.
        method: a name from `ropex.methods()`, or a schedule; `yarn` by default. `auto` takes the training-free method
            that `ropex.recommend` says for `length=`, and within the trained length leaves the frequencies alone.
        factor: target length / pretraining length, >= 1. (For `dynamic_ntk`: its own factor; for `e2llm` also "auto".)
        length: the target length in tokens, instead of the factor.
        angles: `exact`; or `float32`, transformers' own arithmetic bit for bit.
        precision: `model`; or `float32`: rotated queries and keys stay float32, and attention computes in it, so that
            scores depend on relative positions alone also in a bfloat16 model. Slower, and its cache is twice as large.
        sliding: what to do with layers whose window ends within the trained length: `keep` the angles that the model
            gives them, which no longer context can take out of their range, or `scale` them like the others.
        on_scaled: what to do with a model whose config already carries a scaling: `error`; `replace` it, counting from
            the pretraining length; or `keep` the method that it carries, with its options, widened to the factor or
            length if one is given.
        trained_length: the context length of pretraining in tokens, where the config does not tell it (it carries a
            `linear` scaling, or a maximum that pretraining never reached).
        tokenizer: its `model_max_length` becomes the target length, until `remove()`.
        seed: of what a method draws in training (`clex`, `e2llm`, `pose`, `random_positions`).
        data_rank: this process's rank among those that train on different data; None: its rank in `torch.distributed`.
        options: the method's other options, see its class.

    Returns:
        A `Patch`, with `.remove()`; also a context manager.

    Raises:
        UnsupportedModelError: the model has no rotary embedding, or one that ropex does not know.
        ValueError: a bad option, a model that is already patched, or one that is already scaled.

    Example:
        >>> patch(model, method="yarn", factor=8)  # doctest: +SKIP
        Patch(LlamaForCausalLM, YaRN(factor=8, ...))
    """
    settings: dict[str, Any] = {"angles": angles, "precision": precision, "sliding": sliding, "on_scaled": on_scaled}
    settings |= {"seed": seed, "data_rank": data_rank, "trained_length": trained_length}
    return _patched(model, Wish(method, factor, length, options, settings), tokenizer)


def _patched(model: nn.Module, wish: Wish, tokenizer: Any, finish: Callable[[], None] | None = None) -> Patch:
    """Plan a patch and do it; what it ends with is part of it."""
    for name, choices in (("angles", Angles), ("precision", Precision), ("sliding", Sliding), ("on_scaled", OnScaled)):
        require_choice(name, wish.settings[name], get_args(choices))
    require_int("seed", wish.settings["seed"], minimum=0, remedy="pass the run's seed")
    if (trained_length := wish.settings["trained_length"]) is not None:
        require_length("trained_length", trained_length, remedy="pass the pretraining length in tokens")
    model_name = type(model).__name__
    if found := find_patched(model):
        raise ValueError(
            f"{model_name} is already patched with {found[0].patched.rope.schedule!r}: must be unpatched; "
            "call ropex.unpatch(model) first"
        )
    if tokenizer is not None and not isinstance(getattr(tokenizer, "model_max_length", None), int):
        raise ValueError(f"tokenizer={tokenizer!r}: must have a model_max_length; pass the model's tokenizer")
    with torch.device("cpu"), silently():  # whatever the default device is
        plan = plan_for(model, examine(model, trained_length), wish)
    return _apply(model, plan, tokenizer, finish)


def _apply(model: nn.Module, plan: Plan, tokenizer: Any, finish: Callable[[], None] | None) -> Patch:
    """Do what was planned, or leave the model as it was.

    All is made ready first. Then the rotary module goes in, which notes what was there before; from there on
    `_restore` finds whatever part of the patch is in the model.
    """
    first = plan.rotaries[0]
    schedule = first.rope.schedule
    classes = [(module, rotating_class(swap)) for module, swap in plan.swaps]
    if schedule.length_dependent or plan.parameters is None:
        owned: list[Any] = [each for each in model.modules() if can_own(each) and not isinstance(each, Owned)]
        classes += [(module, owned_class(module.__class__)) for module in owned]
    for (_, _, training), patched in zip(plan.places, plan.rotaries, strict=True):
        patched.check()
        patched.train(training)
    configs = own_configs(model)
    changes = [
        (target, name, hasattr(target, name), getattr(target, name, None), value)
        for target, name, value in plan.changes(configs)
    ]
    first.changes, first.shared_configs = changes, [(module, name, before) for module, name, before, _ in configs]
    attributes: dict[nn.Module, dict[str, Any]] = {}
    for module, name, value in plan.attributes:
        attributes.setdefault(module, {})[name] = value
    if raises := tokenizer is not None and tokenizer.model_max_length < plan.target:
        _TOKENIZERS[first] = (tokenizer, tokenizer.model_max_length)
    try:
        for (owner, name, _), patched in zip(plan.places, plan.rotaries, strict=True):
            owner._modules[name] = patched
        if raises:
            tokenizer.model_max_length = plan.target
        for module, name, _, config in configs:
            module.__dict__[name] = config
        for target, name, _, _, value in changes:
            setattr(target, name, value)
        for module, values in attributes.items():  # undone where they stand, so that copies of either part are whole
            module.__dict__["ropex_undo"] = {name: getattr(module, name) for name in values}
            for name, value in values.items():
                setattr(module, name, value)
        for module, cls in classes:
            swap_class(module, cls)
        _register_hooks(plan)
        if finish is not None:
            finish()
        first.shared_configs = []
    except BaseException as error:
        for failure in _restore(model):
            error.add_note(f"{type(failure).__name__}: {failure} {' '.join(failure.__notes__)}")
        raise
    return Patch(model, first)


def _register_hooks(plan: Plan) -> None:
    """The hooks of the module that runs the layers; `_restore` knows them by where they are defined."""
    first, owner = plan.rotaries[0], plan.owner
    schedule = first.rope.schedule
    if schedule.augments:
        owner.register_forward_pre_hook(require_evaluation, with_kwargs=True)
    if first.settings["precision"] == "float32":
        owner.register_forward_pre_hook(require_growing_cache, with_kwargs=True)
    if schedule.learned:
        owner.register_forward_pre_hook(note_reentrant)
    if schedule.length_dependent:
        owner.register_forward_pre_hook(require_one_length, with_kwargs=True)
        owner.register_forward_hook(mark_cache, with_kwargs=True)
    if plan.unseen:
        FirstPass(frozenset(plan.unseen)).watch(owner, plan.rotaries, plan.unseen)


def _restore(model: nn.Module) -> list[Exception]:
    """Put back whatever a patch has changed, all of it or a part; gives what a user's objects raised.

    Each step may be done twice, and the note of what was there before goes last: where this is interrupted, it is
    called again.
    """
    failures: list[Exception] = []
    without = functools.cache(class_without)  # one class for all modules of a kind
    for module in [*model.modules()]:
        drop_hooks(module)
        for marker in (Rotating, Owned):
            cls: Any = module.__class__
            if issubclass(cls, marker):
                swap_class(module, without(cls, marker))
        for name, value in module.__dict__.get("ropex_undo", {}).items():
            setattr(module, name, value)
        module.__dict__.pop("ropex_undo", None)
    for spot in sorted(find_patched(model), key=lambda spot: bool(spot.patched.changes)):
        failures += _restore_spot(spot)
    return failures


def _restore_spot(spot: Spot) -> list[Exception]:
    """Put back a rotary module and what the patch's one notes; gives what a user's objects raised."""
    patched, failures = spot.patched, []
    before = [(target, name, existed, value) for target, name, existed, value, _ in reversed(patched.changes)]
    if (noted := _TOKENIZERS.get(patched)) is not None:
        before.append((noted[0], "model_max_length", True, noted[1]))
    for target, name, existed, value in before:
        try:
            if not existed:
                vars(target).pop(name, None)
            elif getattr(target, name) is not value:
                setattr(target, name, value)
        except Exception as error:  # of a setter that is not ours; the rest is put back all the same
            error.add_note(f"while ropex put back {name}={value!r} of {type(target).__name__}: set it by hand")
            failures.append(error)
    for module, name, config in patched.shared_configs:
        module.__dict__[name] = config
    spot.owner._modules[spot.name] = patched.original.train(patched.training)
    _TOKENIZERS.pop(patched, None)
    return failures


def find_patch(model: nn.Module) -> Patch | None:
    """The patch that a model carries, or None."""
    spots = find_patched(model)
    return Patch(model, spots[0].patched) if spots else None


def unpatch(model: nn.Module) -> None:
    """Remove a patch and put everything back, bit for bit; an interrupt (ctrl-C) is raised once that is done.

    Raises:
        ValueError: the model is not patched.
    """
    spots = find_patched(model)
    owned = [module for module in model.modules() if isinstance(module, Owned)]
    if not spots and not owned:  # whose inner model may have been unpatched alone
        raise ValueError(
            f"{type(model).__name__} is not patched: must carry a ropex patch; call ropex.patch(model) first"
        )
    try:
        failures = _restore(model)
    except BaseException:
        _restore(model)  # what interrupted it is told once all is put back
        raise
    if failures:
        raise failures[0]


def load(model: nn.Module, directory: str | Path, *, tokenizer: Any = None) -> Patch:
    """Patch a model the way that `Patch.save` wrote down, with what the method had learned.

    Args:
        model: the base model, not patched.
        directory: where `ropex.json` lies.
        tokenizer: as in `patch`.

    Raises:
        ValueError: files that are missing, damaged, changed, of a newer format or not of ropex, or of a model of
            another geometry.
    """
    saved = files.read(directory)
    settings = {"trained_length": None, **saved.settings, "data_rank": None}
    if settings["on_scaled"] == "error":
        settings["on_scaled"] = "replace"  # the model may come from where the config says what the patch did
    wish = Wish(saved.schedule, None, None, {}, settings, loading=True)
    return _patched(model, wish, tokenizer, lambda: files.restore(model, saved))

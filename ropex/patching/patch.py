"""`patch` and `unpatch`: one line on a model, in place, this instance only."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, get_args

from torch import nn

from ropex._checks import require_choice, require_int
from ropex.kernels import Angles
from ropex.patching.config import own_configs
from ropex.patching.detect import Site, check_in_effect, find_patched, find_site
from ropex.patching.module import PatchedRotary, mark_cache, require_evaluation, require_one_length
from ropex.patching.swap import Rotating, rotating_class
from ropex.rotary import RotaryEmbedding
from ropex.scaling import FrequencySchedule, schedule_for

__all__ = ["Patch", "patch", "unpatch"]


class Patch:
    """A patched model; what `patch` returns. As a context manager it removes the patch at the end.

    Attributes:
        model: the model, patched in place.
        schedule: what its rotary embedding follows.
    """

    def __init__(self, model: nn.Module, patched: PatchedRotary) -> None:
        self.model = model
        self._patched = patched

    @property
    def schedule(self) -> FrequencySchedule:
        return self._patched.rope.schedule

    def remove(self) -> None:
        """Put everything back, bit for bit.

        Raises:
            ValueError: this patch was removed before, even if the model carries another one now.
        """
        self._require_in_effect()
        unpatch(self.model)

    def pin_length(self, length: int | None) -> ExitStack:
        """Serve every pass as part of a context of `length` tokens, until another call, or the end of a `with` block.

        A length-dependent schedule needs it for generation, since cached keys keep the frequencies they were made with;
        a static one is the same at every length.

        Args:
            length: tokens of the prompt plus those to be generated; None: the length that each pass shows.

        Example:
            >>> with patch.pin_length(32768):  # doctest: +SKIP
            ...     model.generate(**inputs, max_new_tokens=256)
        """
        self._require_in_effect()
        rope = self._patched.rope
        stack = ExitStack()
        stack.callback(rope.pin_length, rope.pinned_length)
        rope.pin_length(length)
        return stack

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._in_effect():
            self.remove()

    def _in_effect(self) -> bool:
        found = find_patched(self.model)
        return found is not None and found[2] is self._patched

    def _require_in_effect(self) -> None:
        if not self._in_effect():
            raise ValueError(f"{self!r} is no longer in effect: it was removed; use what the last ropex.patch returned")

    def __repr__(self) -> str:
        return f"Patch({type(self.model).__name__}, {self.schedule!r})"


def patch(
    model: nn.Module,
    method: str | FrequencySchedule = "yarn",
    factor: float | Literal["auto"] | None = None,
    length: int | None = None,
    *,
    angles: Angles = "exact",
    on_scaled: str = "error",
    seed: int = 0,
    data_rank: int | None = None,
    **options: Any,
) -> Patch:
    """Extend a model's context window: replace its rotary embedding in place.

    Where the model rotates is found by looking, and probed before and after: a patch that would not take effect is an
    error, and an error leaves the model as it was. Other models in the process are untouched. Angles are exact, the
    rotation is float32 whatever the model's dtype, and the frequencies survive `.to(torch.bfloat16)` (what a learned
    method has learned is rounded with its weights).
    `config.max_position_embeddings` becomes the target length, on a copy of the config that this model then owns.

    Args:
        model: a transformers model, or one that contains it; the outermost one at hand, whose config shall tell.
        method: a name from `ropex.methods()`, or a schedule.
        factor: target length / pretraining length, >= 1. (For `dynamic_ntk`: its own factor; for `e2llm` also "auto".)
        length: the target length in tokens, instead of the factor.
        angles: `exact`; or `float32`, transformers' own arithmetic bit for bit.
        on_scaled: what to do with a model whose config already carries a scaling: `error`, or `replace` it, counting
            from the pretraining length.
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
    require_choice("angles", angles, get_args(Angles))
    require_choice("on_scaled", on_scaled, ("error", "replace"))
    model_name = type(model).__name__
    if found := find_patched(model):
        raise ValueError(
            f"{model_name} is already patched with {found[2].rope.schedule!r}: must be unpatched; "
            "call ropex.unpatch(model) first"
        )
    site = find_site(model)
    if site.scaling is not None:
        _require_replaceable(model_name, site, on_scaled)
    schedule = schedule_for(method, site.geometry.trained_length, factor=factor, length=length, **options)
    with site.rotary.get_buffer("inv_freq").device:
        rope = RotaryEmbedding(site.geometry, schedule, seed=seed, data_rank=data_rank)
    patched = PatchedRotary(rope, site.rotary, pairing=site.pairing, angles=angles)
    check_in_effect(patched.eval())
    patched.train(site.owner.training)

    target = schedule.target_length(site.geometry.trained_length)
    require_int("target_length", target, minimum=1, remedy=f"mend {type(schedule).__name__}.target_length")
    classes = [rotating_class(type(attention), function, site.pairing) for attention, function in site.attentions]
    configs = own_configs(model)
    # Nothing has been changed so far, and nothing below can fail.
    for module, config in configs:
        module.__dict__["config"] = config
    for (attention, _), cls in zip(site.attentions, classes, strict=True):
        attention.__class__ = cls
    setattr(site.owner, site.name, patched)
    _set_max_length(patched, target)
    if schedule.augments:
        patched.hooks.append(site.owner.register_forward_pre_hook(require_evaluation, with_kwargs=True))
    if schedule.length_dependent:
        patched.hooks.append(site.owner.register_forward_pre_hook(require_one_length, with_kwargs=True))
        patched.hooks.append(site.owner.register_forward_hook(mark_cache))
    return Patch(model, patched)


def unpatch(model: nn.Module) -> None:
    """Remove a patch and put everything back, bit for bit.

    Raises:
        ValueError: the model is not patched.
    """
    owner, name, patched = _require_patched(model)
    for hook in patched.hooks:
        hook.remove()
    _set_max_length(patched, patched.max_position_embeddings)
    setattr(owner, name, patched.original)
    for module in model.modules():
        if isinstance(module, Rotating):
            module.__class__ = module.ropex_made_from[0]


def _require_replaceable(model_name: str, site: Site, on_scaled: str) -> None:
    carries = f'{model_name}\'s config already carries a scaling of the type "{site.scaling}"'
    if on_scaled == "error":
        raise ValueError(
            f'{carries}: scaling twice is rarely meant; pass on_scaled="replace" to count from the pretraining length, '
            "or remove the scaling from the config and load the model anew"
        )
    if not site.length_known:
        raise ValueError(
            f"{carries} and does not tell the pretraining length, which replacing it needs; "
            "set config.original_max_position_embeddings"
        )


def _set_max_length(patched: PatchedRotary, length: int) -> None:
    patched.original.config.max_position_embeddings = length  # type: ignore[union-attr]  # the config that all share


def _require_patched(model: nn.Module) -> tuple[nn.Module, str, PatchedRotary]:
    if found := find_patched(model):
        return found
    raise ValueError(f"{type(model).__name__} is not patched: must carry a ropex patch; call ropex.patch(model) first")

"""CLEX: frequencies as the solution of a neural ordinary differential equation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ropex import draws
from ropex._checks import require_choice, require_dim, require_int, require_number
from ropex.rotation import Geometry, Request, Rotation
from ropex.scaling.base import (
    FrequencySchedule,
    growth,
    looked_up,
    ntk_exponent,
    ntk_stretched,
    pair_index,
    require_key,
)

__all__ = ["CLEX"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "silu": nn.functional.silu}
# The net's input is about -40 for the slowest pair of a base of 1e7. Beyond this bound it has no slope, so that a net
# that training has made wild neither overflows nor sends back infinite gradients.
_INPUT_BOUND = 100.0


class _Equation(nn.Module):
    """The differential equation: its net and its solution. The fields are those of `CLEX`."""

    dim: int | None
    max_factor: int
    step: float
    activation: str
    net_base: float | None
    up_proj: nn.Parameter
    down_proj: nn.Parameter

    def make_parameters(self, dim: int, width: int) -> None:
        self.up_proj = nn.Parameter(torch.empty(dim // 2, width * dim, dtype=torch.float32))
        self.down_proj = nn.Parameter(torch.empty(width * dim, dim // 2, dtype=torch.float32))
        self.register_load_state_dict_pre_hook(_accept_released_names)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the net an untrained one."""
        nn.init.kaiming_uniform_(self.up_proj, a=math.sqrt(5))
        nn.init.zeros_(self.down_proj)

    def inv_freq(self, request: Request, t: Tensor | float) -> Tensor:
        """The frequencies at t, 1 to max_factor: [half] for a number or 0-d, [batch, 1, half] for [batch, 1, 1]."""
        theta, base = request.inv_freq(), self.net_base or request.geometry.base
        t = torch.as_tensor(t, dtype=theta.dtype, device=theta.device)
        ntk = ntk_stretched(theta, 2 * t - 1)
        _require_dim(self.dim, request.geometry)
        if self.dim is None:
            return ntk
        at_one = theta.log() - pair_index(theta) / len(theta) * math.log(base)
        return ntk * self._residual(at_one, t).clamp(max=math.log(2 * math.pi) - ntk.log()).exp()

    def _residual(self, at_one: Tensor, t: Tensor) -> Tensor:
        """What the net adds to ln inv_freq from 1 to t: by Runge-Kutta steps of the fourth order, as many for every t.

        Args:
            at_one: what the net takes at t = 1, `ln inv_freq + ln omega`, [half].
            t: 0-d or [batch, 1, 1]; steps beyond it have a width of 0.
        """
        act, up, down = _ACTIVATIONS[self.activation], self.up_proj.to(at_one), self.down_proj.to(at_one)
        exponent = ntk_exponent(at_one)

        def slope(time: Tensor, residual: Tensor) -> Tensor:
            x = at_one - 2 * exponent * (2 * time - 1).log() + residual  # both logarithms carry the stretch of NTK
            return act(x.clamp(-_INPUT_BOUND, _INPUT_BOUND) @ up) @ down

        residual = torch.zeros_like(at_one * t)
        for number in range(math.ceil((self.max_factor - 1) / self.step)):
            start = 1 + number * self.step
            h = (t - start).clamp(0, self.step)
            first = slope(start + 0 * h, residual)
            second = slope(start + h / 2, residual + h / 2 * first)
            third = slope(start + h / 2, residual + h / 2 * second)
            fourth = slope(start + h, residual + h * third)
            residual = residual + h / 6 * (first + 2 * second + 2 * third + fourth)
        return residual


@dataclass(eq=False)
class CLEX(_Equation, FrequencySchedule):
    """Log frequencies follow a learned differential equation in the factor t, from the model's own at t = 1.

    With y = ln inv_freq and the NTK-aware frequencies omega(t) of alpha = 2 t - 1,

        dy/dt = act((y + ln omega(t)) up_proj) down_proj - 4 i / ((dim - 2) (2 t - 1)).

    The second term alone gives `omega(t)` in closed form; the net's residual is integrated around it with fixed steps
    of the fourth-order Runge-Kutta method. So CLEX with `down_proj` = 0, untrained, is NTK with alpha = 2 t - 1.

    In training t is an integer, uniform on {1 .. max_factor} and one per pass, and the T tokens of each sample stand at
    random positions of {0 .. t T - 1}, the first and the last pinned; where T exceeds the trained length L, positions
    count T // L times less. In evaluation t is the factor, or follows the length n: `clip(ceil(n / L), 1, max_factor)`.

    Use it for a fine-tuning, at the trained length, that reaches max_factor times that length. The net learns with the
    model: its parameters are in the module that asks (`ropex.RotaryEmbedding`), and in the patched model.

    Args:
        factor: t in evaluation, 1 to max_factor; None: by the length.
        dim: rotary dimension; None: filled in from the geometry by `ropex.patch` and `ropex.RotaryEmbedding`. Until
            then there is no net, which is as good as an untrained one.
        max_factor: the largest t, an int >= 2.
        step: of the solver, >= 0.001. It takes `ceil((max_factor - 1) / step)` steps of four evaluations for every t.
        width: the net's hidden units over `dim`.
        activation: `"tanh"` or `"silu"`.
        net_base: base of omega in the net's input; the model's by default. The released checkpoints need 10 000.

    Note:
        The net's arithmetic is float64 whatever the dtype of its weights, and no autocast touches it. Frequencies are
        bounded by one turn per token. The released code integrates both terms numerically, with steps of 0.01, and
        keeps frequencies of earlier weights.

    Note:
        The weights are made float32 and follow a later `.to(torch.bfloat16)`, which rounds them, and with them what was
        learned: patch after the model has its dtype.

    Note:
        `load_state_dict` takes the released implementation's names too (`ode_up_proj`, `proj_func.ode_up_proj` ...).

    Example:
        >>> geometry = Geometry(dim=8, base=10_000.0, trained_length=2048)
        >>> untrained = CLEX(dim=8).at(geometry, length=8192).inv_freq
        >>> bool(torch.allclose(untrained, schedule("ntk", factor=7).at(geometry, length=1).inv_freq))
        True

    Reference: Chen et al., CLEX: Continuous Length Extrapolation for Large Language Models, 2023, arXiv:2310.16450,
    eq. 10 to 13, and the released code.
    """

    factor: float | None = None
    dim: int | None = None
    max_factor: int = 16
    step: float = 0.5
    width: int = 1
    activation: Literal["tanh", "silu"] = "tanh"
    net_base: float | None = None
    method: ClassVar[str] = "clex"
    paper: ClassVar[str] = "Chen et al. 2023, arXiv:2310.16450"
    learned = True
    training_free = False
    augments = True
    length_dependent = True  # unless the factor is given

    def __new__(cls, *args: Any, **kwargs: Any) -> CLEX:
        made = super().__new__(cls)
        nn.Module.__init__(made)  # before the first option is set, whatever it is
        return made

    def __post_init__(self) -> None:
        _check(self)
        self.length_dependent = self.factor is None
        if self.dim is not None:
            self.make_parameters(self.dim, self.width)

    def for_geometry(self, geometry: Geometry) -> CLEX:
        _require_dim(self.dim, geometry)
        return self if self.dim is not None else replace(self, dim=geometry.dim)

    def rotation(self, request: Request) -> Rotation:
        positions, trained_length = request.positions, request.geometry.trained_length
        if not request.training:
            t = growth(request).ceil().clamp(1, self.max_factor) if self.factor is None else self.factor
            return Rotation(positions, self.inv_freq(request, t))
        key, window = require_key(request, self.method), positions.shape[-1]
        drawn = 1 + draws.integers(key[:1], 1, self.max_factor)[0, 0]
        positions = looked_up(_sampled(draws.next_key(key), window, drawn, self.max_factor), positions)
        return Rotation(positions, self.inv_freq(request, drawn) / max(window // trained_length, 1))

    def target_length(self, trained_length: int) -> int:
        return round((self.factor or self.max_factor) * trained_length)


def _check(clex: CLEX) -> None:
    largest = "pass the largest factor to train for, such as 16"
    require_int("max_factor", clex.max_factor, minimum=2, maximum=4096, remedy=largest)
    if clex.factor is not None:
        require_number(
            "factor",
            clex.factor,
            minimum=1,
            maximum=clex.max_factor,
            remedy="the net is integrated up to max_factor; pass a larger max_factor=, or a smaller target",
        )
    if clex.dim is not None:
        require_dim(clex.dim)
    require_number("step", clex.step, minimum=1e-3, remedy="pass the solver's step, such as 0.5")
    require_int("width", clex.width, minimum=1, maximum=4096, remedy="pass the net's hidden units over dim")
    require_choice("activation", clex.activation, _ACTIVATIONS)
    if clex.net_base is not None:
        require_number(
            "net_base", clex.net_base, minimum=1, strict=True, remedy="pass a base, such as 10000.0, or None"
        )


def _require_dim(dim: int | None, geometry: Geometry) -> None:
    if dim not in (None, geometry.dim):
        raise ValueError(f"dim={dim}: must be the rotary dimension of {geometry}; pass it, or leave dim out")


def _sampled(key: Tensor, window: int, t: Tensor, max_factor: int) -> Tensor:
    """`window` sorted positions of {0 .. window t - 1}, the first and the last pinned, int64 [batch, window]."""
    last = (window * t - 1).expand(len(key), 1)
    if window == 1:
        return torch.zeros_like(last)
    between = 1 + draws.subset(key, window - 2, window * t - 2, limit=window * max_factor - 2)
    return torch.cat((torch.zeros_like(last), between, last), dim=-1)


def _accept_released_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        if (last := name.rpartition(".")[2]) in ("ode_up_proj", "ode_down_proj"):
            state_dict[prefix + last.removeprefix("ode_")] = state_dict.pop(name)

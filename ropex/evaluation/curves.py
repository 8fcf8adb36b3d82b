"""What curves over the length say in one number, or three."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ropex._checks import require_list, require_number, require_type

__all__ = ["LossCurve", "effective_length", "fit_loss_curve"]

# Where the exponent is looked for; at 0.01 the curve is a logarithm to a few per cent.
_SMALLEST_BETA, _LARGEST_BETA = 0.01, 10.0


def effective_length(results: Mapping[int, float], threshold: float) -> int | None:
    """The largest length at which, and below which, no score is under the threshold; None: there is none.

    Args:
        results: scores by length in tokens, higher is better, such as `RetrievalResult.by_length` gives.
        threshold: RULER takes Llama-2-7B-chat's score at 4,096 tokens, 85.6 %. For a small model take 0.8 of the
            unpatched model's score at half its trained length, and say so.

    Raises:
        ValueError: no scores, or some that are not finite.

    Example:
        >>> effective_length({4096: 0.9, 8192: 0.8, 16384: 0.4, 32768: 0.9}, threshold=0.75)
        8192

    Reference: Hsieh et al., RULER, 2024, arXiv:2404.06654, section 4.
    """
    require_number("threshold", threshold, minimum=-math.inf, remedy="pass a score")
    require_type("results", results, Mapping, "a dict of scores by length; pass such as {4096: 0.9}")
    for length in results:
        require_number("length", length, minimum=0, strict=True, remedy="pass tokens")
    if not results:
        raise ValueError("results={}: must hold a score for at least one length; pass such as {4096: 0.9}")
    reached = None
    for length, score in sorted(results.items()):
        require_number(f"results[{length}]", score, minimum=-math.inf, remedy="pass the score at this length")
        if score < threshold:
            break
        reached = length
    return reached


@dataclass(frozen=True)
class LossCurve:
    """L(c) = (alpha / c) ** beta + gamma, fitted.

    Attributes:
        alpha: in tokens; beta: > 0; gamma: what no context takes away, in nats.
        r_squared: the share of the losses' variance that the curve explains.
    """

    alpha: float
    beta: float
    gamma: float
    r_squared: float

    def __call__(self, length: float) -> float:
        """The loss at this length."""
        return float((self.alpha / length) ** self.beta + self.gamma)


def fit_loss_curve(lengths: Sequence[float], losses: Sequence[float]) -> LossCurve:
    """The power law that a loss follows while longer context helps: L(c) = (alpha / c) ** beta + gamma.

    Least squares. Beyond the length that a model can use its loss rises, which no such curve does: `r_squared` tells.

    Args:
        lengths: of the context, in tokens, such as the middles of bins.
        losses: nats per token at each.

    Raises:
        ValueError: fewer than four points, lengths that are not positive and distinct, losses that are not finite, do
            not fall with the length, or fall in another way: as slowly as a logarithm, or all at once.

    Example:
        >>> curve = fit_loss_curve([512, 1024, 2048, 4096], [(900 / c) ** 0.4 + 2 for c in (512, 1024, 2048, 4096)])
        >>> round(curve.alpha), round(curve.beta, 3), round(curve.gamma, 3)
        (900, 0.4, 2.0)

    Reference: Xiong et al., Effective Long-Context Scaling of Foundation Models, 2023, arXiv:2309.16039, eq. 1.
    """
    require_list("lengths", lengths, "tokens")
    require_list("losses", losses, "nats per token")
    for length, loss in zip(lengths, losses, strict=False):
        require_number("length", length, minimum=0, strict=True, remedy="pass tokens")
        require_number("loss", loss, minimum=-math.inf, remedy="pass nats per token")
    if len(lengths) != len(losses) or len(losses) < 4 or len(set(lengths)) < len(lengths):
        raise ValueError(
            f"{len(lengths)} lengths and {len(losses)} losses: must be as many, at least four, and no length twice; "
            "pass more points"
        )
    x = torch.tensor(lengths, dtype=torch.float64)
    y = torch.tensor(losses, dtype=torch.float64)
    scale = x.log().mean().exp()

    def solve(beta: float) -> tuple[float, float, float]:
        """For this exponent the rest is linear: slope, gamma and the squared error."""
        basis = (scale / x) ** beta
        slope = ((basis - basis.mean()) * (y - y.mean())).sum() / (basis - basis.mean()).square().sum()
        gamma = y.mean() - slope * basis.mean()
        return slope.item(), gamma.item(), (y - gamma - slope * basis).square().sum().item()

    low, high = math.log(_SMALLEST_BETA), math.log(_LARGEST_BETA)
    grid = torch.linspace(low, high, 400, dtype=torch.float64).tolist()
    errors = [solve(math.exp(exponent))[2] for exponent in grid]
    best = errors.index(min(errors))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if solve(math.exp(left))[2] < solve(math.exp(right))[2]:
            high = right
        else:
            low = left
    beta = math.exp((low + high) / 2)
    slope, gamma, error = solve(beta)
    if slope <= 0:
        raise ValueError(
            "losses that do not fall with the length: must fall for a power law; leave out what lies beyond the length "
            "that the model can use"
        )
    if best in (0, len(grid) - 1):
        raise ValueError(
            f"losses that fall as with an exponent of {_SMALLEST_BETA if best == 0 else _LARGEST_BETA:g} or beyond: no "
            "power law fits them best; pass more points, or points further apart"
        )
    spread = (y - y.mean()).square().sum().item()
    return LossCurve(scale.item() * slope ** (1 / beta), beta, gamma, 1 - error / spread)

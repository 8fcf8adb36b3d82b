"""Nothing is lost and nothing is half done: a few of each experiment; many with `make test-all`."""

from __future__ import annotations

import pytest

from tests.chaos.experiments import EXPERIMENTS, figures_of, wrong

HALVES = [list(EXPERIMENTS)[i::2] for i in range(2)]


@pytest.mark.parametrize("names", HALVES, ids=["one half", "the other half"])
def test_nothing_is_lost(names: list[str]) -> None:
    figures = figures_of({name: EXPERIMENTS[name].few for name in names})
    for name in names:
        assert not wrong(figures[name]), (name, figures[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_nothing_is_ever_lost(name: str) -> None:
    (figures,) = figures_of({name: EXPERIMENTS[name].many}).values()
    assert not wrong(figures), figures

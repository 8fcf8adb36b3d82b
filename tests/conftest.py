from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import hypothesis
import pytest
import torch

# A test must never ask a hub; and progress bars are no output of a test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:  # each worker has a core, and its processes too
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# Drawn numbers are the same in every run, and a slow machine is no failure.
hypothesis.settings.register_profile("ropex", derandomize=True, deadline=None)
hypothesis.settings.load_profile("ropex")


def pytest_configure(config: pytest.Config) -> None:
    # Without a GPU the Triton kernels run in Triton's interpreter; `pytest -m gpu` runs them on the GPU.
    wanted = config.getoption("markexpr").split()
    if not torch.cuda.is_available() or "gpu" not in wanted or "not gpu" in " ".join(wanted):
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def thinned(values: Iterable[str], *kept: str) -> list[Any]:
    """Parameters of which `make test` runs those that are kept, and `make test-all` the rest, too."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a Triton kernel runs: in the interpreter, or on a GPU."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)

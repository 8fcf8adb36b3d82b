"""What Triton's compiler makes of the kernels, for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
KERNELS = [
    "forward", "backward", "interleaved", "table", "per_token", "split",
    "frequency_gradient", "table_gradient", "norm", "norm_backward",
]  # fmt: skip
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
REGISTERS = {"frequency_gradient": 96, "table_gradient": 96, "norm": 96, "norm_backward": 128}


@pytest.fixture(scope="module")
def facts() -> dict[tuple[str, str], dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ahead_of_time"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {(one["kernel"], one["target"]): one for one in json.loads(done.stdout)}


def test_every_kernel_is_compiled_for_every_target(facts: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert set(facts) == {(kernel, target) for kernel in KERNELS for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_the_compiler_made(kernel: str, target: str, facts: dict[tuple[str, str], dict[str, Any]]) -> None:
    found = facts[kernel, target]
    assert found["spills"] == 0
    assert found["stack"] == 0
    assert 0 < found["registers"] <= REGISTERS.get(kernel, 64)
    # Two loads and two stores of 128 bits are the two halves of a head, and no channel is read or written alone.
    assert found["wide_loads"] >= 2
    assert found["wide_stores"] >= 2
    assert found["narrow_accesses"] == 0
    assert found["bf16_arithmetic"] == 0
    assert found["multiplies_32_bit"] == 0
    assert found["multiplies_64_bit"] > 0

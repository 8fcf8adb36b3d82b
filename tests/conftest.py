from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# A test must never ask a hub; and progress bars are no output of a test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# Drawn numbers are the same in every run, and a slow machine is no failure.
hypothesis.settings.register_profile("ropex", derandomize=True, deadline=None)
hypothesis.settings.load_profile("ropex")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)

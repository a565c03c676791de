"""For all tests, before any of them imports Triton, which then decides it for good."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in its interpreter

from lowbit import bf16  # which imports Triton


@pytest.fixture(scope="session", autouse=True)
def everywhere() -> Iterator[None]:
    """All products as LOWBIT_BF16 says, PyTorch's own included, as in every verb."""
    with bf16.everywhere():
        yield

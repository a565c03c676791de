"""For all tests, before any of them imports Triton, which then decides it for good."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in its interpreter

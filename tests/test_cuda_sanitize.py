"""The calls that `make gpu-proof` has compute-sanitizer watch, on an emulated device: make test-cuda."""

import sys

import pytest
import torch

if "tests.cuda_emulation.plugin" not in sys.modules:
    pytest.skip("no emulated device (make test-cuda)", allow_module_level=True)

from tests.sanitize import gpu


@pytest.mark.parametrize("op", gpu.OPS, ids=lambda op: op.__name__)
def test_calls_run(op):
    op(0, torch.bfloat16, "cpu")
    op(1, torch.float32, "cpu")

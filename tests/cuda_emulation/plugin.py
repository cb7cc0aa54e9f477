"""pytest -p tests.cuda_emulation.plugin: the CUDA C++ kernels are there, on an emulated device, for CPU tensors.

Their operators have to be registered before xformer_fast is imported, which decides then what runs here.
"""

import ctypes

import torch

from tests.cuda_emulation.build import build

LIBRARY = build()
torch.ops.load_library(str(LIBRARY))
DEVICE = ctypes.CDLL(str(LIBRARY))
DEVICE.emulation_set_order.argtypes = [ctypes.c_uint64]


class Counts(ctypes.Structure):
    """What the device has done so far."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("launches", "blocks", "accesses", "matrix_loads", "matrix_load_conflicts", "products")
    ]


DEVICE.emulation_counts.restype = Counts


def set_order(seed: int):
    """The order of threads, warps and blocks; 0: ascending."""
    DEVICE.emulation_set_order(seed)


def counts() -> Counts:
    return DEVICE.emulation_counts()

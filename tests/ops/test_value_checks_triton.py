"""XFORMER_FAST_CHECK=1: values that GPU kernels clamp raise what the CPU's operators raise, before a kernel runs.

On a GPU, or in Triton's interpreter: TRITON_INTERPRET=1 pytest <this file>.
"""

import os
import subprocess
import sys

import pytest
import torch

import xformer_fast
from xformer_fast import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
X, PACKED, PAGES = torch.zeros(2, 2, 8, 16), torch.zeros(8, 2, 16), torch.zeros(3, 2, 4, 16)
TOKEN, TABLE = torch.zeros(2, 2, 1, 16), torch.ones(8, 8)


def integers(*values):
    return torch.tensor(values, dtype=torch.int32)


CASES = {  # (op, arguments, options, words of the message)
    "lengths": ("attention", (X, X, X), {"key_lengths": integers(8, 9)}, r"key_lengths\[1\] is 9"),
    "globals": (
        "attention", (X, X, X), {"global_keys": integers(0, 8), "window": (1, 1)}, r"global_keys\[1\] is 8",
    ),
    "offsets": (
        "varlen_attention", (PACKED, PACKED, PACKED, integers(0, 5, 8), integers(0, 5, 7), 8, 8), {},
        "cu_seqlens_k must start at 0",
    ),
    "longest": (
        "varlen_attention", (PACKED, PACKED, PACKED, integers(0, 8), integers(0, 8), 7, 8), {}, "max_seqlen_q is 7",
    ),
    "packed_lengths": (
        "varlen_attention", (PACKED, PACKED, PACKED, integers(0, 8), integers(0, 8), 8, 8),
        {"key_lengths": integers(-1)}, r"key_lengths\[0\] is -1",
    ),
    "cache_lengths": ("decode_attention", (TOKEN, X, X, integers(3, 9)), {}, r"cache_lengths\[1\] is 9"),
    "full_cache": (
        "decode_attention", (TOKEN, X, X, integers(3, 8)), {"new_key": TOKEN, "new_value": TOKEN},
        r"cache_lengths\[1\] is 8, must lie in 0\.\.7",
    ),
    "pages": (
        "decode_attention", (TOKEN, PAGES, PAGES, integers(3, 5)), {"block_table": integers([0, 9], [1, 3])},
        r"block_table\[1, 1\] is 3",
    ),
    "linear_lengths": ("linear_attention", (X, X, X), {"key_lengths": integers(8, 9)}, r"key_lengths\[1\] is 9"),
    "linear_offsets": (
        "linear_attention", (PACKED, PACKED, PACKED), {"cu_seqlens": integers(0, 9)}, "cu_seqlens must start at 0",
    ),
    "decay": (
        "linear_attention", (X, X, X), {"causal": True, "decay": torch.tensor([0.5, 1.5])}, r"decay\[1\] is 1.5",
    ),
    "positions": ("apply_rope", (X, TABLE, TABLE), {"positions": integers(*range(1, 9))}, "positions must lie in 0"),
    "rope": (
        "attention", (X, X, X), {"rope": (TABLE, TABLE, integers(*range(-1, 7)))}, "query_positions must lie in 0",
    ),
}  # fmt: skip


def there(x):
    return x.clone().to(DEVICE) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("name", CASES)
def test_values_are_checked(name, monkeypatch):
    op, arguments, options, words = CASES[name]
    arguments, options = [there(x) for x in arguments], {key: there(x) for key, x in options.items()}
    if "rope" in options:
        cos, sin, positions = map(there, options["rope"])
        options["rope"] = xformer_fast.Rope(cos, sin, query_positions=positions)
        monkeypatch.setattr(dispatch, "DEFAULT", "triton")  # the rotation is an op of its own
    options["backend"] = "triton"
    monkeypatch.setattr(dispatch, "CHECK", False)
    getattr(xformer_fast, op)(*arguments, **options)
    monkeypatch.setattr(dispatch, "CHECK", True)
    with pytest.raises(ValueError, match=words):
        getattr(xformer_fast, op)(*arguments, **options)


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_variable(value):
    """In a process of its own, since it is read once."""
    code = "from xformer_fast import dispatch; print(dispatch.CHECK)"
    environment = {**os.environ, "XFORMER_FAST_CHECK": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(value == "1")

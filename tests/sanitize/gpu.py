"""Random small calls of the CUDA C++ kernels, results and gradients, for NVIDIA's compute-sanitizer to watch:

    compute-sanitizer --tool racecheck python tests/sanitize/gpu.py --calls 20

Right or wrong is for the other tests to say.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "ops"))
import attention_cases
import decode_cases
import rope_cases
import test_linear_attention as linear_cases
import window_cases

import xformer_fast

DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def attention(seed: int, dtype: torch.dtype, device: str):
    options = [n for n in attention_cases.OPTIONS if n not in ("rope", "global_keys", "decomposed_bias")]
    case = attention_cases.draw(seed, dtype, small=True, packed=seed % 3 == 2, options=options, rate=0.35)
    attention_cases.evaluate(case, attention_cases.on_backend("cuda", packed=case.packed), device=device)


def decode(seed: int, dtype: torch.dtype, device: str):
    case = decode_cases.draw(seed, dtype, small=True, options=["window", "alibi_slopes", "sinks", "softcap"])
    function = lambda **keywords: xformer_fast.decode_attention(**keywords, backend="cuda")  # noqa: E731
    decode_cases.evaluate(case, function, device=device)


def rope(seed: int, dtype: torch.dtype, device: str):
    rope_cases.evaluate(rope_cases.draw(seed, dtype, small=True), rope_cases.on_backend("cuda"), device=device)


def linear(seed: int, dtype: torch.dtype, device: str):
    case = linear_cases.Case(seed, dtype, small=True)
    case.tensors = {name: tensor.to(device) for name, tensor in case.tensors.items()}
    case.options = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in case.options.items()}
    names = [name for name in case.differentiated() if name != "decay"]  # has no gradient there
    case.differentiated = lambda: names
    case.evaluate(linear_cases.on_backend("cuda"))


def window(seed: int, dtype: torch.dtype, device: str):
    case = window_cases.draw(seed, dtype)
    tensors = {name: tensor.to(device) for name, tensor in case.tensors.items()}
    case = dataclasses.replace(case, tensors=tensors, grad=case.grad.to(device))
    window_cases.evaluate(case, window_cases.on_backend("cuda"))


OPS = [attention, decode, rope, linear, window]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=60)
    parser.add_argument("--device", default="cuda", help="cpu: on the emulated device, if it is loaded")
    args = parser.parse_args()
    for i in range(args.calls):
        op, seed = OPS[i % len(OPS)], i // len(OPS)
        print(f"{op.__name__}, seed {seed}", flush=True)
        op(seed, DTYPES[seed % 3], args.device)
    if args.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

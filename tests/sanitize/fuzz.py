"""Random calls of attention and of its forms on maps, with all gradients, on every instruction set, under sanitizers.

Right or wrong is for the other tests to say: here only memory and undefined behaviour are watched.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import neighborhood_cases
import window_cases
from attention_cases import draw, evaluate, on_backend

from xformer_fast import build_info

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--note", type=Path, required=True, help="where each call is written down before it runs")
    args = parser.parse_args()
    levels = build_info.usable_isa_levels()
    for i in tqdm(range(args.calls), mininterval=0.2 if sys.stderr.isatty() else 15):
        level, seed = levels[i % len(levels)], i // len(levels)
        os.environ["XFORMER_FAST_ISA"] = level
        maps = {3: neighborhood_cases, 4: window_cases}.get(seed % 5)
        if maps:
            case = maps.draw(seed, DTYPES[seed % 3])
            args.note.write_text(f"{level}, seed {seed}: {case}\n")
            maps.evaluate(case, maps.on_backend("cpu"))
            continue
        case = draw(seed, DTYPES[seed % 3], packed=seed % 4 == 3, long=seed % 25 == 24)
        args.note.write_text(f"{level}, seed {seed}: {case}\n")
        evaluate(case, on_backend("cpu", packed=case.packed))


if __name__ == "__main__":
    main()

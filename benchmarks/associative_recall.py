"""Associative recall learned by a two-layer model, with softmax, windowed and linear attention: same code, one plot.

    python -m benchmarks.associative_recall --out DIR          about two minutes on two CPU cores

A sequence shows PAIRS pairs (key, value), every key once, then asks for the keys again in another order; the model has
to name each one's value. What a key means changes from sequence to sequence, so it must be looked up in context (Arora
et al., "Zoology", 2024). The convolution before the mixer lets a value see the key in front of it. Accuracy is over the
answers of fresh sequences; the tokens per second are of training steps, and the plot shows whatever comes out.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import xformer_fast

KEYS, VALUES, PAIRS, BATCH = 32, 32, 16, 32

MIXERS = {
    "softmax": functools.partial(xformer_fast.attention, causal=True),
    "window of 16": functools.partial(xformer_fast.attention, causal=True, window=(15, 0)),
    "linear (exp)": functools.partial(xformer_fast.linear_attention, feature_map="exp", causal=True),
}


def sequences(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (BATCH, 4 * PAIRS), and targets: the value behind each asked key, -1 elsewhere."""
    keys = torch.rand(BATCH, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = KEYS + torch.randint(VALUES, (BATCH, PAIRS), generator=generator)
    order = torch.rand(BATCH, PAIRS, generator=generator).argsort(1)
    shown = torch.stack((keys, values), 2).flatten(1)
    asked = torch.stack((keys.gather(1, order), values.gather(1, order)), 2).flatten(1)
    tokens = torch.cat((shown, asked), 1)
    targets = torch.full_like(tokens, -1)
    targets[:, 2 * PAIRS :: 2] = tokens[:, 2 * PAIRS + 1 :: 2]
    return tokens, targets


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, mixer):
        super().__init__()
        self.heads, self.mixer = heads, mixer
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.before = nn.Conv1d(width, width, 2, groups=width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        y = y + self.before(F.pad(y.mT, (1, 0))).mT
        q, k, v = self.qkv(y).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.mixer(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    def __init__(self, mixer, width: int = 64, heads: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(KEYS + VALUES, width)
        self.layers = nn.Sequential(*(Layer(width, heads, mixer) for _ in range(2)), nn.LayerNorm(width))
        self.head = nn.Linear(width, KEYS + VALUES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens)))


def train(name: str, steps: int) -> dict:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Model(MIXERS[name])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    curve, seconds = [], 0.0
    for step in tqdm(range(steps), desc=name):
        tokens, targets = sequences(generator)
        start = time.perf_counter()
        logits = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - start
        if step % 20 == 19:  # every step's sequences are new
            asked = targets >= 0
            curve.append((step + 1, (logits.argmax(-1) == targets)[asked].float().mean().item()))
    return {"curve": curve, "tokens_per_s": steps * tokens.numel() / seconds}


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, result in results.items():
        left.plot(*zip(*result["curve"], strict=True), label=name)
    left.set(xlabel="training step", ylabel="accuracy of recall", ylim=(0, 1.02))
    left.legend()
    right.barh(list(results), [r["tokens_per_s"] / 1e3 for r in results.values()])
    right.set(xlabel="thousand tokens per second, training")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    args = parser.parse_args()
    results = {name: train(name, args.steps) for name in MIXERS}
    for name, result in results.items():
        accuracy = sum(a for _, a in result["curve"][-5:]) / len(result["curve"][-5:])
        print(f"{name:<14} accuracy {accuracy:.3f}   {result['tokens_per_s']:,.0f} tokens/s")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(results, args.out / "associative_recall.png")
    print(f"plot: {args.out / 'associative_recall.png'}")


if __name__ == "__main__":
    main()

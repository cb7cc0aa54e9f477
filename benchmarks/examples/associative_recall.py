"""Associative recall learned by a two-layer model, with softmax, windowed and linear attention: same code, one plot.

    python -m benchmarks.examples.associative_recall          about two minutes on two CPU cores

A sequence shows `pairs` pairs (key, value), every key once, then asks for the keys again in another order; the model
has to name each one's value. What a key means changes from sequence to sequence, so it must be looked up in context
(Arora et al., "Zoology", 2024). The convolution before the mixer lets a value see the key in front of it. Accuracy is
over the answers of fresh sequences; the tokens per second are of training steps, and the plot shows whatever comes out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xformer_fast

from .common import Run, Tables, curve, main, panels, synchronize

KEYS, VALUES = 32, 32


@dataclass(frozen=True)
class Sizes:
    steps: int = 1000
    pairs: int = 16
    batch: int = 32
    width: int = 64
    num_heads: int = 2


SMOKE = Sizes(steps=20, pairs=4, batch=2, width=16)

MIXERS = {
    "softmax": functools.partial(xformer_fast.attention, causal=True),
    "window of 16": functools.partial(xformer_fast.attention, causal=True, window=(15, 0)),
    "linear (exp)": functools.partial(xformer_fast.linear_attention, feature_map="exp", causal=True),
}


def sequences(sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (batch, 4 * pairs), and targets: the value behind each asked key, -1 elsewhere."""
    batch, pairs = sizes.batch, sizes.pairs
    keys = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = KEYS + torch.randint(VALUES, (batch, pairs), generator=generator)
    order = torch.rand(batch, pairs, generator=generator).argsort(1)
    shown = torch.stack((keys, values), 2).flatten(1)
    asked = torch.stack((keys.gather(1, order), values.gather(1, order)), 2).flatten(1)
    tokens = torch.cat((shown, asked), 1)
    targets = torch.full_like(tokens, -1)
    targets[:, 2 * pairs :: 2] = tokens[:, 2 * pairs + 1 :: 2]
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
    def __init__(self, mixer, width: int, heads: int):
        super().__init__()
        self.embedding = nn.Embedding(KEYS + VALUES, width)
        self.layers = nn.Sequential(*(Layer(width, heads, mixer) for _ in range(2)), nn.LayerNorm(width))
        self.head = nn.Linear(width, KEYS + VALUES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens)))


def train(run: Run, name: str) -> tuple[list[dict], float]:
    """Accuracy over the training, one row every 20 steps, and tokens per second."""
    sizes = run.sizes
    torch.manual_seed(0)
    fresh = torch.Generator().manual_seed(1)
    model = Model(MIXERS[name], sizes.width, sizes.num_heads).to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=sizes.steps)
    checkpoint = run.checkpoint(name, model=model, optimizer=optimizer, schedule=schedule, fresh=fresh)
    saved = checkpoint.load()
    rows, seconds = saved.get("rows", []), saved.get("seconds", 0.0)
    for step in run.steps(saved.get("step", 0), sizes.steps, name):
        tokens, targets = (x.to(run.device) for x in sequences(sizes, fresh))
        start = synchronize(run.device)
        logits = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds += synchronize(run.device) - start
        if step % 20 == 19:  # every step's sequences are new
            asked = targets >= 0
            right = (logits.argmax(-1) == targets)[asked].float().mean().item()
            rows.append({"mixer": name, "step": step + 1, "accuracy": right})
        checkpoint.save(step=step + 1, rows=rows, seconds=seconds)
    return rows, sizes.steps * 4 * sizes.pairs * sizes.batch / seconds


def run(run: Run) -> None:
    results, curves = [], []
    for name in MIXERS:
        rows, speed = train(run, name)
        last = [row["accuracy"] for row in rows[-5:]]
        curves += rows
        results.append({"mixer": name, "accuracy": sum(last) / len(last), "tokens_per_second": speed})
        run.write(curves, "training")
        run.write(results)
        print(f"{name:<14} accuracy {results[-1]['accuracy']:.3f}   {speed:,.0f} tokens/s")


def draw(tables: Tables):
    results = tables[""]
    figure, (left, right) = panels(2)
    for row in results:
        left.plot(*curve(tables["training"], "step", "accuracy", mixer=row["mixer"]), label=row["mixer"])
    left.set(xlabel="training step", ylabel="accuracy of recall", ylim=(0, 1.02))
    left.legend()
    right.barh([row["mixer"] for row in results], [row["tokens_per_second"] / 1e3 for row in results])
    right.set(xlabel="thousand tokens per second, training")
    return figure


if __name__ == "__main__":
    main(run, draw, Sizes(), SMOKE)

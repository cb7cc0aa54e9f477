"""Associative recall learned by a two-layer model, with softmax, windowed and linear attention: same code, one plot.

    python -m benchmarks.examples.associative_recall          about two minutes on two CPU cores

A sequence shows `pairs` pairs (key, value), every key once, then asks for the keys again in another order; the model
has to name each one's value. What a key means changes from sequence to sequence, so it must be looked up in context
(Arora et al., "Zoology", 2024). A convolution before each mixer lets a value see the key in front of it. The three
models see the same batches in turn. Accuracy is over the answers of fresh sequences; the tokens per second are of
training steps (median), and the plot shows whatever comes out.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xformer_fast.layers import Attention, FeedForward, Stack, TransformerLayer

from .common import Run, Tables, curve, main, panels, smoothed, synchronize

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
    "softmax": {},
    "window of 16": {"window": (15, 0)},
    "linear (exp)": {"mixer": "linear", "feature_map": "exp"},
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


class NeighbourAttention(Attention):
    """Attention behind a convolution over each token and the one before it."""

    def __init__(self, dim: int, num_heads: int, **options):
        super().__init__(dim, num_heads, bias=False, **options)
        self.before = nn.Conv1d(dim, dim, 2, groups=dim)

    def forward(self, x: Tensor, **options) -> Tensor:
        return super().forward(x + self.before(F.pad(x.mT, (1, 0))).mT, **options)


class Model(nn.Module):
    def __init__(self, width: int, num_heads: int, **mixer):
        super().__init__()
        self.embed = nn.Embedding(KEYS + VALUES, width)
        self.layers = Stack(
            TransformerLayer(width, NeighbourAttention(width, num_heads, **mixer), FeedForward(width, 2 * width))
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, KEYS + VALUES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(tokens), causal=True)))


def train(run: Run) -> list[dict]:
    """One row a step and mixer: accuracy and seconds."""
    sizes, models, optimizers, schedules, parts = run.sizes, {}, {}, {}, {}
    for name, mixer in MIXERS.items():
        torch.manual_seed(0)
        models[name] = Model(sizes.width, sizes.num_heads, **mixer).to(run.device)
        optimizers[name] = torch.optim.AdamW(models[name].parameters(), 3e-3, weight_decay=0.01)
        schedules[name] = torch.optim.lr_scheduler.OneCycleLR(optimizers[name], 3e-3, total_steps=sizes.steps)
        parts |= {f"model {name}": models[name], f"optimizer {name}": optimizers[name]}
        parts |= {f"schedule {name}": schedules[name]}
    fresh = torch.Generator().manual_seed(1)
    checkpoint = run.checkpoint("recall", fresh=fresh, **parts)
    saved = checkpoint.load()
    rows, order = saved.get("rows", []), list(models)
    for step in run.steps(saved.get("step", 0), sizes.steps, "softmax, window, linear"):
        tokens, targets = (x.to(run.device) for x in sequences(sizes, fresh))
        for name in order[step % len(order) :] + order[: step % len(order)]:
            start = synchronize(run.device)
            logits = models[name](tokens)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            schedules[name].step()
            seconds = synchronize(run.device) - start
            right = (logits.argmax(-1) == targets)[targets >= 0].float().mean().item()  # every step's are new
            rows.append({"mixer": name, "step": step + 1, "accuracy": right, "seconds": seconds})
        checkpoint.save(step=step + 1, rows=rows)
    return rows


def run(run: Run) -> None:
    sizes, rows, results = run.sizes, train(run), []
    run.write(rows, "training")
    for name in MIXERS:
        last = curve(rows, "step", "accuracy", mixer=name)[1][-sizes.steps // 10 :]
        seconds = statistics.median(curve(rows, "step", "seconds", mixer=name)[1])
        speed = 4 * sizes.pairs * sizes.batch / seconds
        results.append({"mixer": name, "accuracy": sum(last) / len(last), "tokens_per_second": speed})
        print(f"{name:<14} accuracy {results[-1]['accuracy']:.3f}   {speed:,.0f} tokens/s")
    run.write(results)


def draw(tables: Tables):
    results = tables[""]
    figure, (left, right) = panels(2)
    for row in results:
        steps, accuracies = curve(tables["training"], "step", "accuracy", mixer=row["mixer"])
        left.plot(steps, smoothed(accuracies, 20), label=row["mixer"])
    left.set(xlabel="training step", ylabel="accuracy of recall (mean of 20 steps)", ylim=(0, 1.02))
    left.legend()
    right.barh([row["mixer"] for row in results], [row["tokens_per_second"] / 1e3 for row in results])
    right.set(xlabel="thousand tokens per second, training")
    return figure


if __name__ == "__main__":
    main(run, draw, Sizes(), SMOKE)

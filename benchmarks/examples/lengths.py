"""Train short, test long: a GPT with sinusoidal, rotary, ALiBi and T5 positions on texts longer than it was trained on.

    python -m benchmarks.examples.lengths          under twenty minutes on two CPU cores

One model a scheme learns Python's source in pieces of `length` bytes. Tested is the loss of the same held-out bytes
each time, given ever more of the text before them: a scheme that extrapolates gets better or stays, one that does not
falls apart. RoPE is also scaled at test time, without further training: positions interpolated (Chen et al., 2023), a
larger base ("NTK-aware", bloc97, 2023), and YaRN (Peng et al., 2023), each by the factor that the longer text asks for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xformer_fast.layers import Positions, RotaryPositions, SinusoidalPositions
from xformer_fast.models import GPT

from . import corpus
from .common import Run, Tables, curve, main, panels, smoothed

SCHEMES = ("sinusoidal", "rope", "alibi", "t5")


@dataclass(frozen=True)
class Sizes:
    steps: int = 300
    batch: int = 16
    length: int = 128
    test_lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    tested: int = 64  # places where the text is cut, each with
    last: int = 64  # so many bytes whose loss counts
    dim: int = 128
    depth: int = 4
    num_heads: int = 4
    lr: float = 2e-3


SMOKE = Sizes(
    steps=2, batch=2, length=16, test_lengths=(8, 16, 40), tested=2, last=4, dim=16, depth=2, num_heads=2
)  # fmt: skip


class ScaledSinusoids(SinusoidalPositions):
    """Beside embeddings times √dim (Vaswani et al., 2017): unscaled ones are lost beside sinusoids of 1."""

    def forward(self, x: Tensor, start: Tensor | int = 0) -> Tensor:
        return super().forward(x * self.dim**0.5, start)


def train(run: Run, scheme: str) -> tuple[GPT, list[dict]]:
    sizes, text = run.sizes, corpus.source()[0]
    torch.manual_seed(0)
    positions = ScaledSinusoids(sizes.dim) if scheme == "sinusoidal" else scheme
    model = GPT(
        256, dim=sizes.dim, depth=sizes.depth, num_heads=sizes.num_heads, max_length=sizes.length, positions=positions
    ).to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), sizes.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, sizes.lr, total_steps=sizes.steps, pct_start=0.1)
    pieces = torch.Generator().manual_seed(1)
    checkpoint = run.checkpoint(scheme, model=model, optimizer=optimizer, schedule=schedule, pieces=pieces)
    saved = checkpoint.load()
    rows = saved.get("rows", [])
    for step in run.steps(saved.get("step", 0), sizes.steps, scheme):
        tokens = corpus.windows(text, sizes.batch, sizes.length + 1, pieces).to(run.device)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        rows.append({"positions": scheme, "step": step + 1, "loss": loss.item()})
        checkpoint.save(step=step + 1, rows=rows)
    checkpoint.every = 0.0
    checkpoint.save(step=sizes.steps, rows=rows)
    return model.eval(), rows


def rope_scalings(sizes: Sizes, length: int) -> dict[str, Positions]:
    """RoPE at a test length: as trained, and scaled so that it turns no further than in training."""
    head_dim, factor = sizes.dim // sizes.num_heads, max(1.0, length / sizes.length)
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": sizes.length}
    return {
        "rope": RotaryPositions(head_dim, length),
        "rope, interpolated": RotaryPositions(head_dim, length, scaling={"rope_type": "linear", "factor": factor}),
        "rope, larger base": RotaryPositions(head_dim, length, base=10000.0 * factor ** (head_dim / (head_dim - 2))),
        "rope, YaRN": RotaryPositions(head_dim, length, scaling=yarn),
    }


@torch.no_grad()
def loss_after(run: Run, model: GPT, length: int) -> float:
    """The mean loss of the last bytes of held-out pieces of this length, which end where those of any length end."""
    sizes, text = run.sizes, corpus.source()[1]
    longest = max(sizes.test_lengths) + 1
    ends = torch.linspace(longest, len(text), sizes.tested).long()
    total = 0.0
    for end in ends.tolist():
        piece = text[end - length - 1 : end].long().to(run.device)
        logits = model(piece[None, :-1])[0, -sizes.last :]
        total += F.cross_entropy(logits, piece[-sizes.last :]).item()
    return total / len(ends)


def run(run: Run) -> None:
    sizes = run.sizes
    results, curves = [], []
    for scheme in SCHEMES:
        model, rows = train(run, scheme)
        curves += rows
        run.write(curves, "training")
        trained = model.positions
        for length in sizes.test_lengths:
            choices = rope_scalings(sizes, length) if scheme == "rope" else {scheme: trained}
            for name, positions in choices.items():
                model.positions = positions.to(run.device)
                loss = loss_after(run, model, length)
                results.append({"positions": name, "length": length, "trained_length": sizes.length, "loss": loss})
        run.write(results)
    for name in dict.fromkeys(row["positions"] for row in results):
        losses = curve(results, "length", "loss", positions=name)[1]
        print(f"{name:<20}" + "".join(f"{loss:>8.3f}" for loss in losses))


def draw(tables: Tables):
    results, training = tables[""], tables["training"]
    figure, (left, right) = panels(2)
    for scheme in SCHEMES:
        steps, losses = curve(training, "step", "loss", positions=scheme)
        left.plot(steps, smoothed(losses, 10), label=scheme)
    trained = results[0]["trained_length"]
    left.set(xlabel="step", ylabel="training loss (nats a byte)", title=f"Trained on {trained:.0f} bytes")
    left.legend()
    for name in dict.fromkeys(row["positions"] for row in results):
        colour = f"C{SCHEMES.index(name.split(',')[0])}"
        dashes = {"interpolated": ":", "larger base": "--", "YaRN": "-."}.get(name.partition(", ")[2], "-")
        points = curve(results, "length", "loss", positions=name)
        right.plot(*points, dashes, marker="o", ms=3, color=colour, label=name)
    right.axvline(trained, color="black", lw=0.8)
    right.set_xscale("log", base=2)
    right.set(xlabel="bytes of text given", ylabel="loss of the same held-out bytes", title="Tested on longer texts")
    right.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    main(run, draw, Sizes(), SMOKE)

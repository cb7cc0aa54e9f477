"""Scaling laws on a laptop: a ladder of small GPTs on Python's source, loss against parameters, data and compute.

    python -m benchmarks.examples.scaling          under twenty minutes on two CPU cores

Every size is trained anew for every amount of data, each with a cosine schedule of its own, in one pass over random
pieces of text. Two fits to the losses on held-out files, both with 90% intervals from resampling the runs:

    power laws  L = a · x^-b  of the largest data in parameters, of the largest model in data, and of the best runs
                for their compute in FLOPs, C = 6 N D  (Kaplan et al., "Scaling Laws for Neural Language Models", 2020)
    one law     L(N, D) = E + A · N^-alpha + B · D^-beta  (Hoffmann et al., "Training Compute-Optimal Large Language
                Models", 2022), Huber loss of log L

N counts the layers' parameters, without embeddings; D counts bytes. Three decades of compute fix no exponent well: the
intervals say how well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xformer_fast.models import GPT

from . import corpus
from .common import Run, Tables, curve, main, panels, synchronize


@dataclass(frozen=True)
class Sizes:
    ladder: tuple[tuple[int, int], ...] = ((32, 2), (48, 2), (64, 3), (80, 4), (96, 4), (128, 5))  # dim, depth
    data: tuple[int, ...] = (350_000, 700_000, 1_400_000)  # bytes
    head_dim: int = 16
    batch: int = 16
    length: int = 256
    lr: float = 3e-3  # of the narrowest model; falls as 1 / sqrt(dim)
    eval_windows: int = 128
    resamples: int = 400
    fit_steps: int = 4000


SMOKE = Sizes(
    ladder=((8, 1), (16, 1), (16, 2)), data=(96, 192, 288), head_dim=8, batch=2, length=24, eval_windows=2,
    resamples=5, fit_steps=5,
)  # fmt: skip


def held_out_loss(model: GPT, windows: Tensor, batch: int) -> float:
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()) * len(part)
            for part in windows.split(batch)
        ]
    return (sum(losses) / len(windows)).item()


def train(run: Run, dim: int, depth: int, data: int, windows: Tensor) -> dict:
    sizes, text = run.sizes, corpus.source()[0]
    steps = data // (sizes.batch * sizes.length)
    torch.manual_seed(0)
    model = GPT(256, dim=dim, depth=depth, num_heads=dim // sizes.head_dim, max_length=sizes.length).to(run.device)
    lr = sizes.lr * math.sqrt(sizes.ladder[0][0] / dim)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    pieces = torch.Generator().manual_seed(1)
    name = f"dim{dim}-depth{depth}-data{data}"
    checkpoint = run.checkpoint(name, model=model, optimizer=optimizer, schedule=schedule, pieces=pieces)
    saved = checkpoint.load()
    seconds = saved.get("seconds", 0.0)
    for step in run.steps(saved.get("step", 0), steps, f"dim {dim}, depth {depth}, {data / 1e6:g} MB"):
        start = synchronize(run.device)
        tokens = corpus.windows(text, sizes.batch, sizes.length + 1, pieces).to(run.device)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += synchronize(run.device) - start
        checkpoint.save(step=step + 1, seconds=seconds)
    parameters = sum(p.numel() for p in model.layers.parameters())
    seen = steps * sizes.batch * sizes.length
    return {
        "dim": dim, "depth": depth, "parameters": parameters, "bytes": seen, "flops": 6 * parameters * seen,
        "held_out_loss": held_out_loss(model, windows, sizes.batch), "seconds": seconds,
    }  # fmt: skip


def interval(values: Tensor) -> tuple[float, float]:
    """The 5% and 95% quantiles."""
    low, high = values.quantile(torch.tensor([0.05, 0.95], dtype=values.dtype)).tolist()
    return low, high


def power_law(x: list[float], loss: list[float], resamples: int) -> dict:
    """a and b of loss = a · x^-b by least squares of the logarithms, b with its interval."""
    x, y = torch.tensor(x, dtype=torch.float64).log(), torch.tensor(loss, dtype=torch.float64).log()
    rows = torch.randint(len(x), (resamples, len(x)), generator=torch.Generator().manual_seed(0))
    rows = torch.cat((torch.arange(len(x))[None], rows))  # the first: every run once
    x, y = x[rows], y[rows]
    centred = x - x.mean(1, keepdim=True)
    spread = centred.square().sum(1)
    slopes = (centred * y).sum(1) / spread
    low, high = interval(-slopes[1:][spread[1:] > 0])
    return {"a": (y[0].mean() - slopes[0] * x[0].mean()).exp().item(), "b": -slopes[0].item(), "low": low, "high": high}


def joint_law(rows: list[dict], resamples: int, steps: int) -> dict[str, tuple[float, float, float]]:
    """E, A, alpha, B, beta: value, 5% and 95% quantile. All resamples are fitted at once by Adam, from four starts."""
    n, d, loss = (
        torch.tensor([row[name] for row in rows], dtype=torch.float64).log()
        for name in ("parameters", "bytes", "held_out_loss")
    )
    picked = torch.randint(len(rows), (resamples, len(rows)), generator=torch.Generator().manual_seed(0))
    weights = torch.nn.functional.one_hot(picked, len(rows)).sum(1).double()
    weights = torch.cat((torch.ones(1, len(rows), dtype=torch.float64), weights))
    starts = torch.tensor([[e, a, alpha, b, beta] for e in (-0.5, 0.0) for a, alpha, b, beta in
                           ((2.0, 0.2, 2.0, 0.2), (4.0, 0.4, 5.0, 0.4))], dtype=torch.float64)  # fmt: skip
    fitted = starts[:, None].repeat(1, len(weights), 1).requires_grad_()
    optimizer = torch.optim.Adam([fitted], 0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        e, a, alpha, b, beta = fitted.unbind(-1)
        terms = (e[..., None].expand(*e.shape, len(n)), a[..., None] - alpha[..., None] * n,
                 b[..., None] - beta[..., None] * d)  # fmt: skip
        predicted = torch.logsumexp(torch.stack(terms), 0)
        errors = F.huber_loss(predicted, loss.expand_as(predicted), delta=1e-3, reduction="none")
        objective = (errors * weights).sum(-1)
        optimizer.zero_grad()
        objective.sum().backward()
        optimizer.step()
        schedule.step()
    best = fitted.detach()[objective.detach().argmin(0), torch.arange(len(weights))]
    best = torch.cat((best[:, :2].exp(), best[:, 2:3], best[:, 3:4].exp(), best[:, 4:]), 1)
    return {
        name: (best[0, i].item(), *interval(best[1:, i])) for i, name in enumerate(("E", "A", "alpha", "B", "beta"))
    }


def frontier(rows: list[dict]) -> list[dict]:
    """The runs that no run of less compute beats."""
    best, kept = math.inf, []
    for row in sorted(rows, key=lambda row: row["flops"]):
        if row["held_out_loss"] < best:
            best = row["held_out_loss"]
            kept.append(row)
    return kept


def fits(sizes: Sizes, rows: list[dict]) -> list[dict]:
    most, widest = max(row["bytes"] for row in rows), max(row["parameters"] for row in rows)
    of = {
        "parameters": [row for row in rows if row["bytes"] == most],
        "bytes": [row for row in rows if row["parameters"] == widest],
        "flops": frontier(rows),
    }
    results = []
    for x, chosen in of.items():
        law = power_law([row[x] for row in chosen], [row["held_out_loss"] for row in chosen], sizes.resamples)
        results.append({"law": "power", "name": x, "value": law["b"], "low": law["low"], "high": law["high"]})
        results[-1] |= {"factor": law["a"], "runs": len(chosen)}
    for name, (value, low, high) in joint_law(rows, sizes.resamples, sizes.fit_steps).items():
        results.append({"law": "joint", "name": name, "value": value, "low": low, "high": high, "runs": len(rows)})
    return results


def run(run: Run) -> None:
    sizes = run.sizes
    windows = corpus.windows(
        corpus.source()[1], sizes.eval_windows, sizes.length + 1, torch.Generator().manual_seed(2)
    ).to(run.device)
    finished = run.checkpoint("finished")
    finished.every = 0.0
    rows = finished.load().get("rows", [])
    for data in sizes.data:
        for dim, depth in sizes.ladder:
            wanted = data // (sizes.batch * sizes.length) * sizes.batch * sizes.length
            if any((row["dim"], row["depth"], row["bytes"]) == (dim, depth, wanted) for row in rows):
                continue
            rows.append(train(run, dim, depth, data, windows))
            finished.save(rows=rows)
            run.write(rows, "runs")
    run.write(rows, "runs")
    results = fits(sizes, rows)
    run.write(results)
    for row in results:
        print(f"{row['law']:<6} {row['name']:<11} {row['value']:.3g}   90%: {row['low']:.3g} to {row['high']:.3g}")


def draw(tables: Tables):
    rows = tables["runs"]
    laws = {row["name"]: row for row in tables[""] if row["law"] == "power"}
    joint = {row["name"]: row for row in tables[""] if row["law"] == "joint"}
    figure, axes = panels(3)
    amounts = sorted({row["bytes"] for row in rows})
    models = sorted({row["parameters"] for row in rows})
    for i, amount in enumerate(amounts):
        axes[0].plot(*curve(rows, "parameters", "held_out_loss", bytes=amount), "o-", color=f"C{i}", ms=4,
                     label=f"{amount / 1e6:.2g} MB")  # fmt: skip
    for i, parameters in enumerate(models):
        shade = 0.25 + 0.75 * i / max(1, len(models) - 1)
        points = [curve(rows, x, "held_out_loss", parameters=parameters) for x in ("bytes", "flops")]
        axes[1].plot(*points[0], "o-", color="C0", alpha=shade, ms=4, label=f"{parameters / 1e3:.0f}k parameters")
        axes[2].plot(*points[1], "o-", color="C0", alpha=shade, ms=4)
    for axis, x, label in zip(axes, ("parameters", "bytes", "flops"), ("N", "D", "C"), strict=True):
        law, values = laws[x], [row[x] for row in rows]
        line = [min(values) * (max(values) / min(values)) ** (i / 50) for i in range(51)]
        exponent = f"{law['value']:.3f} ({law['low']:.3f} to {law['high']:.3f})"
        axis.plot(line, [law["factor"] * v ** -law["value"] for v in line], "k--", lw=1)
        axis.set(xscale="log", yscale="log", title=f"L ∝ {label}^−b, b = {exponent}")
        axis.title.set_fontsize(9)
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(lambda value, _: f"{value:.3g}")
    axes[0].set(xlabel="N, parameters without embeddings", ylabel="held-out loss (nats a byte)")
    axes[1].set_xlabel("D, bytes seen")
    axes[2].set_xlabel("C = 6 N D, FLOPs")
    axes[0].legend(fontsize=7)
    axes[1].legend(fontsize=6)
    text = ", ".join(
        f"{name} {row['value']:.2g} ({row['low']:.2g} to {row['high']:.2g})" for name, row in joint.items()
    )
    figure.suptitle(f"L(N, D) = E + A N^−alpha + B D^−beta:  {text}", fontsize=9)
    return figure


if __name__ == "__main__":
    main(run, draw, Sizes(), SMOKE)

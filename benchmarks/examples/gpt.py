"""A small GPT learns Python from the standard library's source, with naive and with fused attention.

    python -m benchmarks.examples.gpt          under ten minutes on two CPU cores

Copies of one model see the same batches in turn. They differ in attention alone: the naive formula, with every score
in memory; the fused op; and the naive formula again with queries, keys and channels in other orders, which changes
nothing but the order of its sums, forward and backward. How far the naive curves come apart is what rounding does to a
loss curve: the fused curve has to stay as near to the first.

Speed: a step's time with naive and with fused attention, and what Amdahl's law allows: the naive step less what the op
alone, forward and backward at these shapes, is faster by, once a layer.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xformer_fast
from xformer_fast.mixers import SoftmaxMixer
from xformer_fast.models import GPT

from .. import measure
from . import corpus
from .common import Run, Tables, curve, main, panels, smoothed, synchronize


@dataclass(frozen=True)
class Sizes:
    steps: int = 150
    batch: int = 3
    length: int = 512
    dim: int = 128
    depth: int = 4
    num_heads: int = 4
    lr: float = 2e-3
    seconds: float = 20.0  # for timing the op alone


SMOKE = Sizes(steps=3, batch=2, length=24, dim=16, depth=2, num_heads=2, seconds=0.0)


class Naive(nn.Module):
    """softmax(Q Kᵀ / √D, causal) V, every score in memory; tokens and channels in one of many orders, 0 their own."""

    def __init__(self, order: int = 0):
        super().__init__()
        self.order = order

    def arrange(self, x: Tensor, *dims: int, back: bool = False) -> Tensor:
        for dim in dims if self.order else ():
            places = torch.randperm(x.shape[dim], generator=torch.Generator().manual_seed(self.order))
            x = x.index_select(dim, (places.argsort() if back else places).to(x.device))
        return x

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
        query, key, value = (self.arrange(x.transpose(1, 2), 2, 3) for x in (query, key, value))
        queries, keys = (self.arrange(torch.arange(x.shape[2], device=x.device), 0) for x in (query, key))
        scores = query @ key.mT * query.shape[-1] ** -0.5
        weights = scores.masked_fill(keys > queries[:, None], float("-inf")).softmax(-1)
        return self.arrange(weights @ value, 2, 3, back=True).transpose(1, 2)


ORDERS = 8  # curves part along few directions, by amounts as chance has it: a handful of orders would miss its width


def variants(sizes: Sizes) -> dict[str, nn.Module]:
    mixers = {"naive": Naive(), "fused": SoftmaxMixer(sizes.num_heads, sizes.dim // sizes.num_heads)}
    return mixers | {f"naive, order {order}": Naive(order) for order in range(1, ORDERS + 1)}


def train(run: Run) -> list[dict]:
    """One row a step and attention: loss and seconds."""
    sizes, text = run.sizes, corpus.source()[0]
    models, optimizers, schedules, parts = {}, {}, {}, {}
    for name, mixer in variants(sizes).items():
        torch.manual_seed(0)
        model = GPT(
            256, dim=sizes.dim, depth=sizes.depth, num_heads=sizes.num_heads, max_length=sizes.length, mixer=mixer
        ).to(run.device)
        optimizer = torch.optim.AdamW(model.parameters(), sizes.lr, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, sizes.lr, total_steps=sizes.steps, pct_start=0.1)
        models[name], optimizers[name], schedules[name] = model, optimizer, schedule
        parts |= {f"model {name}": model, f"optimizer {name}": optimizer, f"schedule {name}": schedule}
    batches = torch.Generator().manual_seed(1)
    checkpoint = run.checkpoint("gpt", batches=batches, **parts)
    saved = checkpoint.load()
    rows, order = saved.get("rows", []), list(models)
    for step in run.steps(saved.get("step", 0), sizes.steps, "naive and fused GPT"):
        tokens = corpus.windows(text, sizes.batch, sizes.length + 1, batches).to(run.device)
        for name in order[step % len(order) :] + order[: step % len(order)]:
            start = synchronize(run.device)
            logits = models[name](tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizers[name].zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
            optimizers[name].step()
            seconds = synchronize(run.device) - start
            schedules[name].step()
            rows.append({"step": step + 1, "attention": name, "loss": loss.item(), "seconds": seconds})
        checkpoint.save(step=step + 1, rows=rows)
    return rows


def op_seconds(run: Run) -> dict[str, float]:
    """Forward and backward of one layer's attention alone."""
    sizes = run.sizes
    shape = (sizes.batch, sizes.length, sizes.num_heads, sizes.dim // sizes.num_heads)
    inputs = [torch.randn(shape, device=run.device, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(shape, device=run.device)
    mixers = {name: mixer for name, mixer in variants(sizes).items() if name in ("naive", "fused")}

    def step(mixer):
        torch.autograd.grad(mixer(*inputs, causal=True), inputs, upstream)

    calls = {name: lambda mixer=mixer: step(mixer) for name, mixer in mixers.items()}
    nothing = dict.fromkeys(calls, torch.enable_grad)
    timings = measure.interleaved(calls, nothing, device=run.device.type, seconds=sizes.seconds, grad=True)
    return {name: timing.median_ms / 1e3 for name, timing in timings.items()}


def backend(run: Run) -> str:
    """What the fused model's attention runs on."""
    sizes = run.sizes
    shape = (sizes.batch, sizes.num_heads, sizes.length, sizes.dim // sizes.num_heads)
    inputs = [torch.empty(shape, device=run.device) for _ in range(3)]
    return xformer_fast.explain("attention", *inputs, causal=True).split()[1]


def summary(sizes: Sizes, rows: list[dict], op: dict[str, float]) -> list[dict]:
    loss = {name: torch.tensor(curve(rows, "step", "loss", attention=name)[1]) for name in variants(sizes)}
    warm = [row for row in rows if row["step"] > 2] or rows
    step = {name: statistics.median(curve(warm, "step", "seconds", attention=name)[1]) for name in ("naive", "fused")}
    gain = sizes.depth * (op["naive"] - op["fused"])
    allowed = step["naive"] - gain
    results = []
    for name, losses in loss.items():
        row = {"attention": name, "max_difference_to_naive": (losses - loss["naive"]).abs().max().item()}
        row |= {"final_loss": losses[-max(1, sizes.steps // 20) :].mean().item(), "step_seconds": "", "op_seconds": ""}
        if name in step:
            tokens = sizes.batch * sizes.length
            row |= {"step_seconds": step[name], "op_seconds": op[name], "tokens_per_second": tokens / step[name]}
        results.append(row)
    naive = [losses for name, losses in loss.items() if name != "fused"]
    noise = max((a - b).abs().max().item() for a, b in itertools.combinations(naive, 2))
    fused = next(row for row in results if row["attention"] == "fused")
    fused |= {
        "noise_of_naive": noise,
        "within_noise": fused["max_difference_to_naive"] <= noise,
        "speedup": step["naive"] / step["fused"],
        "speedup_amdahl_allows": step["naive"] / allowed,
        "amdahl_step_seconds": allowed,
        "share_of_allowed_speedup": (step["naive"] / step["fused"]) / (step["naive"] / allowed),
        "share_of_allowed_gain": (step["naive"] - step["fused"]) / gain,
    }
    return results


def run(run: Run) -> None:
    rows = train(run)
    run.write(rows, "steps")
    results = summary(run.sizes, rows, op_seconds(run))
    fused = next(row for row in results if row["attention"] == "fused")
    fused["backend"] = backend(run)
    run.write(results)
    print(
        f"backend {fused['backend']}: loss curves differ by at most {fused['max_difference_to_naive']:.2e}, "
        f"naive's from itself by {fused['noise_of_naive']:.2e}; step {fused['speedup']:.2f}x as fast, Amdahl allows "
        f"{fused['speedup_amdahl_allows']:.2f}x: {100 * fused['share_of_allowed_gain']:.0f}% of the gain"
    )


def draw(tables: Tables):
    rows, results = tables["steps"], {row["attention"]: row for row in tables[""]}
    figure, (losses, differences, seconds) = panels(3)
    naive = curve(rows, "step", "loss", attention="naive")[1]
    fused = results["fused"]
    for name, style, label in (("naive", "-", "naive"), ("fused", "--", f"fused (backend {fused['backend']})")):
        steps, values = curve(rows, "step", "loss", attention=name)
        losses.plot(steps, values, style, label=label)
    losses.set(xlabel="step", ylabel="training loss (nats a byte)", title="A small GPT on Python's source")
    losses.legend()
    for name in results:
        if name != "naive":
            steps, values = curve(rows, "step", "loss", attention=name)
            apart = [max(abs(a - b), 1e-8) for a, b in zip(values, naive, strict=True)]
            style = {"color": "C1", "zorder": 3} if name == "fused" else {"color": "C7", "alpha": 0.8}
            label = {"fused": "fused", "naive, order 1": "naive, other orders of its sums"}.get(name)
            differences.plot(steps, smoothed(apart, 5), label=label, **style)
    differences.set(yscale="log", xlabel="step", ylabel="|loss − naive's| (mean of 5 steps)")
    differences.set_title("Rounding alone, and the fused op")
    differences.legend(fontsize=8)
    bars = {
        "naive": results["naive"]["step_seconds"],
        "fused": fused["step_seconds"],
        "Amdahl's limit": fused["amdahl_step_seconds"],
    }
    seconds.barh(list(bars), [1e3 * value for value in bars.values()], color=["C0", "C1", "C7"])
    seconds.invert_yaxis()
    seconds.set_xlabel("ms a training step (median)")
    seconds.set_title(f"{fused['speedup']:.2f}×, {100 * fused['share_of_allowed_gain']:.0f}% of the gain allowed")
    return figure


if __name__ == "__main__":
    main(run, draw, Sizes(), SMOKE)

"""In-context learning: zero-, one- and few-shot accuracy of a ladder of small GPTs on rules they were never trained on.

    python -m benchmarks.examples.in_context          under ten minutes on two CPU cores

A sequence shows things, and a label behind each. Its rule, a label for every thing, holds for this sequence alone; a
quarter of the 4^8 rules is kept from training. One label in five is drawn at random instead. What a thing's label is
can only be told from the times that it was shown before, its shots: with none by luck, with one mostly, and with a few
by what most of them say. How often that can be right at best follows from Bayes' rule. The weights never change: all is
learned from the context. A short convolution tells every token its neighbour, as in `associative_recall`: without it, a
model of 32 channels and two layers had not got past the frequencies of labels after 500 steps.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xformer_fast.layers import RotaryPositions, init_weights
from xformer_fast.models import GPT

from .common import Run, Tables, curve, main, panels

THINGS, LABELS, NOISE, HEAD_DIM = 8, 4, 0.2, 8
RULES = LABELS**THINGS


@dataclass(frozen=True)
class Sizes:
    ladder: tuple[tuple[int, int], ...] = ((8, 1), (16, 1), (16, 2), (32, 2), (64, 2))  # dim, depth
    shown: int = 40  # things of a sequence
    most_shots: int = 6
    steps: int = 600
    batch: int = 48
    lr: float = 5e-3
    tested: int = 2000  # sequences


SMOKE = Sizes(ladder=((8, 1), (8, 2)), shown=12, most_shots=1, steps=3, batch=4, tested=20)


def split_rules() -> tuple[Tensor, Tensor]:
    """The rules to train on, and the quarter that is held out."""
    rules = torch.randperm(RULES, generator=torch.Generator().manual_seed(3))
    return rules[RULES // 4 :], rules[: RULES // 4]


def sequences(rules: Tensor, shown: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random things (B, shown), and their labels (B, shown) under these rules (B,), some of them replaced."""
    things = torch.randint(THINGS, (len(rules), shown), generator=generator)
    labels = rules[:, None] // LABELS**things % LABELS
    other = torch.randint(LABELS, labels.shape, generator=generator)
    return things, torch.where(torch.rand(labels.shape, generator=generator) < NOISE, other, labels)


def tokens_of(things: Tensor, labels: Tensor) -> Tensor:
    """(B, 2 · shown): a thing, then its label."""
    return torch.stack((things, THINGS + labels), 2).flatten(1)


def best_guesses(things: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each label (B, shown): its shots, and the chance that the best guess is right.

    Labels are as likely as each other at first, and a shown one is the true one more often than any other: the best
    guess is the label that the thing was shown with most often before, one of these where there are several.
    """
    shots, chances = [], []
    for i in range(things.shape[1]):
        same = things[:, :i] == things[:, i, None]
        counts = (F.one_hot(labels[:, :i], LABELS) * same[..., None]).sum(1)
        best = counts == counts.max(1, keepdim=True).values
        shots.append(same.sum(1))
        chances.append(best.gather(1, labels[:, i, None])[:, 0] / best.sum(1))
    return torch.stack(shots, 1), torch.stack(chances, 1)


class Neighbours(RotaryPositions):
    """RoPE, and a convolution over each token and the one before it."""

    def __init__(self, dim: int, head_dim: int, max_length: int):
        super().__init__(head_dim, max_length)
        self.before = nn.Conv1d(dim, dim, 2, groups=dim)

    def forward(self, x: Tensor, start: Tensor | int = 0) -> Tensor:
        return x + self.before(F.pad(x.mT, (1, 0))).mT


def answers(model: GPT, tokens: Tensor) -> Tensor:
    """Logits (B, shown, THINGS + LABELS) where a label comes next."""
    return model(tokens)[:, ::2]


def train(run: Run, dim: int, depth: int) -> tuple[GPT, list[dict]]:
    sizes = run.sizes
    torch.manual_seed(0)
    positions = Neighbours(dim, HEAD_DIM, 2 * sizes.shown)
    model = GPT(THINGS + LABELS, dim=dim, depth=depth, num_heads=dim // HEAD_DIM, positions=positions).to(run.device)
    model.apply(functools.partial(init_weights, std=dim**-0.5))
    optimizer = torch.optim.AdamW(model.parameters(), sizes.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, sizes.lr, total_steps=sizes.steps, pct_start=0.1)
    fresh = torch.Generator().manual_seed(1)
    name = f"dim{dim}-depth{depth}"
    checkpoint = run.checkpoint(name, model=model, optimizer=optimizer, schedule=schedule, fresh=fresh)
    saved = checkpoint.load()
    rows = saved.get("rows", [])
    known = split_rules()[0]
    for step in run.steps(saved.get("step", 0), sizes.steps, f"dim {dim}, depth {depth}"):
        rules = known[torch.randint(len(known), (sizes.batch,), generator=fresh)]
        things, labels = sequences(rules, sizes.shown, fresh)
        tokens, targets = tokens_of(things, labels).to(run.device), (THINGS + labels).to(run.device)
        loss = F.cross_entropy(answers(model, tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        rows.append({"dim": dim, "depth": depth, "step": step + 1, "loss": loss.item()})
        checkpoint.save(step=step + 1, rows=rows)
    checkpoint.every = 0.0
    checkpoint.save(step=sizes.steps, rows=rows)
    return model.eval(), rows


@torch.no_grad()
def right_answers(run: Run, model: GPT, tokens: Tensor, labels: Tensor) -> Tensor:
    """(B, shown), 1 where the model's likeliest label is the one shown."""
    parts = zip(tokens.split(256), labels.split(256), strict=True)
    return torch.cat(
        [answers(model, part.to(run.device)).argmax(-1).cpu() == THINGS + wanted for part, wanted in parts]
    )


def run(run: Run) -> None:
    sizes, unseen = run.sizes, torch.Generator().manual_seed(2)
    held_out = split_rules()[1]
    rules = held_out[torch.randint(len(held_out), (sizes.tested,), generator=unseen)]
    things, labels = sequences(rules, sizes.shown, unseen)
    shots, chances = best_guesses(things, labels)

    def by_shots(name: str, right: Tensor, **about) -> list[dict]:
        return [
            {"model": name, "shots": n, "accuracy": right[shots == n].float().mean().item()} | about
            for n in range(sizes.most_shots + 1)
        ]

    results, curves = by_shots("at best", chances), []
    for dim, depth in sizes.ladder:
        model, rows = train(run, dim, depth)
        curves += rows
        run.write(curves, "training")
        parameters = sum(p.numel() for p in model.layers.parameters())
        right = right_answers(run, model, tokens_of(things, labels), labels)
        results += by_shots(f"dim {dim}, depth {depth}", right, parameters=parameters)
        run.write(results)
    for name in dict.fromkeys(row["model"] for row in results):
        values = curve(results, "shots", "accuracy", model=name)[1]
        print(f"{name:<18}" + "".join(f"{n:>5}-shot {value:.3f}" for n, value in enumerate(values)))


def draw(tables: Tables):
    results, training = tables[""], tables["training"]
    figure, (left, right) = panels(2)
    for name in dict.fromkeys(row["model"] for row in results):
        style = {"color": "black", "ls": "--"} if name == "at best" else {"marker": "o", "ms": 3}
        left.plot(*curve(results, "shots", "accuracy", model=name), label=name, **style)
    left.axhline(1 / LABELS, color="0.6", lw=0.8)
    left.set(
        xlabel="times the thing was shown before", ylabel="accuracy", ylim=(0, 1), title="Rules kept from training"
    )
    left.legend(fontsize=8, loc="lower right")
    for dim, depth in dict.fromkeys((row["dim"], row["depth"]) for row in training):
        name = f"dim {dim:.0f}, depth {depth:.0f}"
        right.plot(*curve(training, "step", "loss", dim=dim, depth=depth), lw=0.8, label=name)
    right.set(xlabel="step", ylabel="training loss of a label (nats)")
    right.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main(run, draw, Sizes(), SMOKE)

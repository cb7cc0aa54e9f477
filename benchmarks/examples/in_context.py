"""In-context learning: zero-, one- and few-shot accuracy of a ladder of small GPTs on rules they were never trained on.

    python -m benchmarks.examples.in_context          under ten minutes on two CPU cores

A sequence shows things with three attributes of four values each, and a label behind each thing. The labels follow a
rule that holds for this sequence alone: one attribute counts, and a table gives a label to each of its values. There
are 3 · 4^4 rules; a quarter of them is kept from training. A label can be told from the things before it: with none of
them by luck, with a few of them often, and how often at best follows from Bayes' rule, every rule being as likely as
any other. The weights never change: all is learned from the context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xformer_fast.models import GPT

from .common import Run, Tables, curve, main, panels

ATTRIBUTES, VALUES, LABELS = 3, 4, 4
RULES = ATTRIBUTES * LABELS**VALUES
VOCABULARY = ATTRIBUTES * VALUES + LABELS


@dataclass(frozen=True)
class Sizes:
    ladder: tuple[tuple[int, int], ...] = ((16, 2), (32, 2), (64, 2), (64, 4))  # dim, depth
    things: int = 17  # of a sequence: 16 shots at most
    steps: int = 1500
    batch: int = 64
    lr: float = 3e-3
    tested: int = 2000  # sequences


SMOKE = Sizes(ladder=((16, 1), (16, 2)), things=4, steps=3, batch=4, tested=20)


def split_rules() -> tuple[Tensor, Tensor]:
    """The rules to train on, and the quarter that is held out."""
    rules = torch.randperm(RULES, generator=torch.Generator().manual_seed(3))
    return rules[RULES // 4 :], rules[: RULES // 4]


def sequences(rules: Tensor, things: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Attributes (B, things, ATTRIBUTES) and labels (B, things) of random things under these rules (B,)."""
    attributes = torch.randint(VALUES, (len(rules), things, ATTRIBUTES), generator=generator)
    counts = rules % ATTRIBUTES
    table = rules[:, None] // ATTRIBUTES // LABELS ** torch.arange(VALUES) % LABELS
    value = attributes.gather(2, counts[:, None, None].expand(-1, things, 1))[..., 0]
    return attributes, table.gather(1, value)


def tokens_of(attributes: Tensor, labels: Tensor) -> Tensor:
    """(B, things · (ATTRIBUTES + 1)): the attributes of a thing, then its label."""
    named = attributes + VALUES * torch.arange(ATTRIBUTES)
    return torch.cat((named, ATTRIBUTES * VALUES + labels[..., None]), 2).flatten(1)


def bayes(attributes: Tensor, labels: Tensor) -> Tensor:
    """The chance (B, things) that the best guess of each label, from the things before it, is right."""
    chances = []
    for shots in range(labels.shape[1]):
        answer = torch.zeros(len(labels), LABELS, dtype=torch.float64)
        for attribute in range(ATTRIBUTES):
            # Under "this attribute counts": which labels each value was seen with.
            seen = torch.zeros(len(labels), VALUES, LABELS, dtype=torch.float64)
            values = attributes[:, :shots, attribute]
            rows = torch.arange(len(labels))[:, None]
            seen[rows, values, labels[:, :shots]] = 1
            possible = (seen.sum(2) <= 1).all(1)
            weight = possible * (1.0 / LABELS) ** seen.sum((1, 2))
            of_value = seen[rows[:, 0], attributes[:, shots, attribute]]
            guess = torch.where(of_value.sum(1, keepdim=True) > 0, of_value, 1.0 / LABELS)
            answer += weight[:, None] * guess
        best = answer == answer.max(1, keepdim=True).values
        right = best.gather(1, labels[:, shots, None])[:, 0]
        chances.append(right / best.sum(1))
    return torch.stack(chances, 1)


def answers(model: GPT, tokens: Tensor) -> Tensor:
    """Logits (B, things, VOCABULARY) where a label comes next."""
    return model(tokens)[:, ATTRIBUTES - 1 :: ATTRIBUTES + 1]


def train(run: Run, dim: int, depth: int) -> tuple[GPT, list[dict]]:
    sizes = run.sizes
    torch.manual_seed(0)
    model = GPT(VOCABULARY, dim=dim, depth=depth, num_heads=dim // 16, positions="rope",
                max_length=sizes.things * (ATTRIBUTES + 1)).to(run.device)  # fmt: skip
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
        attributes, labels = sequences(rules, sizes.things, fresh)
        tokens, targets = tokens_of(attributes, labels).to(run.device), (ATTRIBUTES * VALUES + labels).to(run.device)
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
def accuracy(run: Run, model: GPT, tokens: Tensor, labels: Tensor) -> list[float]:
    """By the number of shots."""
    right = [
        answers(model, part.to(run.device)).argmax(-1).cpu() == ATTRIBUTES * VALUES + wanted
        for part, wanted in zip(tokens.split(256), labels.split(256), strict=True)
    ]
    return torch.cat(right).float().mean(0).tolist()


def run(run: Run) -> None:
    sizes, unseen = run.sizes, torch.Generator().manual_seed(2)
    held_out = split_rules()[1]
    rules = held_out[torch.randint(len(held_out), (sizes.tested,), generator=unseen)]
    attributes, labels = sequences(rules, sizes.things, unseen)
    tokens = tokens_of(attributes, labels)
    best = bayes(attributes, labels).mean(0).tolist()
    results = [{"model": "Bayes", "shots": shots, "accuracy": value} for shots, value in enumerate(best)]
    curves = []
    for dim, depth in sizes.ladder:
        model, rows = train(run, dim, depth)
        parameters = sum(p.numel() for p in model.layers.parameters())
        curves += rows
        run.write(curves, "training")
        got = accuracy(run, model, tokens, labels)
        results += [
            {"model": f"dim {dim}, depth {depth}", "parameters": parameters, "shots": shots, "accuracy": value}
            for shots, value in enumerate(got)
        ]
        run.write(results)
    for name in dict.fromkeys(row["model"] for row in results):
        values = curve(results, "shots", "accuracy", model=name)[1]
        few = [0, 1, min(4, len(values) - 1), len(values) - 1]
        print(f"{name:<18}" + "".join(f"{shots:>4}-shot {values[shots]:.3f}" for shots in few))


def draw(tables: Tables):
    results, training = tables[""], tables["training"]
    figure, (left, right) = panels(2)
    for name in dict.fromkeys(row["model"] for row in results):
        style = {"color": "black", "ls": "--"} if name == "Bayes" else {"marker": "o", "ms": 3}
        left.plot(*curve(results, "shots", "accuracy", model=name), label=name, **style)
    left.axhline(1 / LABELS, color="0.6", lw=0.8)
    left.set(xlabel="shots", ylabel="accuracy", ylim=(0, 1.02), title="Rules kept from training")
    left.legend(fontsize=8)
    for dim, depth in dict.fromkeys((row["dim"], row["depth"]) for row in training):
        name = f"dim {dim:.0f}, depth {depth:.0f}"
        right.plot(*curve(training, "step", "loss", dim=dim, depth=depth), lw=0.8, label=name)
    right.set(xlabel="step", ylabel="training loss of a label (nats)")
    right.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main(run, draw, Sizes(), SMOKE)

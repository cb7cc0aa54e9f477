"""Parameter-efficient tuning against full fine-tuning: trainable share, step time, peak memory, quality, in one table.

    python -m benchmarks.examples.tuning          under ten minutes on two CPU cores

Two tasks. "functions": the pretrained sentence encoder of `sentence_encoder`, its weights in this package's BERT,
learns to find functions by their descriptions; quality is recall at 10. "digits": this package's ViT, trained on the
digits 0 to 4, learns 5 to 9 with a new head; quality is accuracy on test images. Every method of a task gets the same
batches and steps. Learning rates are usual ones, not searched for. Memory is what training adds to the weights at its
peak: activations, gradients, and what AdamW keeps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xformer_fast.models import BERT, ViT
from xformer_fast.tuning import add_adapters, add_lora, add_prefixes, add_prompts, freeze, trainable_share

from .. import measure
from . import corpus, digits
from .common import Run, Tables, main, panels, synchronize
from .sentence_encoder import contrast, load_encoder, pooled, ranks, recalls

METHODS: dict[str, tuple[Callable[[nn.Module], None], float]] = {  # what is added, and its learning rate
    "LoRA": (lambda model: add_lora(model, rank=8), 1e-3),
    "adapters": (lambda model: add_adapters(model, width=32), 1e-3),
    "parallel adapters": (lambda model: add_adapters(model, width=32, parallel=True), 1e-3),
    "prefixes": (lambda model: add_prefixes(model, 8, std=0.1), 1e-2),
    "prompts": (lambda model: add_prompts(model, 8), 1e-2),
    "deep prompts": (lambda model: add_prompts(model, 8, deep=True), 1e-2),
}
FULL_LR = 1e-4


@dataclass(frozen=True)
class Sizes:
    steps: int = 30
    batch: int = 24
    longest: int = 48
    temperature: float = 0.05
    tested: int = 600
    digit_steps: int = 100
    first_steps: int = 200
    vit: tuple[int, int, int] = (64, 4, 4)  # dim, depth, heads
    images: int | None = None


SMOKE = Sizes(steps=1, batch=2, longest=8, tested=4, digit_steps=1, first_steps=1, vit=(16, 1, 2), images=60)


@dataclass
class Task:
    """A pretrained model, the loss of a batch drawn by a generator, and how good the model is."""

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, torch.Generator], Tensor]
    quality: Callable[[nn.Module], float]
    steps: int
    kept: tuple[str, ...] = ()  # what learns with every method: a new head


def functions(run: Run) -> Task:
    import transformers

    sizes, (encoder, tokenizer) = run.sizes, load_encoder()
    host = transformers.BertForPreTraining(encoder.config)
    host.bert = encoder
    host.cls.predictions.decoder.weight = encoder.embeddings.word_embeddings.weight
    learned = [pair for pair in corpus.pairs() if not pair.held_out]
    tested = [pair for pair in corpus.pairs() if pair.held_out][: sizes.tested]

    def encoded(model: BERT) -> Callable[[list[str]], Tensor]:
        def encode(texts: list[str]) -> Tensor:
            inputs = tokenizer(texts, padding=True, truncation=True, max_length=sizes.longest, return_tensors="pt")
            tokens, mask = (inputs[name].to(run.device) for name in ("input_ids", "attention_mask"))
            return pooled(model.encode(tokens, lengths=mask.sum(1)), mask)

        return encode

    def loss(model, generator):
        picked = torch.randint(len(learned), (sizes.batch,), generator=generator)
        return contrast(encoded(model), [learned[i] for i in picked.tolist()], sizes.temperature)

    def quality(model):
        return recalls(ranks(encoded(model), tested, 2 * sizes.batch))["recall_at_10"]

    def model() -> BERT:
        model = BERT.from_transformers(host)
        for unused in (model.token_transform, model.token_norm, model.pooler, model.sentence_head):
            unused.requires_grad_(False)
        return model.to(run.device)

    return Task("functions", model, loss, quality, sizes.steps)


def new_digits(run: Run) -> Task:
    sizes, (images, labels) = run.sizes, digits.digits()
    images, labels = images[: sizes.images], labels[: sizes.images]
    tested, high = torch.arange(len(images)) % 5 == 0, labels >= 5
    dim, depth, heads = sizes.vit

    def fresh() -> ViT:
        torch.manual_seed(0)
        return ViT(5, image_size=digits.SIDE, patch=4, channels=1, dim=dim, depth=depth, num_heads=heads)

    def loss_of(chosen: Tensor, first: int) -> Callable[[nn.Module, torch.Generator], Tensor]:
        where = chosen.nonzero()[:, 0]

        def loss(model, generator):
            picked = where[torch.randint(len(where), (64,), generator=generator)]
            batch = digits.moved(images[picked], generator).to(run.device)
            return F.cross_entropy(model(batch), (labels[picked] - first).to(run.device))

        return loss

    pretrained = fresh().to(run.device)
    optimizer = torch.optim.AdamW(pretrained.parameters(), 1e-3, weight_decay=0.05)
    draws, loss = torch.Generator().manual_seed(1), loss_of(~tested & ~high, 0)
    for _ in run.steps(0, sizes.first_steps, "ViT on 0 to 4"):
        optimizer.zero_grad()
        loss(pretrained, draws).backward()
        optimizer.step()
    state = {name: x for name, x in pretrained.state_dict().items() if not name.startswith("head.")}

    def model() -> ViT:
        model = fresh()
        model.load_state_dict(state, strict=False)
        return model.to(run.device)

    def quality(model):
        return digits.accuracy(run, model, images[tested & high], labels[tested & high] - 5)

    return Task("digits", model, loss_of(~tested & high, 5), quality, sizes.digit_steps, kept=("head",))


def tune(run: Run, task: Task, method: str) -> dict:
    """A row of the table."""
    torch.manual_seed(0)
    model = task.model()
    lr = FULL_LR
    if method != "full":
        freeze(model, but=task.kept)
        if method in METHODS:
            add, lr = METHODS[method]
            add(model)
        else:
            lr = 1e-3
    learning = [p for p in model.parameters() if p.requires_grad]
    row = {"task": task.name, "tuning": method, "trainable_share": trainable_share(model), "lr": lr}
    if not learning:
        return row | {"quality": task.quality(model)}
    optimizer = torch.optim.AdamW(learning, lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=task.steps, pct_start=0.1)
    draws, seconds = torch.Generator().manual_seed(1), []

    def step():
        optimizer.zero_grad()
        task.loss(model, draws).backward()
        optimizer.step()

    for _ in run.steps(0, task.steps, f"{task.name}, {method}"):
        start = synchronize(run.device)
        step()
        seconds.append(synchronize(run.device) - start)
        schedule.step()
    quality = task.quality(model)
    optimizer.zero_grad()
    kept = sum(x.nbytes for state in optimizer.state.values() for x in state.values()) / 2**20
    peak = measure.peak_memory_mib(step, run.device.type)
    return row | {
        "seconds_a_step": statistics.median(seconds),
        "optimizer_mib": kept,
        "peak_memory_mib": peak if peak is None else kept + peak,
        "quality": quality,
    }


def run(run: Run) -> None:
    finished = run.checkpoint("finished")
    finished.every = 0.0
    rows = finished.load().get("rows", [])
    for make in (functions, new_digits):
        task = make(run)
        for method in ("untuned" if not task.kept else "head alone", "full", *METHODS):
            if any((row["task"], row["tuning"]) == (task.name, method) for row in rows):
                continue
            rows.append(tune(run, task, method))
            finished.save(rows=rows)
            run.write(rows)
            print(
                f"{task.name:<10} {method:<18} {100 * rows[-1]['trainable_share']:6.2f}%  "
                f"{1e3 * rows[-1].get('seconds_a_step', 0):6.0f} ms  {rows[-1].get('peak_memory_mib') or 0:6.0f} MiB  "
                f"{rows[-1]['quality']:.3f}"
            )


def draw(tables: Tables):
    rows = tables[""]
    figure, axes = panels(4, width=3.6)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    titles = {"quality": "quality", "trainable_share": "share of the weights", "seconds_a_step": "s a step",
              "peak_memory_mib": "MiB of a step at its peak"}  # fmt: skip
    names = list(dict.fromkeys(row["tuning"] for row in rows))
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        for i, task in enumerate(tasks):
            shown = [row for row in rows if row["task"] == task and row[column] != ""]
            places = [names.index(row["tuning"]) + 0.38 * (i - 0.5) for row in shown]
            axis.barh(places, [row[column] for row in shown], 0.36, color=f"C{i}", label=task)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names))
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_title(title, fontsize=10)
    axes[1].set_xscale("log")
    axes[0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main(run, draw, Sizes(), SMOKE)

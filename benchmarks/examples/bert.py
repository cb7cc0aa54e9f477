"""A small BERT learns to fill in masked tokens of docstrings, which come in batches of any length.

    python -m benchmarks.examples.bert          under ten minutes on two CPU cores

A vocabulary is made of the standard library's docstrings by byte-pair encoding. Of each text's tokens 15% are asked
for: of these 80% are masked, 10% another token, 10% as they were (Devlin et al., 2019). Rows are padded, and padding is
told to the op by its lengths, not by a mask. Accuracy is over the asked tokens of held-out files, beside that of always
naming the commonest token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xformer_fast.models import BERT

from . import corpus
from .common import Run, Tables, curve, main, panels, smoothed, synchronize

PAD, MASK, FIRST = 0, 1, 2
SHOWN = ["Return a [MASK] of the names in the current scope.", "Raise an exception if the [MASK] does not exist."]


@dataclass(frozen=True)
class Sizes:
    steps: int = 400
    batch: int = 32
    longest: int = 128
    vocabulary: int = 4096
    dim: int = 128
    depth: int = 4
    num_heads: int = 4
    lr: float = 2e-3
    tested_every: int = 50
    tested: int | None = None  # docstrings; None: all that are held out


SMOKE = Sizes(steps=3, batch=4, longest=24, vocabulary=400, dim=16, depth=1, num_heads=2, tested_every=2, tested=8)


def make_tokenizer(texts: list[str], size: int):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace("\n", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[MASK]"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens (B, S) and lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), PAD)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, lengths


def masked(tokens: Tensor, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the model sees, and the targets: the tokens asked for, -1 elsewhere."""
    chance = torch.rand(tokens.shape, generator=generator)
    targets = tokens.masked_fill((chance >= 0.15) | (tokens == PAD), -1)
    seen = tokens.masked_fill((targets >= 0) & (chance < 0.12), MASK)
    other = torch.randint(FIRST, vocabulary, tokens.shape, generator=generator)
    return torch.where((targets >= 0) & (chance >= 0.12) & (chance < 0.135), other, seen), targets


@torch.no_grad()
def accuracy(run: Run, model: BERT, rows: list[list[int]], vocabulary: int) -> tuple[float, float]:
    """Loss and accuracy over the asked tokens, the same at each call."""
    generator, loss, right, asked = torch.Generator().manual_seed(2), 0.0, 0, 0
    for i in range(0, len(rows), run.sizes.batch):
        tokens, lengths = padded(rows[i : i + run.sizes.batch])
        seen, targets = (x.to(run.device) for x in masked(tokens, vocabulary, generator))
        logits = model(seen, lengths=lengths.to(run.device))[0].flatten(0, 1)
        loss += F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum").item()
        right += int((logits.argmax(-1) == targets.flatten()).sum())
        asked += int((targets >= 0).sum())
    return loss / asked, right / asked


def train(run: Run, tokenizer, train_rows: list[list[int]], test_rows: list[list[int]]):
    sizes, vocabulary = run.sizes, tokenizer.get_vocab_size()
    torch.manual_seed(0)
    model = BERT(
        vocabulary, dim=sizes.dim, depth=sizes.depth, num_heads=sizes.num_heads, max_length=sizes.longest, dropout=0.1
    ).to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), sizes.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, sizes.lr, total_steps=sizes.steps, pct_start=0.1)
    draws = torch.Generator().manual_seed(1)
    checkpoint = run.checkpoint("bert", model=model, optimizer=optimizer, schedule=schedule, draws=draws)
    saved = checkpoint.load()
    rows, tests = saved.get("rows", []), saved.get("tests", [])
    for step in run.steps(saved.get("step", 0), sizes.steps, "masked tokens"):
        picked = torch.randint(len(train_rows), (sizes.batch,), generator=draws)
        tokens, lengths = padded([train_rows[i] for i in picked.tolist()])
        seen, targets = (x.to(run.device) for x in masked(tokens, vocabulary, draws))
        start = synchronize(run.device)
        logits = model(seen, lengths=lengths.to(run.device))[0]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds = synchronize(run.device) - start
        rows.append({"step": step + 1, "loss": loss.item(), "tokens": int(lengths.sum()), "seconds": seconds})
        if (step + 1) % sizes.tested_every == 0 or step + 1 == sizes.steps:
            model.eval()
            test_loss, right = accuracy(run, model, test_rows, vocabulary)
            tests.append({"step": step + 1, "held_out_loss": test_loss, "accuracy": right})
            model.train()
        checkpoint.save(step=step + 1, rows=rows, tests=tests)
    return model.eval(), rows, tests


@torch.no_grad()
def filled_in(run: Run, model: BERT, tokenizer, text: str) -> list[str]:
    """The three likeliest tokens for the mask."""
    before, after = text.split(" [MASK]")
    ids = [*tokenizer.encode(before).ids, MASK]
    tokens = torch.tensor([ids + tokenizer.encode(after.strip()).ids], device=run.device)
    likeliest = model(tokens)[0][0, len(ids) - 1].topk(3).indices.tolist()
    return [tokenizer.decode([token]).strip() for token in likeliest]


def run(run: Run) -> None:
    sizes = run.sizes
    texts, held_out = corpus.docstrings()
    tokenizer = make_tokenizer(texts, sizes.vocabulary)
    train_rows, test_rows = (
        [encoding.ids[: sizes.longest] for encoding in tokenizer.encode_batch(part)] for part in (texts, held_out)
    )
    test_rows = test_rows[: sizes.tested]
    model, rows, tests = train(run, tokenizer, train_rows, test_rows)
    tokens = torch.tensor([token for row in test_rows for token in row])
    baseline = (tokens == tokens.mode().values).float().mean().item()
    speed = sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)
    run.write(rows, "training")
    run.write(tests, "tests")
    about = {"training_tokens": sum(map(len, train_rows)), "vocabulary": tokenizer.get_vocab_size()}
    run.write([tests[-1] | {"accuracy_of_commonest_token": baseline, "tokens_per_second": speed} | about])
    print(f"accuracy {tests[-1]['accuracy']:.3f} (always the commonest: {baseline:.3f}), {speed:,.0f} tokens/s")
    for text in SHOWN:
        print(f"{text}  {', '.join(filled_in(run, model, tokenizer, text))}")


def draw(tables: Tables):
    rows, tests, (result,) = tables["training"], tables["tests"], tables[""]
    figure, (left, right) = panels(2)
    steps, losses = curve(rows, "step", "loss")
    left.plot(steps, smoothed(losses, 10), label="training, mean of 10 steps")
    left.plot(*curve(tests, "step", "held_out_loss"), "o-", ms=3, label="held-out files")
    left.set(xlabel="step", ylabel="loss of a masked token (nats)", title="Masked tokens of docstrings")
    left.legend()
    right.plot(*curve(tests, "step", "accuracy"), "o-", ms=3, color="C1", label="BERT")
    right.axhline(result["accuracy_of_commonest_token"], color="0.5", ls="--", label="always the commonest token")
    right.set(xlabel="step", ylabel="accuracy on held-out files", ylim=(0, None))
    right.legend()
    return figure


if __name__ == "__main__":
    main(run, draw, Sizes(), SMOKE)

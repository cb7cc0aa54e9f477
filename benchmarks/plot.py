"""Draws the plots from a benchmark CSV alone.

    python -m benchmarks.plot results.csv --out plots/

speedup.png     per case: speed-up over SDPA of xformer_fast and of the best other peer, and the fraction of the ceiling
memory.png      peak memory of a training step against length
time.png        time of a training step against length
throughput.png  TFLOP/s against length, per head dim, where the CSV has such families of cases
map.png         time of a token against the size of a map, of neighborhood attention
models.png      whole models: speed-up over the host's fastest setting, and its ceiling (rows of benchmarks/models.py)
A plot whose rows are not in the CSV is left out.
"""

from __future__ import annotations

import argparse
import csv
import pathlib
import re
from collections import defaultdict
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

# Okabe and Ito's palette: distinct with any colour vision, and by lightness in print.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F",
)  # fmt: skip
STYLE = {
    "xformer_fast": (BLUE, "o", "xformer_fast"),
    "naive": (VERMILION, "s", "naive"),
    "sdpa": (ORANGE, "^", "torch SDPA"),
    "sdpa-flash": (GREEN, "v", "SDPA flash"),
    "sdpa-efficient": (PURPLE, "D", "SDPA mem-efficient"),
    "sdpa-cudnn": (SKY, "P", "SDPA cuDNN"),
    "flex": (GREY, "X", "FlexAttention"),
}
MODE_TITLE = {"fwd": "forward", "bwd": "backward", "both": "training step"}
NUMBERS = (
    "ms", "vs_sdpa", "vs_best_peer", "gflops", "gbps", "fraction_of_ceiling", "ceiling_gflops", "ceiling_gbps",
    "peak_memory_mib",
)  # fmt: skip

Row = dict[str, Any]


def _rows(path: pathlib.Path, column: str) -> list[Row]:
    """The rows that have a speed, of a CSV that has this column; none of another."""
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        return [row for row in table if row["ms"]] if column in (table.fieldnames or ()) else []


def read_models(path: pathlib.Path) -> list[Row]:
    """The rows of whole models, patched."""
    rows = [row for row in _rows(path, "ceiling") if _ours(row) and row["ceiling"]]
    return [row | {name: float(row[name]) for name in ("vs_host", "ceiling", "of_ceiling")} for row in rows]


def read(path: pathlib.Path) -> list[Row]:
    """The rows of ops that have a speed, numbers as floats (None where empty)."""
    rows = _rows(path, "op")
    for row in rows:
        for name in NUMBERS:
            row[name] = float(row[name]) if row[name] else None
        row["label"] = row["case"] if row["op"] == "attention" else f"{row['op']}: {row['case']}"
    for row in rows:  # a busy moment reads the ceiling too low: the highest reading (of a dtype) is the machine's
        if row["bound"] == "compute" and row["gflops"] and row["ceiling_gflops"]:
            highest = max(r["ceiling_gflops"] or 0 for r in rows if r["dtype"] == row["dtype"])
            row["fraction_of_ceiling"] = row["gflops"] / highest
        elif row["bound"] == "memory" and row["gbps"] and row["ceiling_gbps"]:
            row["fraction_of_ceiling"] = row["gbps"] / max(r["ceiling_gbps"] or 0 for r in rows)
    return rows


def _is_length(row: Row) -> bool:
    return re.fullmatch(r"length_\d+", row["case"]) is not None


def _map_tokens(row: Row) -> int | None:
    match = re.fullmatch(r"map_(\d+)", row["case"])
    return int(match[1]) ** 2 if match else None


def _ours(row: Row) -> bool:
    return row["peer"].split(":")[0] == "xformer_fast"


def _subtitle(rows: list[Row]) -> str:
    row = rows[0]
    commits = [*dict.fromkeys(row["commit"] for row in rows)]
    commits = ", ".join(commits if len(commits) < 4 else (*commits[:2], f"{len(commits) - 2} more"))
    days = sorted({row["date"][:10] for row in rows})
    days = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{row['device']} · torch {row['torch']} · xformer_fast {row['xformer_fast']} ({commits}) · {days}"


def _title(figure, title: str, rows: list[Row]) -> None:
    figure.suptitle(f"{title}\n\n", fontsize=13, fontweight="bold")
    inches = figure.get_size_inches()[1]
    figure.text(0.5, 1 - 0.42 / inches, _subtitle(rows), ha="center", va="top", fontsize=8.5, color="#444444")


def speedup(rows: list[Row], path: pathlib.Path) -> bool:
    """Horizontal bars, one panel a mode and dtype: over SDPA, or the best peer of an op that SDPA does not have."""
    rows = [row for row in rows if not (_is_length(row) or _map_tokens(row))]
    rows = [row for row in rows if row["vs_sdpa"] or row["vs_best_peer"]]
    ours: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if _ours(row):
            held = ours[row["mode"], row["dtype"]].get(row["label"])
            if held is None or row["ms"] < held["ms"]:
                ours[row["mode"], row["dtype"]][row["label"]] = row
    if not ours:
        return False
    modes = [mode for mode in MODE_TITLE if any(m == mode for m, _ in ours)]
    dtypes = [d for d in ("float32", "bfloat16", "float16") if any(x == d for _, x in ours)]
    cases = list(dict.fromkeys(row["label"] for row in rows))
    height = 0.34 * len(cases) + 0.9
    figure, axes = plt.subplots(
        len(modes), len(dtypes), figsize=(5.6 * len(dtypes) + 1, height * len(modes) + 1),
        squeeze=False, sharey=True, layout="constrained",
    )  # fmt: skip
    for i, mode in enumerate(modes):
        for j, dtype in enumerate(dtypes):
            _bars(axes[i, j], cases, ours[mode, dtype], f"{MODE_TITLE[mode]}, {dtype}")
    axes[-1, 0].legend(loc="upper left", bbox_to_anchor=(0, -0.6 / height), ncols=2, fontsize=8, frameon=False)
    title = "Speed-up over torch SDPA, or the best peer where there is none (% = of the machine's measured ceiling)"
    _title(figure, title, rows)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return True


def _bars(axis, cases: list[str], rows: dict[str, Row], title: str) -> None:
    y = [i for i, case in enumerate(cases) if case in rows]
    shown = [rows[case] for case in cases if case in rows]
    speed = [row["vs_sdpa"] or row["vs_best_peer"] for row in shown]
    axis.barh(y, speed, color=BLUE, height=0.62, label="xformer_fast")
    best = [s / row["vs_best_peer"] if row["vs_best_peer"] else None for s, row in zip(speed, shown, strict=True)]
    points = [(b, i) for b, i in zip(best, y, strict=True) if b]
    axis.scatter(*zip(*points, strict=True) if points else ([], []), color=ORANGE, edgecolor="black", linewidth=0.6,
                 marker="D", s=26, zorder=3, label="best other peer")  # fmt: skip
    for i, row, ours, other in zip(y, shown, speed, best, strict=True):
        text = f"{ours:.1f}×  {100 * row['fraction_of_ceiling']:.0f}%"
        axis.annotate(text, (max(ours, other or 0), i), xytext=(6, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(cases)), cases, fontsize=8)
    axis.set_ylim(len(cases) - 0.4, -0.6)
    axis.margins(x=0.22)
    axis.set_xlim(left=0)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("× torch SDPA (or best peer)", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _lines(axis, rows: list[Row], x, y) -> None:
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if y(row) is not None:
            series[row["peer"]].append((x(row), y(row)))
    for peer, points in series.items():
        colour, marker, label = STYLE.get(peer, (BLUE if peer.startswith("xformer_fast") else GREY, ".", peer))
        axis.plot(
            *zip(*sorted(points), strict=True), color=colour, marker=marker, label=label, linewidth=1.8, markersize=5
        )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("sequence length (tokens)")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def over_length(rows: list[Row], path: pathlib.Path, *, column: str, label: str, title: str) -> bool:
    """A column against sequence length, log-log, one panel a dtype."""
    rows = [row for row in rows if _is_length(row) and row["mode"] == "both" and row[column]]
    rows = [row for row in rows if row["peer"] in STYLE or _ours(row)]
    if not rows:
        return False
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = plt.subplots(1, len(dtypes), figsize=(5 * len(dtypes) + 1, 4.4), squeeze=False, layout="constrained")
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        chosen = [row for row in rows if row["dtype"] == dtype]
        _lines(axis, chosen, lambda row: int(row["case"].rsplit("_", 1)[1]), lambda row: row[column])
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_ylabel(label)
        batch, heads, _, head_dim = chosen[0]["shape"].split(", ")
        axis.set_title(f"{dtype}, {batch}, {heads}, length, {head_dim}", fontsize=9)
    axes[0, 0].legend(fontsize=8, frameon=False)
    _title(figure, title, rows)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return True


def over_map(rows: list[Row], path: pathlib.Path) -> bool:
    """Time of a token against the tokens of a map, one panel a mode and dtype."""
    rows = [row for row in rows if _map_tokens(row)]
    panels = list(dict.fromkeys((row["mode"], row["dtype"]) for row in rows))
    if not panels:
        return False
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels) + 1, 4.2), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (mode, dtype) in zip(axes[0], panels, strict=True):
        chosen = [row for row in rows if (row["mode"], row["dtype"]) == (mode, dtype)]
        _lines(axis, chosen, _map_tokens, lambda row: 1e3 * row["ms"] / _map_tokens(row))
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_xlabel("tokens of the map")
        axis.set_ylabel("µs a token")
        axis.set_title(f"{MODE_TITLE[mode]}, {dtype}", fontsize=9)
    axes[0, 0].legend(fontsize=8, frameon=False)
    _title(figure, "Neighborhood attention, kernel 7 x 7: time of a token", rows)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return True


def throughput(rows: list[Row], path: pathlib.Path) -> bool:
    """TFLOP/s of families of cases called <kind>_<n>k_d<head_dim>, forward and training step."""
    families: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        match = re.fullmatch(r"(full|causal|causal_gqa)_(\d+)k_d(\d+)", row["case"])
        if match and row["dtype"] != "float32" and row["mode"] in ("fwd", "both"):
            row["length"] = 1024 * int(match[2])
            families[f"{match[1]}, D {match[3]}", f"{MODE_TITLE[row['mode']]}, {row['dtype']}"].append(row)
    if not any(len({row["length"] for row in family}) > 1 for family in families.values()):
        return False
    kinds = list(dict.fromkeys(kind for kind, _ in families))
    modes = list(dict.fromkeys(mode for _, mode in families))
    figure, axes = plt.subplots(
        len(kinds),
        len(modes),
        figsize=(4.6 * len(modes) + 1, 3.1 * len(kinds) + 1),
        squeeze=False,
        layout="constrained",
    )
    for i, kind in enumerate(kinds):
        for j, mode in enumerate(modes):
            _lines(axes[i, j], families[kind, mode], lambda row: row["length"], lambda row: row["gflops"] / 1e3)
            axes[i, j].set_ylim(bottom=0)
            axes[i, j].set_ylabel("TFLOP/s")
            axes[i, j].set_title(f"{kind}, {mode}", fontsize=9)
    axes[0, 0].legend(fontsize=7, frameon=False)
    _title(figure, "Attention throughput", [row for family in families.values() for row in family])
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return True


def whole_models(rows: list[Row], path: pathlib.Path) -> bool:
    """Horizontal bars, one panel a mode and dtype: over the fastest setting of a model's host, beside the ceiling."""
    if not rows:
        return False
    modes = [mode for mode in MODE_TITLE if any(row["mode"] == mode for row in rows)]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    inputs = {row["case"]: f"{row['case']}  {row['input'].replace('x', '×')}" for row in rows}
    height = 0.36 * len(inputs) + 1
    figure, axes = plt.subplots(
        len(modes), len(dtypes), figsize=(5.6 * len(dtypes) + 1, height * len(modes) + 1),
        squeeze=False, sharey=True, layout="constrained",
    )  # fmt: skip
    for i, mode in enumerate(modes):
        for j, dtype in enumerate(dtypes):
            axis, cases = axes[i, j], list(inputs)
            shown = [row for row in rows if (row["mode"], row["dtype"]) == (mode, dtype)]
            y = [cases.index(row["case"]) for row in shown]
            axis.barh(y, [row["vs_host"] for row in shown], color=BLUE, height=0.62, label="patched")
            axis.scatter([row["ceiling"] for row in shown], y, color=ORANGE, edgecolor="black", linewidth=0.6,
                         marker="D", s=26, zorder=3, label="ceiling: attention taken out")  # fmt: skip
            for place, row in zip(y, shown, strict=True):
                axis.annotate(f"{row['vs_host']:.2f}×  {row['of_ceiling']:.0%}",
                              (max(row["vs_host"], row["ceiling"]), place), xytext=(6, 0), textcoords="offset points",
                              va="center", fontsize=8)  # fmt: skip
            axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
            axis.set_yticks(range(len(cases)), inputs.values(), fontsize=8)
            axis.set_ylim(len(cases) - 0.4, -0.6)
            axis.margins(x=0.25)
            axis.set_xlim(left=0)
            axis.set_title(f"{MODE_TITLE[mode]}, {dtype}", fontsize=10)
            axis.set_xlabel("× the host's fastest setting", fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].legend(loc="upper left", bbox_to_anchor=(0, -0.6 / height), ncols=2, fontsize=8, frameon=False)
    _title(figure, "Whole models, patched (% = of Amdahl's ceiling)", rows)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return True


def draw(csv_paths: list[pathlib.Path], folder: pathlib.Path) -> list[pathlib.Path]:
    """Every plot that the CSVs of a machine have rows for; returns their paths."""
    rows = [row for path in csv_paths for row in read(path)]
    models = [row for path in csv_paths for row in read_models(path)]
    folder.mkdir(parents=True, exist_ok=True)
    step = "of a training step (forward and backward)"
    drawn = {
        "speedup.png": lambda path: speedup(rows, path),
        "memory.png": lambda path: over_length(
            rows, path, column="peak_memory_mib", label="MiB beyond the inputs", title=f"Peak memory {step}"
        ),
        "time.png": lambda path: over_length(rows, path, column="ms", label="ms", title=f"Time {step}"),
        "throughput.png": lambda path: throughput(rows, path),
        "map.png": lambda path: over_map(rows, path),
        "models.png": lambda path: whole_models(models, path),
    }
    return [folder / name for name, plot in drawn.items() if plot(folder / name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=pathlib.Path, help="a CSV, or a folder with <device>/<op>.csv")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder for the plots (default: beside the CSV)")
    args = parser.parse_args()
    folders = sorted(path for path in args.csv.iterdir() if path.is_dir()) if args.csv.is_dir() else []
    folders = [path for path in folders if path.name != "examples"]  # these draw their own
    for paths in [sorted(folder.glob("*.csv")) for folder in folders] or [[args.csv]]:
        for plot in draw(paths, args.out or paths[0].parent):
            print(plot)


if __name__ == "__main__":
    main()

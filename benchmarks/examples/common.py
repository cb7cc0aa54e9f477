"""What every example needs around its loop: arguments, tables of numbers, checkpoints, the plot.

An example has `run(run: Run)`, which trains and writes tables as it goes, `draw(tables) -> figure`, which sees nothing
but these tables, and a dataclass of sizes whose defaults are the full run.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tqdm import tqdm

from xformer_fast.training import Checkpoint

from ..measure import machine_facts

RESULTS = Path(__file__).resolve().parent.parent / "results" / "examples"
WORK = RESULTS.parents[2] / "bench-results" / "examples"
SMOKE = WORK.with_name("examples-smoke")  # takes the place of both: no numbers are lost to it, no run that goes on
FACTS = ("date", "commit", "device", "python", "torch")  # Python, because its library is the text that is learned
SECONDS_BETWEEN_CHECKPOINTS = 15.0

Row = dict[str, Any]
Tables = dict[str, list[Row]]


@dataclass
class Run:
    """One run of an example. sizes: its dataclass. device: where to train. out, work: results, checkpoints."""

    name: str
    sizes: Any
    device: torch.device
    out: Path
    work: Path
    facts: dict[str, Any] = field(init=False)

    def __post_init__(self):
        facts = machine_facts(self.device.type)
        self.facts = {name: facts[name] for name in FACTS}
        self._forget_other_runs({"commit": facts["commit"], "sizes": asdict(self.sizes), "device": facts["device"]})

    def _forget_other_runs(self, this: dict) -> None:
        """Checkpoints of another commit, other sizes or another machine would give numbers of two runs."""
        note, text = self.work / "run.json", json.dumps(this)
        if self.work.exists() and not (note.exists() and note.read_text() == text):
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        note.write_text(text)

    def write(self, rows: list[Row], table: str = "") -> None:
        """Puts the rows, all that the table has so far, into <name>.csv or <name>_<table>.csv."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{self.name}{f'_{table}' if table else ''}.csv"
        partial = path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)) + list(self.facts))
            writer.writeheader()
            writer.writerows({name: _short(value) for name, value in (row | self.facts).items()} for row in rows)
        os.replace(partial, path)

    def tables(self) -> Tables:
        """What `write` wrote, numbers as floats."""
        found = {}
        for path in self.out.glob(f"{self.name}*.csv"):
            table = path.stem.removeprefix(self.name).removeprefix("_")
            with path.open(newline="") as file:
                found[table] = [{name: _number(text) for name, text in row.items()} for row in csv.DictReader(file)]
        return found

    def checkpoint(self, name: str, **parts: Any) -> Checkpoint:
        return Checkpoint(self.work / f"{name}.pt", every=SECONDS_BETWEEN_CHECKPOINTS, **parts)

    def steps(self, first: int, total: int, what: str) -> Iterator[int]:
        """The steps from `first` on, under a progress bar."""
        every = 0.5 if sys.stderr.isatty() else 15
        return tqdm(range(first, total), desc=what, initial=first, total=total, unit="step", mininterval=every)


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def synchronize(device: torch.device) -> float:
    """The time, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main(run: Callable[[Run], None], draw: Callable[[Tables], Any], sizes: Any, smoke: Any, argv=None) -> None:
    """Runs an example from the command line. sizes, smoke: of the full run, and of one that takes seconds."""
    path = Path(inspect.getfile(run))
    about = inspect.getmodule(run).__doc__
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"folder of the tables and the plot ({shown(RESULTS)})")
    parser.add_argument("--work", type=Path, help=f"folder of the checkpoints, empty after the run ({shown(WORK)})")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--smoke", action="store_true", help=f"seconds, not minutes: does it run? ({shown(SMOKE)})")
    args = parser.parse_args(argv)
    start = time.monotonic()
    out, work = args.out or (SMOKE if args.smoke else RESULTS), args.work or (SMOKE / "work" if args.smoke else WORK)
    this = Run(path.stem, smoke if args.smoke else sizes, torch.device(args.device), out, work / path.stem)
    run(this)
    plot = this.out / f"{this.name}.png"
    save_plot(draw(this.tables()), this.facts, plot)
    shutil.rmtree(this.work)
    print(f"{time.monotonic() - start:.0f} s; {plot}")


def shown(folder: Path) -> str:
    return folder.relative_to(RESULTS.parents[2]).as_posix()


def save_plot(figure, facts: Row, path: Path) -> None:
    import matplotlib.pyplot as plt

    versions = f"Python {facts['python']}, torch {facts['torch']}"
    about = " · ".join((facts["device"], versions, facts["commit"], facts["date"][:10]))
    figure.supxlabel(about, fontsize=7.5, color="#555555")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def panels(count: int, *, height: float = 3.8, width: float = 4.6):
    """A figure with `count` axes in a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, count, figsize=(width * count, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, list(axes[0])


def curve(rows: list[Row], x: str, y: str, **equals: Any) -> tuple[list[float], list[float]]:
    """The columns x and y of the rows whose columns have these values."""
    chosen = [row for row in rows if all(row[name] == value for name, value in equals.items())]
    return [row[x] for row in chosen], [row[y] for row in chosen]


def smoothed(values: list[float], over: int) -> list[float]:
    """Means of the last `over` values."""
    return [sum(values[max(0, i + 1 - over) : i + 1]) / min(over, i + 1) for i in range(len(values))]

"""The table of the models that patch was proved on, as a test run found them: pytest --models-table FILE.

A run replaces the rows of the models that it ran and keeps the others: timm's models are tested in a run of their own.
"""

import pathlib

import pytest

ROWS = pytest.StashKey[dict]()
LIBRARIES = ("transformers", "timm", "torch.nn", "peft")
HEAD = ("library", "model", "attention modules", "tested with", "output error", "gradient error")
INTRODUCTION = (
    "Written by `make models-table`, a test run: small models with random "
    "weights, float32, patched against unpatched. Errors are the largest of all inputs: of the output relative to the "
    "largest output (1e-4 is allowed), of each parameter's gradient relative to its largest entry (2e-3)."
)


def recorder(rows: dict):
    def record(library: str, model: str, count: int, labels, errors):
        worst = [f"{max(pair[i] for pair in errors):.0e}" for i in (0, 1)]
        rows[library, model] = (library, model, str(count), ", ".join(labels), *worst)

    return record


def write(path: str, rows: dict):
    file = pathlib.Path(path)
    held = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        cells = tuple(cell.strip() for cell in line.strip().strip("|").split("|"))
        if len(cells) == len(HEAD) and cells[0] in LIBRARIES:
            held[cells[:2]] = cells
    order = sorted((held | rows).values(), key=lambda cells: (LIBRARIES.index(cells[0]), cells[1].lower()))
    lines = [INTRODUCTION, "", *(f"| {' | '.join(cells)} |" for cells in (HEAD, ("---",) * len(HEAD), *order))]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")

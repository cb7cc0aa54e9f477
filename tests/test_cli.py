"""`xformer-fast`: what is wrong with its arguments is told in a line, before anything is measured, with status 2."""

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks import compare, run
from xformer_fast import cli

WITHOUT_CUDA = [] if torch.cuda.is_available() else [
    (["compare", "--device", "cuda"], "no CUDA device here"),
    (["bench", "--device", "cuda"], "no CUDA device here"),
]  # fmt: skip


@pytest.mark.parametrize(
    "words, told",
    [
        (["--bad", "bench"], "unrecognized arguments: --bad"),
        (["bench", "--bad"], "unrecognized arguments: --bad"),
        (["bench", "--backend", "nope"], "no backend 'nope' of attention; there are"),
        (["bench", "--backend", "reference,nope"], "no backend 'nope' of attention; there are"),
        (["bench", "--op", "window_attention", "--backend", "nope"], "no backend 'nope' of window_attention"),
        (["bench", "--op", "t5_attention", "--backend", "nope"], "no backend 'nope' of t5_attention"),
        (["bench", "--seconds", "nan"], "must be a number of seconds"),
        (["bench", "--seconds", "-1"], "must be a number of seconds"),
        (["bench", "--out", "/dev/null/rows.csv"], "/dev/null"),
        (["bench", "--peer", "nobody"], "no peer nobody"),
        (["compare", "--backend", "nope"], "no backend 'nope' of attention"),
        (["compare", "--seconds", "nan"], "must be a number of seconds"),
        *WITHOUT_CUDA,
    ],
)
def test_wrong_arguments(words, told, monkeypatch, capsys):
    def bench(*args, **options):
        raise AssertionError("nothing is to be measured")

    for module in (run, compare):
        monkeypatch.setattr(module, "bench", bench)
    try:
        status = cli.main(words)
    except SystemExit as left:  # argparse's way
        status = left.code
    errors = capsys.readouterr().err
    assert status == 2 and told in errors.splitlines()[-1], errors


def test_a_path_that_can_be_written_is_left_as_it_was(tmp_path):
    new, old = tmp_path / "folder" / "new.csv", tmp_path / "old.csv"
    old.write_text("rows")
    run.check_writable(new)
    run.check_writable(old)
    assert not new.exists() and old.read_text() == "rows"


def test_what_is_missing_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("no tqdm", name="tqdm")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    with pytest.raises(SystemExit, match=r"benchmarks need tqdm: pip install '\.\[bench\]'"):
        cli.main(["bench"])


def test_info(capsys):
    assert cli.main(["info"]) == 0 and "attention" in capsys.readouterr().out

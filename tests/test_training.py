"""`Checkpoint`: a run killed at any moment, and resumed, ends with the weights of one that was left alone."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from xformer_fast import attention
from xformer_fast.training import Checkpoint

TESTS = pathlib.Path(__file__).parent


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, str(TESTS / "killed_run.py"), str(tmp_path), "12", "3"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    lives, steps_lost = map(int, result.stdout.split())
    assert lives >= 4 and steps_lost >= 1  # it did die, and work was lost and done again
    expected, got = (torch.load(tmp_path / name) for name in ("expected.pt", "weights.pt"))
    assert got["losses"] == expected["losses"]
    for name, weight in expected["model"].items():
        assert torch.equal(got["model"][name], weight), name


def test_dropout_goes_on_where_it_was(tmp_path):
    q, k, v = torch.randn(3, 1, 2, 9, 8).unbind()
    data = torch.Generator().manual_seed(7)
    checkpoint = Checkpoint(tmp_path / "deep" / "run.pt", data=data)
    assert checkpoint.load() == {}
    checkpoint.save(step=5)
    expected = [attention(q, k, v, dropout_p=0.5), torch.rand(3), torch.rand(3, generator=data)]
    torch.manual_seed(99)
    assert Checkpoint(tmp_path / "deep" / "run.pt", data=data).load() == {"step": 5}
    for got, before in zip(
        [attention(q, k, v, dropout_p=0.5), torch.rand(3), torch.rand(3, generator=data)], expected, strict=True
    ):
        assert torch.equal(got, before)


def test_every_holds_saves_back(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run.pt", every=3600.0)
    checkpoint.save(step=1)
    assert not checkpoint.path.exists()
    checkpoint.every = 0.0
    checkpoint.save(step=2)
    checkpoint.every = 3600.0
    checkpoint.save(step=3)
    assert checkpoint.load() == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_errors(tmp_path):
    with pytest.raises(TypeError, match="steps must have a state_dict"):
        Checkpoint(tmp_path / "run.pt", steps=3)
    Checkpoint(tmp_path / "run.pt", model=torch.nn.Linear(1, 1)).save()
    with pytest.raises(ValueError, match=r"holds model, this run has net"):
        Checkpoint(tmp_path / "run.pt", net=torch.nn.Linear(1, 1)).load()

"""`make gpu-proof` as far as a machine without a GPU takes it: the dry run, the verdict, how a second run goes on."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_proof
from xformer_fast import dispatch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_dry_run(tmp_path):
    proven = gpu_proof.PROVEN.read_text() if gpu_proof.PROVEN.exists() else None
    command = ["make", "gpu-proof", "DRY=1", f"OUT={tmp_path}", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "report.md").read_text()
    assert "gpu tests: " in report and "sm_90: compiled" in report and "Passed" in report
    assert ("CUDA C++ kernels: rope compiled" if shutil.which("nvcc") else "no nvcc") in report
    with (tmp_path / "plan.csv").open(newline="") as file:
        planned = [row["case"] for row in csv.DictReader(file)]
    for kind in ("full_1k", "causal_32k", "gqa", "bias", "window", "decode"):
        assert any(kind in case for case in planned), kind
    assert proven == (gpu_proof.PROVEN.read_text() if gpu_proof.PROVEN.exists() else None)


def test_refuses_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.gpu_proof", "--out", str(tmp_path), "--part", "tests-rope"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "No CUDA device" in done.stdout


def test_every_gpu_test_is_in_a_part():
    marked = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/*/test_*.py") if ".mark.gpu" in path.read_text()}
    assert marked == set(gpu_proof.TESTS.values())


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A pretended one."""
    monkeypatch.setattr(gpu_proof, "PROVEN", tmp_path / "package.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.fixture
def proof(tmp_path, monkeypatch, gpu):
    """run_tests() with pytest replaced by the outcomes of one run, each (outcome, what it proves), named in order;
    returns (verdict, proven.json)."""

    def prove(outcomes, status=0):
        def pytest_run(command, seconds, **environment):
            with open(environment["XFORMER_FAST_OUTCOMES"], "a") as file:
                for i, (outcome, *proves) in enumerate(outcomes):
                    file.write(json.dumps({"test": f"test_{i}", "outcome": outcome, "proves": proves}) + "\n")
            return status, "output"

        monkeypatch.setattr(gpu_proof, "run", pytest_run)
        verdict = gpu_proof.run_tests("tests-attention", tmp_path, 10, gpu_proof.Report(tmp_path / "report.md"))
        written = json.loads((tmp_path / "proven.json").read_text())
        assert written == json.loads(gpu_proof.PROVEN.read_text())
        return verdict, written

    return prove


TRITON, CUDA = "attention/triton", "attention/cuda"


def test_passing_tests_prove_their_backend(proof):
    verdict, proven = proof([("passed", TRITON), ("passed", TRITON), ("skipped", TRITON), ("passed",)])
    assert verdict
    assert proven[TRITON]["tests"] == 2
    assert {"device", "capability", "torch", "triton", "commit", "tests", "date"} == set(proven[TRITON])


@pytest.mark.parametrize(
    "outcomes, status",
    [
        ([("passed", TRITON), ("failed", TRITON)], 1),
        ([("passed", TRITON), ("failed",)], 1),
        ([("skipped", TRITON)], 0),
        ([("passed", TRITON)], 124),
        ([("passed", TRITON)], 2),
    ],
    ids=["failure", "failure of no backend", "all skipped", "out of time", "interrupted"],
)
def test_anything_less_takes_the_proof_back(proof, outcomes, status):
    assert TRITON in proof([("passed", TRITON)])[1]
    verdict, proven = proof(outcomes, status)
    assert not verdict and proven == {}


def test_a_backend_does_not_fail_for_another(proof):
    verdict, proven = proof([("passed", TRITON), ("passed", CUDA), ("failed", CUDA)], 1)
    assert not verdict and set(proven) == {TRITON}


PASSING, FAILING, LAST = (f"test_made_up.py::{name}" for name in ("test_passing", "test_failing", "test_last"))


def test_a_killed_run_says_what_passed_and_is_gone_on_with(tmp_path, monkeypatch, gpu):
    """A real pytest, killed in its third test; the second run looks again at what did not pass, and at nothing else."""
    tests = tmp_path / "test_made_up.py"
    tests.write_text(
        "import os, signal\n"
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "@pytest.fixture(autouse=True)\n"
        "def backend(record_property):\n"
        "    record_property('proves', 'attention/triton')\n"
        "def test_passing(): pass\n"
        "def test_failing(): assert os.environ.get('SECOND')\n"
        "def test_last(): os.environ.get('SECOND') or os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setitem(gpu_proof.TESTS, "tests-attention", str(tests))
    monkeypatch.setattr(gpu_proof.importlib.util, "find_spec", lambda name: None)  # one process, in order
    path, report = tmp_path / "tests-attention.jsonl", tmp_path / "report.md"

    def lines():
        return [
            (Path(line["test"]).name, line["outcome"]) for line in map(json.loads, path.read_text().splitlines()[1:])
        ]

    assert not gpu_proof.run_tests("tests-attention", tmp_path, 300, gpu_proof.Report(report))
    assert lines() == [(PASSING, "passed"), (FAILING, "failed")]
    assert "1 passed, 1 failed" in report.read_text() and "is not proven" in report.read_text()
    monkeypatch.setenv("SECOND", "1")
    assert gpu_proof.run_tests("tests-attention", tmp_path, 300, gpu_proof.Report(report))
    assert lines()[2:] == [(FAILING, "passed"), (LAST, "passed")]
    assert json.loads(gpu_proof.PROVEN.read_text())["attention/triton"]["tests"] == 3
    assert gpu_proof.run_tests("tests-attention", tmp_path, 300, gpu_proof.Report(report)), "nothing was left to run"


def test_a_build_is_made_once_for_the_gpu_at_hand(tmp_path, monkeypatch, gpu):
    started = []

    def compile_(command, seconds, **environment):
        started.append((seconds, environment))
        (tmp_path / "xformer_fast" / "_ops.so").write_text("code")
        return 0, ""

    for folder in ("xformer_fast", "csrc"):
        (tmp_path / folder).mkdir()
    (tmp_path / "setup.py").write_text("")
    monkeypatch.delenv("XFORMER_FAST_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(gpu_proof, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_proof, "run", compile_)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    report = gpu_proof.Report(tmp_path / "report.md")
    gpu_proof.build(report, 7)
    gpu_proof.build(report, 7)
    assert len(started) == 1 and started[0][0] <= 7
    assert started[0][1] == {"XFORMER_FAST_BUILD": "require", "XFORMER_FAST_CUDA_ARCHS": "90a"}
    (tmp_path / "csrc" / "new.cu").write_text("")
    gpu_proof.build(report, 7)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    gpu_proof.build(report, 7)
    assert [environment["XFORMER_FAST_CUDA_ARCHS"] for _, environment in started] == ["90a", "90a", "80"]


def test_the_sanitizer_does_not_report_errors_of_calls(tmp_path, monkeypatch):
    """torch asks CUDA for what it may refuse: such an answer is no fault of a kernel."""
    commands = []
    monkeypatch.setattr(dispatch, "cuda_problem", lambda op: None)
    monkeypatch.setattr(gpu_proof.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(gpu_proof, "run", lambda command, seconds: commands.append(" ".join(command)) or (0, ""))
    assert gpu_proof.run_sanitizer(tmp_path, 10, gpu_proof.Report(tmp_path / "report.md"))
    assert len(commands) == 3 and all("--report-api-errors no" in command for command in commands)


@pytest.mark.parametrize(
    "proof, reason",
    [
        ({}, "executed by emulation only: no run on a GPU has proved it yet (make gpu-proof)"),
        ({"attention/triton": {"capability": "sm_90"}}, "executed by emulation only"),
        ({"attention/cuda": {"capability": "sm_80"}}, "proven on sm_80 alone, this GPU is sm_90"),
        ({"attention/cuda": {"capability": "sm_90"}}, None),
    ],
    ids=["nothing", "another backend", "another architecture", "this one"],
)
def test_cuda_kernels_are_chosen_where_their_architecture_is_proven(proof, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "proven", lambda: proof)
    said = dispatch.cuda_unproven("attention", torch.device("cuda"))
    assert said is None if reason is None else said.startswith(reason)
    assert dispatch.cuda_unproven("attention", torch.device("cpu")) == "the emulation is for tests"


def test_a_second_run_goes_on(tmp_path, monkeypatch):
    jobs = [gpu_proof.Job("attention", name, "bfloat16") for name in ("a", "b", "c")]
    started, commit = [], ["one"]

    def benchmark(command, seconds):
        name = command[command.index("--case") + 1]
        started.append(name)
        if name == "b" and started.count("b") == 1:
            return 139, "segmentation fault"
        with open(command[command.index("--out") + 1], "w") as file:
            columns = "commit,op,case,dtype,mode,peer,status,ms"
            rows = [
                f"{commit[0]},attention,{name},bfloat16,fwd,{peer},ok,{ms}"
                for peer, ms in (("sdpa", 2), ("xformer_fast:triton", 1), ("xformer_fast:cuda", 4))
            ]
            file.write("\n".join([columns, *rows]) + "\n")
        return 0, ""

    def go(seconds=100.0):
        return gpu_proof.run_benchmarks("bench", jobs, tmp_path, seconds, gpu_proof.Report(tmp_path / "report.md"))

    monkeypatch.setattr(gpu_proof, "run", benchmark)
    monkeypatch.setattr(gpu_proof, "commit", lambda: commit[0])
    assert not go(seconds=0) and not started
    assert not go() and started == ["a", "b", "c"]
    assert go() and started == ["a", "b", "c", "b"]
    report = (tmp_path / "report.md").read_text()
    assert "xformer_fast:triton, fwd, speed against sdpa 2.00x (least 2.00x, 3 cases)" in report
    assert "xformer_fast:cuda, fwd, speed against sdpa 0.50x (least 0.50x, 3 cases)" in report
    commit[0] = "two"
    assert go() and started[-3:] == ["a", "b", "c"]

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
    command = [sys.executable, "-m", "benchmarks.gpu_proof", "--out", str(tmp_path), "--part", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "No CUDA device" in done.stdout


@pytest.fixture
def proof(tmp_path, monkeypatch):
    """run_tests() with pytest replaced by a junit file, on a pretended GPU; returns (verdict, proven.json)."""
    monkeypatch.setattr(gpu_proof, "PROVEN", tmp_path / "package.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def prove(cases: str, status=0):
        def pytest_run(command, seconds):
            path = next(part.split("=")[1] for part in command if part.startswith("--junitxml="))
            Path(path).write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
            return status, "output"

        monkeypatch.setattr(gpu_proof, "run", pytest_run)
        verdict = gpu_proof.run_tests(tmp_path, 10, gpu_proof.Report(tmp_path / "report.md"))
        written = json.loads((tmp_path / "proven.json").read_text())
        assert written == json.loads(gpu_proof.PROVEN.read_text())
        return verdict, written

    return prove


def case(inside="", proves="attention/triton"):
    prop = f'<properties><property name="proves" value="{proves}"/></properties>' if proves else ""
    return f"<testcase>{prop}{inside}</testcase>"


def test_passing_tests_prove_their_backend(proof):
    verdict, proven = proof(case() + case() + case("<skipped/>") + case(proves=""))
    assert verdict
    assert proven["attention/triton"]["tests"] == 2
    assert {"device", "capability", "torch", "triton", "commit", "tests", "date"} == set(proven["attention/triton"])


@pytest.mark.parametrize(
    "cases, status",
    [
        (case() + case("<failure/>"), 1),
        (case() + case("<error/>", proves=""), 1),
        (case("<skipped/>"), 0),
        (case(), 124),
    ],
    ids=["failure", "error elsewhere", "all skipped", "out of time"],
)
def test_anything_less_takes_the_proof_back(proof, cases, status):
    assert "attention/triton" in proof(case())[1]
    verdict, proven = proof(cases, status)
    assert not verdict and proven == {}


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

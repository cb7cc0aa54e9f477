"""Proves the GPU kernels on the machine at hand: builds, runs every test marked `gpu`, measures, says what is proven.

    make gpu-proof OUT=dir            all parts, in turn; a second run goes on where the first one stopped
    make gpu-proof OUT=dir PART=tests-rope    one part (build, tests-<op>, sanitizer, bench-...); each stays under 9
                                          minutes, so that it fits a time-limited machine
    make gpu-proof OUT=dir DRY=1      everything but the GPU: builds, collects the tests, compiles for sm_90, plans

Needs torch with CUDA, Triton and pytest; no network. Builds for the GPU at hand alone, unless XFORMER_FAST_CUDA_ARCHS
is set, and only what has changed. Leaves in OUT: tests-<op>.jsonl, <op>.csv, a report, and proven.json, which is also
written to xformer_fast/: what `dispatch` chooses by default on a GPU. `python -m benchmarks.plot OUT/attention.csv`
draws the plots.

Outcomes of tests are written as the tests end: a part that ran out of time, or was killed, goes on with what has not
passed yet on these sources and this kind of GPU. A backend is proven for an op when every gpu test of the op's file has
run, those that name them, by recording the property proves = "op/backend", passed, and none failed that names none. A
backend that fails is taken out of proven.json; so is one whose file has tests left to run.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROVEN = ROOT / "xformer_fast" / "proven.json"
PART_SECONDS = 510
TESTS = {  # what costs least first; test_gpu_proof.py sees that all tests marked gpu are here
    "tests-rope": "tests/ops/test_rope_gpu.py",
    "tests-decode": "tests/ops/test_decode_gpu.py",
    "tests-attention": "tests/ops/test_attention_gpu.py",
    "tests-linear-attention": "tests/ops/test_linear_attention_gpu.py",
    "tests-window-attention": "tests/ops/test_window_attention_gpu.py",
    "tests-neighborhood-attention": "tests/ops/test_neighborhood_attention_gpu.py",
    "tests-models": "tests/models/test_families.py",
}
SANITIZER_CHECKS = ("memcheck", "racecheck", "synccheck")
CASE_SECONDS = 150  # one benchmark case in one dtype, its process included: more means that it hangs
PEERS = {"attention": "naive,sdpa,sdpa-flash,sdpa-efficient,sdpa-cudnn,flex"}  # of the other ops: all that they have


@dataclass(frozen=True)
class Job:
    """One benchmark case in one dtype, all its modes: a process of its own, for a fault ends a CUDA context."""

    op: str
    case: str
    dtype: str


def benchmark_parts() -> dict[str, list[Job]]:
    """The benchmark's parts, what a quick look needs first."""
    from benchmarks.cases import OPS, select

    cases = sorted(select("attention", device="cuda"), key=lambda case: not case.quick)
    parts: dict[str, list[Job]] = {"bench-d64": [], "bench-d128": [], "bench-d256": [], "bench-options": []}
    for case in cases:
        plain = case.seqlen_q == case.seqlen_k > 1000 and case.heads == case.heads_kv
        plain = plain and not (case.window or case.padded or case.alibi or case.bias)
        parts[f"bench-d{case.head_dim}" if plain else "bench-options"].append(Job("attention", case.name, "bfloat16"))
    for op in OPS:
        if op != "attention":
            of_op = sorted(select(op, device="cuda"), key=lambda case: not case.quick)
            parts[f"bench-{op.replace('_', '-')}"] = [Job(op, case.name, "bfloat16") for case in of_op]
    quick = [case for case in cases if case.quick]
    parts["bench-dtypes"] = [Job("attention", case.name, dtype) for dtype in ("float16", "float32") for case in quick]
    return parts


def gpu_backends(op: str) -> list[str]:
    """The GPU kernels of an op; benchmarks with names of their own (t5_attention) are calls of `attention`."""
    from xformer_fast.dispatch import TABLES

    return [name for name in TABLES.get(op, TABLES["attention"]).names() if name in ("triton", "cuda")]


class Report:
    """Prints lines and keeps them in OUT/report.md."""

    def __init__(self, path: Path):
        self.path = path
        self.path.write_text("")

    def __call__(self, line: str = ""):
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def run(command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
    """(exit status, output); status 124 where time ran out, and then all that the command started is ended."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **environment}, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = 124
        output.seek(0)
        return status, output.read()


def tail(text: str, lines: int = 15) -> str:
    return "\n".join("    " + line for line in text.strip().splitlines()[-lines:])


def local_target() -> str | None:
    """The one of setup.py's GPU targets that the GPU at hand runs; what is newer than all runs the PTX of sm_80's."""
    import torch

    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    return "90a" if capability == (9, 0) else "89" if capability == (8, 9) else "80"


def digest(facts: str, *paths: str) -> str:
    """Of facts, and of the sources in files and folders."""
    result = hashlib.sha256(facts.encode())
    for place in (ROOT / path for path in paths):
        inside = sorted(path for path in place.rglob("*") if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"))
        for path in inside if place.is_dir() else [place]:
            result.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return result.hexdigest()[:16]


def build(report: Report, seconds: float) -> None:
    """In place, within the time, warnings fatal; if they are, once more without that. Nothing if nothing changed."""
    import torch

    end, targets = time.monotonic() + seconds, os.environ.get("XFORMER_FAST_CUDA_ARCHS") or local_target()
    environment = {"XFORMER_FAST_CUDA_ARCHS": targets} if targets else {}
    stamp, facts = ROOT / "build" / "gpu-proof.txt", f"{sys.version}{torch.__version__}{targets}"
    binary, sources = "xformer_fast/_ops.so", ("setup.py", "csrc")
    if stamp.exists() and (ROOT / binary).exists() and stamp.read_text() == digest(facts, binary, *sources):
        return report("- C++ kernels: built before")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    for mode in ("require", "try"):
        start = time.monotonic()
        status, output = run(command, end - start, XFORMER_FAST_BUILD=mode, **environment)
        if status == 0 and "without C++ kernels" not in output:
            stamp.parent.mkdir(exist_ok=True)
            stamp.write_text(digest(facts, binary, *sources) if (ROOT / binary).exists() else "")
            return report(f"- C++ kernels: built in {time.monotonic() - start:.0f} s (XFORMER_FAST_BUILD={mode})")
        report(f"- C++ kernels: not built with XFORMER_FAST_BUILD={mode}\n{tail(output)}")
        if status == 124:
            report("- out of time; what is compiled is kept: PART=build goes on")
            break
    report("- The Triton kernels need no build: going on.")


def commit() -> str:
    from benchmarks.measure import machine_facts

    return machine_facts("cpu")["commit"]


def outcomes_of(path: Path, where: dict[str, str]) -> dict[str, dict]:
    """The last outcome of each test in a file of outcomes; one of other sources or another GPU is moved aside."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    if lines and lines[0] != where:
        path.rename(path.with_suffix(".old.jsonl"))
        lines = []
    if not lines:
        path.write_text(json.dumps(where) + "\n")
    return {line["test"]: line for line in lines[1:]}


def run_tests(part: str, out: Path, seconds: float, report: Report) -> bool:
    """The tests of a part that have not passed yet; then the verdict. True if all have."""
    import torch

    path, done = out / f"{part}.jsonl", out / f"{part}.done"
    sources = digest(torch.__version__, "setup.py", "csrc", "kernels", "xformer_fast", "tests")
    where = {"sources": sources, "device": torch.cuda.get_device_name()}
    before = outcomes_of(path, where)
    done.write_text("".join(f"{test}\n" for test, line in before.items() if line["outcome"] == "passed"))
    command = [sys.executable, "-m", "pytest", TESTS[part], "-m", "gpu", "-p", "benchmarks.proof_plugin"]
    if importlib.util.find_spec("xdist"):  # most of the time is Triton's compiler, on one core a process
        command += ["-n", str(max(1, (os.cpu_count() or 1) - 1))]
    files = {"XFORMER_FAST_OUTCOMES": str(path), "XFORMER_FAST_DONE": str(done)}
    status, output = run(command, seconds, OMP_NUM_THREADS="1", **files)
    done.unlink()
    outcomes = outcomes_of(path, where)
    ended = [line["outcome"] for line in outcomes.values()]
    count = {kind: ended.count(kind) for kind in ("passed", "failed", "skipped")}
    report(f"- {part}: " + ", ".join(f"{number} {kind}" for kind, number in count.items()))
    complete = status in (0, 1) or (status == 5 and count["passed"] > 0)  # 5: none was left to run
    if not complete or count["failed"]:
        report(f"  pytest ended with status {status}{' (out of time)' if status == 124 else ''}\n{tail(output, 40)}")
    if not complete:
        report("  What did not run is not proven; run again with the same OUT to go on.")
    record_proof(list(outcomes.values()), complete, out, report)
    return complete and count["passed"] > 0 and not count["failed"]


def run_sanitizer(out: Path, seconds: float, report: Report) -> bool:
    """NVIDIA's compute-sanitizer over small calls of the CUDA C++ kernels. True if it found nothing, or is not here."""
    from xformer_fast.dispatch import cuda_problem

    tool = shutil.which("compute-sanitizer")
    missing = cuda_problem("attention_cuda") or (None if tool else "no compute-sanitizer")
    if missing:
        report(f"- sanitizer: not run: {missing}")
        return True
    fine, log = True, out / "sanitizer.log"
    log.write_text("")
    for check in SANITIZER_CHECKS:
        command = [tool, "--tool", check, "--error-exitcode", "9", "--report-api-errors", "no"]  # torch makes some
        command += [sys.executable, "tests/sanitize/gpu.py"]
        status, output = run(command, seconds / len(SANITIZER_CHECKS))
        with log.open("a") as file:
            file.write(output)
        verdict = "clean" if status == 0 else f"status {status}\n{tail(output)}"
        report(f"- sanitizer: {check} {verdict}")
        fine = fine and status == 0
    return fine


def record_proof(outcomes: list[dict], complete: bool, out: Path, report: Report) -> None:
    import torch
    import triton

    claims = defaultdict(list)
    for line in outcomes:
        for name in line["proves"]:
            claims[name].append(line["outcome"])
    nameless = any(line["outcome"] == "failed" and not line["proves"] for line in outcomes)
    facts = {
        "device": torch.cuda.get_device_name(),
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
    proven = json.loads(PROVEN.read_text()) if PROVEN.exists() else {}
    for name, ended in sorted(claims.items()):
        passed = ended.count("passed")
        if complete and passed and "failed" not in ended and not nameless:
            proven[name] = {**facts, "tests": passed}
            report(f"- proven: {name} on {facts['device']} ({facts['capability']}), {passed} tests")
        else:
            proven.pop(name, None)
            report(f"- NOT proven: {name}")
    text = json.dumps(proven, indent=2, sort_keys=True) + "\n"
    PROVEN.write_text(text)
    (out / "proven.json").write_text(text)


def jobs_done(path: Path, now: str) -> set[Job]:
    """The jobs whose rows a CSV holds; a CSV of another commit is moved aside, not added to."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if any(row["commit"].removesuffix("-dirty") != now.removesuffix("-dirty") for row in rows):  # proven.json dirties
        path.rename(path.with_suffix(".old.csv"))
        return set()
    return {Job(row["op"], row["case"], row["dtype"]) for row in rows}


def append(source: Path, target: Path) -> None:
    """Adds a CSV's rows to another, whole or not at all."""
    head, _, rows = source.read_text().partition("\n")
    with target.open("a") as file:
        file.write(rows if target.stat().st_size else f"{head}\n{rows}")


def run_benchmarks(part: str, jobs: list[Job], out: Path, seconds: float, report: Report) -> bool:
    """Runs what is not in the CSV yet, until time is out. True if nothing was wrong and nothing is left."""
    end, path = time.monotonic() + seconds, out / f"{jobs[0].op}.csv"  # a part is of one op
    done, fine = jobs_done(path, commit()), True
    left = [job for job in jobs if job not in done]
    while left and time.monotonic() < end - 20:
        job = left.pop(0)
        rows = out / ".rows.csv"
        rows.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.run", "--op", job.op, "--device", "cuda"]
        command += ["--backend", ",".join(gpu_backends(job.op))]
        command += ["--peer", PEERS[job.op]] if job.op in PEERS else []
        command += ["--case", job.case, "--dtype", job.dtype, "--seconds", "1", "--out", str(rows)]
        print(f"{part}: {job.case} {job.dtype}, {len(left)} to go", flush=True)
        limit = min(CASE_SECONDS, end - time.monotonic())
        status, output = run(command, limit)
        if status in (0, 1) and rows.exists():
            append(rows, path)
        elif status == 124 and limit < CASE_SECONDS:
            left.insert(0, job)
            break
        if status:
            fine = False
            report(f"- {part}: {job.case} {job.dtype} ended with status {status}\n{tail(output)}")
        rows.unlink(missing_ok=True)
    if path.exists():
        summarise(part, jobs, path, report)
    if left:
        report(f"- {part}: {len(left)} of {len(jobs)} cases left; run again with the same OUT to go on")
    return fine and not left


def summarise(part: str, jobs: list[Job], path: Path, report: Report) -> None:
    """Speed against each peer, from the CSV."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if Job(row["op"], row["case"], row["dtype"]) in jobs]
    cells = defaultdict(dict)
    for row in rows:
        if row["status"] == "ok":
            cells[row["case"], row["dtype"], row["mode"]][row["peer"]] = float(row["ms"])
    report(f"- {part}: {len(cells)} cells, {sum(row['status'] == 'wrong' for row in rows)} wrong results")
    names = {name for times in cells.values() for name in times}
    ours = sorted(name for name in names if name.startswith("xformer_fast"))
    for mode, own in itertools.product(sorted({mode for _, _, mode in cells}), ours):
        parts = []
        for peer in sorted(names - set(ours)):
            ratios = [
                times[peer] / times[own]
                for key, times in cells.items()
                if key[2] == mode and peer in times and own in times
            ]
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                parts.append(f"{peer} {mean:.2f}x (least {min(ratios):.2f}x, {len(ratios)} cases)")
        report(f"  - {own}, {mode}, speed against {'; '.join(parts) or 'nobody'}")


def dry_run(parts: dict[str, list[Job]], out: Path, report: Report) -> bool:
    """All but the GPU: the tests are collected, kernels compiled, the benchmarks planned."""
    status, output = run([sys.executable, "-m", "pytest", "tests", "-m", "gpu", "--collect-only"], 200)
    count = sum("::" in line for line in output.splitlines())
    fine = status == 0 and count > 0
    report(f"- gpu tests: {count} collected" + ("" if fine else f", pytest ended with status {status}\n{tail(output)}"))
    compile_ = ["tests/test_triton_compile.py", "-k", "a_new_length"]  # the rest of that file is for `make test`
    status, output = run([sys.executable, "-m", "pytest", *compile_], 300, TRITON_INTERPRET="0")
    compiled = status == 0 and " passed" in output
    report(
        "- Triton kernels, forward and backward, for sm_90: "
        + ("compiled" if compiled else f"status {status}\n{tail(output)}")
    )
    compiled = dry_run_cuda(report) and compiled
    with (out / "plan.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "op", "case", "dtype"])
        writer.writerows([part, job.op, job.case, job.dtype] for part, jobs in parts.items() for job in jobs)
    for part, jobs in parts.items():
        report(f"- {part}: {len(jobs)} cases planned")
    report("- proven.json: not touched by a dry run")
    return fine and compiled


def dry_run_cuda(report: Report) -> bool:
    """The CUDA C++ kernels as far as this machine goes: one of them compiled, where nvcc is. False if that failed."""
    report("- sanitizer: compute-sanitizer's " + ", ".join(SANITIZER_CHECKS) + " planned")
    if not shutil.which("nvcc"):
        report("- CUDA C++ kernels: not compiled here: no nvcc")
        return True
    command = [sys.executable, "-m", "pytest", "tests/test_cuda_compile.py"]  # all of them: make test-cuda
    status, output = run(command, 300)
    fine = status == 0 and " passed" in output
    verdict = "rope compiled for every target" if fine else f"status {status}\n{tail(output)}"
    report(f"- CUDA C++ kernels: {verdict}")
    return fine


def main() -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-proof-results"))
    parser.add_argument("--part", help="build, tests-<op>, sanitizer, bench-...; default: all in turn")
    parser.add_argument("--seconds", type=float, default=PART_SECONDS, help="the limit of a part")
    parser.add_argument("--dry", action="store_true", help="everything but the GPU")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    parts = benchmark_parts()
    checks = {part: functools.partial(run_tests, part) for part in TESTS} | {"sanitizer": run_sanitizer}
    if args.part and args.part not in ("build", *checks, *parts):
        parser.error(f"--part must be build, {', '.join((*checks, *parts))}; got {args.part}")

    import torch

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out / (f"report-{args.part}.md" if args.part else "report.md"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    report(f"# gpu-proof{' (dry)' if args.dry else ''}: {device}, torch {torch.__version__}, commit {commit()}")
    report(f"Python {platform.python_version()}, {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC\n")
    if not args.dry and device == "no GPU":
        report("No CUDA device: nothing can be proven here. DRY=1 does all but the GPU.")
        return 2
    build(report, args.seconds - (time.monotonic() - start))
    if args.dry:
        fine = dry_run(parts, out, report)
    elif args.part == "build":
        fine = True
    else:
        seconds, fine = args.seconds - (time.monotonic() - start if args.part else 0), True
        for part in (*checks, *parts) if args.part is None else (args.part,):
            done = (
                checks[part](out, seconds, report)
                if part in checks
                else run_benchmarks(part, parts[part], out, seconds, report)
            )
            fine = done and fine
        report(
            "\nProven so far: " + (", ".join(sorted(json.loads(PROVEN.read_text()))) if PROVEN.exists() else "")
            or "nothing"
        )
    report(f"\n{'Passed' if fine else 'NOT all passed'}; everything is in {out}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

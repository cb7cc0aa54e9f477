"""Compiles the CUDA C++ kernels for every GPU target, where nvcc is: no warnings, no spills, 16-byte accesses.

Tiles of float32 may spill up to 32 registers: 3xTF32 holds every number twice, at the limit of 255 registers.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc")
TARGETS = {"80": "sm_80,compute_80", "89": "sm_89", "90a": "sm_90a"}  # as in setup.py
FEW_BYTES = 128  # of stack
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)  # the longest first

pytestmark = pytest.mark.skipif(not NVCC, reason="no nvcc")


def test_the_targets_are_those_of_the_build():
    assert f"GPU_TARGETS = {TARGETS}".replace("'", '"') in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, tmp_path):
    if source.stem != "rope" and "XFORMER_FAST_COMPILE_CUDA" not in os.environ:
        pytest.skip("takes minutes: make compile-cuda")
    gencode = [f"-gencode=arch=compute_{arch},code=[{code}]" for arch, code in TARGETS.items()]
    command = [NVCC, "-c", "-std=c++17", "-O3", "-Xptxas", "-v", "--Werror", "all-warnings", "-keep", *gencode, source]
    done = subprocess.run(
        [*command, "-o", tmp_path / "kernel.o"], cwd=tmp_path, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr
    entries = re.findall(r"Compiling entry function '(\S+)' for '(\w+)'", done.stderr)
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(entries) == len(usage) > 0 and {arch for _, arch in entries} == {f"sm_{arch}" for arch in TARGETS}
    numbers_of = {entry: [int(n) for n in numbers] for entry, numbers in zip(entries, usage, strict=True)}
    for (name, arch), numbers in numbers_of.items():
        fine = numbers[0] <= FEW_BYTES if "ShapeIf" in name else not any(numbers)
        assert fine, f"{name} on {arch} spills {numbers}"

    text = next(tmp_path.glob("*compute_80*.ptx")).read_text()
    assert re.search(r"ld\.\S*v4\.[ubf]\S+|cp\.async\.cg\.shared\.global", text)
    assert re.search(r"st\.\S*v4\.[ubf]\S+", text)

"""Compiles the CUDA C++ kernels to sm_80 and sm_90a, where nvcc is: no warnings, no spills, 16-byte accesses."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc")
TARGETS = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

pytestmark = pytest.mark.skipif(not NVCC, reason="no nvcc")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, tmp_path):
    command = [NVCC, "-c", "-std=c++17", "-O3", "-Xptxas", "-v", "--Werror", "all-warnings", *TARGETS, source]
    done = subprocess.run(
        [*command, "-o", tmp_path / "kernel.o"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(usage) >= 2 and set(usage) == {("0", "0", "0")}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_reads_and_writes_16_bytes(source, tmp_path):
    done = subprocess.run(
        [NVCC, "-ptx", "-std=c++17", "-O3", "-arch=compute_80", source, "-o", tmp_path / "kernel.ptx"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "kernel.ptx").read_text()
    assert "ld.global" in text or "ld.v4" in text
    assert re.search(r"ld\.\S*v4\.[ubf]\S+", text) and re.search(r"st\.\S*v4\.[ubf]\S+", text)

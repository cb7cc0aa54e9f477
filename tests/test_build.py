"""What the build leaves behind: symbols, instruction sets, registers in hot loops, wheels, installs without tools."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from xformer_fast import build_info

ROOT = Path(__file__).resolve().parent.parent
ISAS = ["portable", "avx2", "avx512", "avx512_bf16"]
OBJECTS = next(iter(ROOT.glob(f"build/temp.*-{sys.implementation.cache_tag}")), None)
needs_kernels = pytest.mark.skipif(not build_info.isa_levels(), reason="the C++ kernels were not built")
needs_objects = pytest.mark.skipif(not OBJECTS, reason="no object files: the build was made elsewhere")
needs_binutils = pytest.mark.skipif(not shutil.which("objdump"), reason="no binutils")
x86 = pytest.mark.skipif(len(build_info.isa_levels()) < 2, reason="x86 has several instruction sets")

USE = """
import torch, xformer_fast
q, k, v = torch.randn(3, 1, 2, 50, 16, dtype=torch.float32).unbind()
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
assert (xformer_fast.attention(q, k, v) - expected).abs().max() < 1e-5
print(xformer_fast.__file__)
print(xformer_fast.info())
"""


def run(*command, cwd=ROOT, **environment) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XFORMER_FAST_ISA")}
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=cwd, env={**env, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command[:4]} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def pip(*arguments, **environment):
    quiet = ("--disable-pip-version-check", "-qq")
    return run(sys.executable, "-m", "pip", *quiet, *arguments, "--no-build-isolation", "--no-deps", **environment)


def kernel_objects(isa: str) -> list[Path]:
    objects = sorted((OBJECTS / isa).rglob("*.o"))
    assert objects, f"no object files for {isa}"
    return objects


@needs_objects
@needs_binutils
@pytest.mark.parametrize("isa", ISAS[: max(1, len(build_info.isa_levels()))])
def test_kernels_of_one_instruction_set_share_nothing(isa):
    """A weak symbol (an inline or template function) could be linked in the copy that old CPUs cannot run."""
    for path in kernel_objects(isa):
        for line in run("nm", "-C", "--defined-only", "--extern-only", path).splitlines():
            _, kind, name = line.split(maxsplit=2)
            assert kind in "TDRB" and f"xformer_fast::{isa}::" in name, f"{path.name} exports {line}"


@x86
@needs_objects
@needs_binutils
def test_code_for_every_cpu_uses_no_avx():
    ours = [*OBJECTS.glob("csrc/cpu/*_launcher.o"), *OBJECTS.glob("csrc/*.o")]
    for path in [*kernel_objects("portable"), *ours]:
        assert not re.search(r"%[yz]mm", run("objdump", "-d", "--no-show-raw-insn", path)), path


@needs_kernels
@needs_binutils
def test_operator_library_stands_alone():
    """No Python symbol, so it serves every Python; no OpenMP of its own, which would ignore torch's thread count."""
    library = ROOT / "xformer_fast" / "_ops.so"
    assert not re.findall(r" _?Py\w+", run("nm", "-D", library))
    needed = re.findall(r"NEEDED +(\S+)", run("objdump", "-p", library))
    assert not [name for name in needed if "gomp" in name or "python" in name], needed


@needs_kernels
def test_instruction_sets(monkeypatch):
    levels, usable = build_info.isa_levels(), build_info.usable_isa_levels()
    assert levels == ISAS[: len(levels)]
    assert build_info.cpu_isa() == usable[-1]
    for level in usable:
        monkeypatch.setenv("XFORMER_FAST_ISA", level)
        assert build_info.selected_isa() == level
    monkeypatch.setenv("XFORMER_FAST_ISA", "another")
    assert build_info.selected_isa() == usable[-1]


@needs_kernels
def test_an_instruction_set_that_is_not_there_is_told():
    def warnings_at_import(level):
        environment = {**os.environ, "XFORMER_FAST_ISA": level}
        command = [sys.executable, "-c", "import xformer_fast"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr

    assert "XFORMER_FAST_ISA=avx3 is ignored" in warnings_at_import("avx3")
    assert "XFORMER_FAST_ISA" not in warnings_at_import("portable")


def hot_loops(disassembly: str):
    """(function, instructions) of every innermost loop that holds at least two multiply-adds."""
    for function in re.split(r"\n(?=[0-9a-f]+ <.*>:\n)", disassembly):
        name, *lines = function.strip().splitlines()
        places, jumps = {}, []
        for line in lines:
            match = re.match(r" *([0-9a-f]+):\t(.*)", line)
            if not match:
                continue
            place = int(match[1], 16)
            places[place] = match[2]
            if jump := re.match(r"j(?!mp)\w+ +([0-9a-f]+) ", match[2]):  # a jmp back may be a shared tail
                jumps.append((int(jump[1], 16), place))
        loops = [(start, end) for start, end in jumps if start <= end and start in places]
        for start, end in loops:
            if any((a, b) != (start, end) and start <= a and b <= end for a, b in loops):
                continue
            body = [text for place, text in places.items() if start <= place <= end]
            if sum(bool(re.match("vfn?m(add|sub)|vdpbf16ps", text)) for text in body) >= 2:
                yield name, body


@x86
@needs_objects
@needs_binutils
@pytest.mark.parametrize("isa", ISAS[1:])
def test_accumulators_stay_in_registers(isa):
    """A compiler that spills vectors inside a product loop costs a quarter of the speed."""
    hot = "tile_product" if isa == "avx2" else "tile_product|exponentials"  # 16 registers cannot hold exp2's constants
    products, spills = 0, set()
    for path in kernel_objects(isa):
        for name, body in hot_loops(run("objdump", "-d", "-C", "--no-show-raw-insn", path)):
            if not re.search(hot, name):
                continue
            products += 1
            if any(re.search(r"%[xyz]mm\d+.*\(%r[sb]p|\(%r[sb]p.*%[xyz]mm", text) for text in body):
                spills.add(f"{path.stem}: {name}")
    assert products >= 20, "the product loops were not found"
    assert not spills, "\n".join(sorted(spills))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", ".", "-w", folder, XFORMER_FAST_BUILD="require")
    return next(folder.glob("*.whl"))


@needs_kernels
def test_wheel_works_from_elsewhere(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"xformer_fast/_ops.so", "xformer_fast/kernels/attention.py", "xformer_fast/py.typed"} <= names
    assert any(name.startswith("xformer_fast/_build.") for name in names)
    tops = {name.split("/")[0].split("-")[0] for name in names}
    assert tops == {"xformer_fast"}, tops
    pip("install", "--target", tmp_path / "site", wheel)
    path, *lines = run(sys.executable, "-c", USE, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines()
    assert path.startswith(str(tmp_path))
    assert re.search(r"^attention +cpu +available$", "\n".join(lines), re.MULTILINE)


def test_install_without_a_compiler(tmp_path):
    pip("install", "--target", tmp_path / "site", ".", CXX="/nonexistent/g++", XFORMER_FAST_BUILD="try")
    output = run(sys.executable, "-c", USE, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert output.startswith(str(tmp_path))
    assert "no C++ compiler (/nonexistent/g++)" in output


def test_source_distribution_is_whole(tmp_path):
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", build, XFORMER_FAST_BUILD="skip")
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        kernels = archive.getmember(f"{archive.getnames()[0]}/xformer_fast/kernels/attention.py")
    assert kernels.isfile()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h")}
    assert sources | {"kernels/attention.py", "setup.py", "LICENSE", "Makefile", "requirements.txt"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.parametrize("installed", [True, False], ids=["hugging-face-kernels", "alone"])
@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_the_folder_kernels_hides_no_package(place, installed, tmp_path):
    """Hugging Face has a package named `kernels`, which transformers imports where it is installed."""
    pytest.importorskip("transformers")
    site = tmp_path / "site"
    site.mkdir()
    path = [str(site)]
    if installed:
        (site / "kernels").mkdir()
        (site / "kernels" / "__init__.py").write_text("__version__ = '0.0'\n")
    if place == "elsewhere":
        path.append(str(ROOT))
    program = "import transformers, xformer_fast, xformer_fast.kernels.attention\n"
    if installed:
        program += f"import kernels; assert kernels.__file__.startswith({str(site)!r}), kernels\n"
    run(sys.executable, "-c", program, cwd=ROOT if place == "root" else tmp_path, PYTHONPATH=os.pathsep.join(path))


def test_gpu_targets_can_be_chosen():
    code = (
        "import runpy, setuptools; setuptools.setup = lambda **_: None; print(runpy.run_path('setup.py')['NVCC_FLAGS'])"
    )
    flags = run(sys.executable, "-c", code, XFORMER_FAST_CUDA_ARCHS="90a", XFORMER_FAST_BUILD="skip")
    assert "code=[sm_90a]" in flags and "sm_80" not in flags
    every = run(sys.executable, "-c", code, XFORMER_FAST_CUDA_ARCHS="", XFORMER_FAST_BUILD="skip")
    assert all(f"[{target}]" in every for target in ("sm_80,compute_80", "sm_89", "sm_90a"))

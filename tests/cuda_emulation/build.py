"""Builds csrc/cuda for the emulated device: build/cuda_emulation/libemulated.so. Needs g++ and ninja, no CUDA.

python -m tests.cuda_emulation.build
"""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
KERNELS = ROOT / "csrc" / "cuda"
FOLDER = ROOT / "build" / "cuda_emulation"
LIBRARY = FOLDER / "libemulated.so"

FLAGS = "-std=c++17 -O2 -g1 -march=native -fPIC -fno-strict-aliasing -U_FORTIFY_SOURCE"
FLAGS += " -Wall -Wextra -Werror -Wno-unknown-pragmas"
# Calls around every access, and where the language is left: memory.cpp answers them, not the libraries of sanitizers.
WATCHED = "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow -Wno-tsan"
WATCHED += " --param=tsan-instrument-func-entry-exit=0"
EMULATED = f"{FLAGS} -I{HERE / 'include'} -I{KERNELS}"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11, as in setup.py

RULES = """
rule object
  command = ${compiler} -x c++ $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in
rule library
  command = ${compiler} -shared $in -o $out -ldl -lpthread $libraries
  description = $out
"""


def build() -> Path:
    """The library of all kernels, their operators and the device; what is up to date stays."""
    from torch.utils.cpp_extension import include_paths, library_paths

    launchers = " ".join([EMULATED, *(f"-isystem {path}" for path in include_paths()), STABLE_ABI])
    sources = _device()
    sources += [(path, f"{EMULATED} {WATCHED}") for path in sorted(KERNELS.glob("*.cu"))]
    sources += [(path, launchers) for folder in (KERNELS, HERE) for path in sorted(folder.glob("*_launcher.cpp"))]
    return _link(sources, LIBRARY, [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-ltorch"])


def build_planted() -> Path:
    """The library of the faulty kernels and a device of their own."""
    sources = _device()
    sources += [(path, f"{EMULATED} {WATCHED}") for path in sorted((HERE / "planted").glob("*.cu"))]
    return _link(sources, FOLDER / "libplanted.so", [])


def _device() -> list[tuple[Path, str]]:
    return [(path, EMULATED) for path in sorted(HERE.glob("*.cpp")) if not path.stem.endswith("_launcher")]


def _link(sources: list[tuple[Path, str]], library: Path, libraries: list[str]) -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "g++")
    lines, objects = [RULES.replace("${compiler}", compiler)], []
    for source, flags in sources:
        objects.append(f"{library.stem}/{source.name}.o")
        lines.append(f"build {objects[-1]}: object {source}\n  flags = {flags}")
    lines.append(f"build {library.name}: library {' '.join(objects)}")
    lines.append(f"  libraries = {' '.join(libraries)}\n")
    rules = FOLDER / f"{library.stem}.ninja"
    with (FOLDER / "lock").open("w") as lock:  # processes of one test run come here at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        rules.write_text("\n".join(lines))
        ninja = Path(sys.executable).parent / "ninja"
        command = [str(ninja) if ninja.exists() else "ninja", "--quiet", "-f", rules.name]
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulated kernels were not built:\n{done.stdout[-6000:]}{done.stderr[-2000:]}")
    if done.stdout.strip():
        print(done.stdout.strip())
    return library


if __name__ == "__main__":
    print(build())

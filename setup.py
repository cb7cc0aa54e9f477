"""Builds csrc/ with ninja through torch's extension tooling, and nothing else.

Two libraries: `xformer_fast/_ops.so`, the operators, on LibTorch's stable ABI (torch 2.11 and later, no Python
symbols), and `xformer_fast/_build`, a small pybind11 module of build and CPU facts. The kernels in csrc/cpu are
compiled once an instruction set and linked together; the best one is chosen at run time. Under a CUDA build of torch,
where nvcc is, those in csrc/cuda are compiled once for all GPU architectures and linked into the operators as well;
XFORMER_FAST_CUDA=0 leaves them out, XFORMER_FAST_CUDA=1 builds them under any torch (nothing but a GPU can run them).
XFORMER_FAST_CUDA_ARCHS=90a, or "80 89", builds for these alone.

Where the build tools are missing or fail, the install still succeeds and leaves `build_failure.txt` in the package,
which `xformer_fast.info()` shows. XFORMER_FAST_BUILD=require makes a failure, and any compiler warning, fatal;
XFORMER_FAST_BUILD=skip builds nothing.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("XFORMER_FAST_BUILD", "try")  # try | require | skip
CXX = os.environ.setdefault("CXX", "g++")

WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi", *(["-Werror"] if MODE == "require" else [])]
KERNEL_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-ffp-contract=fast"]
KERNEL_FLAGS += ["-fvisibility=hidden", "-fira-region=one"]  # the latter: keeps accumulators in registers (g++ 12)
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-march=x86-64-v4"],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
}
EXTRA_FLAGS = os.environ.get("XFORMER_FAST_CXXFLAGS", "").split()  # last on every line: for sanitizers
if EMULATION := os.environ.get("XFORMER_FAST_EMULATE_AVX512"):  # a header: see tests/avx512_emulation
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-include", EMULATION]
    ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-DXF_EMULATE_BF16"]
    EXTRA_FLAGS.append("-DXF_EMULATED_ISA")
CPU = Path("csrc") / "cpu"
HEADERS = sorted(str(path) for path in CPU.glob("*.h"))  # relative to setup.py, which runs in its folder
CUDA = Path("csrc") / "cuda"
CUDA_HEADERS = [*HEADERS, *sorted(str(path) for path in CUDA.glob("*.*h"))]
GPU_TARGETS = {"80": "sm_80,compute_80", "89": "sm_89", "90a": "sm_90a"}  # PTX for whatever comes later
GPU_ARCHS = os.environ.get("XFORMER_FAST_CUDA_ARCHS", "").replace(",", " ").split() or list(GPU_TARGETS)
if unknown := [arch for arch in GPU_ARCHS if arch not in GPU_TARGETS]:
    raise SystemExit(f"xformer_fast: XFORMER_FAST_CUDA_ARCHS must be of {', '.join(GPU_TARGETS)}; got {unknown[0]}")
NVCC_FLAGS = ["-O3", "-std=c++17", *(["--Werror", "all-warnings"] if MODE == "require" else [])]
NVCC_FLAGS += [f"-gencode=arch=compute_{arch},code=[{GPU_TARGETS[arch]}]" for arch in GPU_ARCHS]
if (spare := (os.cpu_count() or 1) // len(list(CUDA.glob("*.cu")))) > 1 and len(GPU_ARCHS) > 1:
    NVCC_FLAGS += ["--threads", str(min(spare, len(GPU_ARCHS)))]  # ninja compiles all files at once; a target a thread
LAUNCHER_SOURCES = sorted(path.name for path in CPU.glob("*_launcher.cpp"))  # compiled once, with torch's headers
KERNEL_SOURCES = sorted({path.name for path in CPU.glob("*.cpp")} - {*LAUNCHER_SOURCES, "ceiling.cpp"})  # once an ISA
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11


def missing_tool() -> str | None:
    """The first thing the build needs and this machine lacks, or None."""
    try:
        import pybind11  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        return f"the Python package {error.name} is not installed (install it, then build with --no-build-isolation)"
    if shutil.which(CXX.split()[0]) is None:
        return f"no C++ compiler ({CXX})"
    if shutil.which("ninja") is None:
        return "no ninja"
    return None


def cuda_home() -> str | None:
    """Where CUDA's tools are, if the GPU kernels are to be built: never decided by whether there is a GPU."""
    import torch
    from torch.utils import cpp_extension

    if os.environ.get("XFORMER_FAST_CUDA", "1" if torch.version.cuda else "0") != "1":
        return None
    if cpp_extension.CUDA_HOME is None and (nvcc := shutil.which("nvcc")):  # a CPU build of torch does not look for it
        homes = (Path(nvcc).resolve().parent.parent, Path("/usr/local/cuda"))
        whole = [str(home) for home in homes if (home / "include" / "cuda_runtime.h").exists()]
        cpp_extension.CUDA_HOME = whole[0] if whole else None
    home = cpp_extension.CUDA_HOME  # may be a runtime without a compiler
    return home if home and (Path(home) / "bin" / "nvcc").exists() else None


def with_leave_to_fail(command: type[build_ext], problem: str | None) -> type[build_ext]:
    """`command`, but a failure leaves its reason in the package in place of libraries."""

    class Build(command):
        def run(self):
            package = (ROOT if self.inplace else Path(self.build_lib)) / "xformer_fast"
            failure = package / "build_failure.txt"
            failure.unlink(missing_ok=True)
            reason = problem
            if not reason:
                try:
                    return super().run()
                except Exception as error:  # whatever the compiler or linker stumbled over
                    if MODE == "require":
                        raise
                    reason = f"the build failed: {error}"
            for stale in package.glob("*.so"):
                stale.unlink()
            package.mkdir(parents=True, exist_ok=True)
            failure.write_text(f"{reason}\n")
            print(f"xformer_fast: built without C++ kernels: {reason}", file=sys.stderr)

    return Build


def kernels_per_isa(command: type[build_ext]) -> type[build_ext]:
    """`command`, but the operator library is linked with the kernels compiled once an instruction set."""
    isas = list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["portable"]

    class Build(command):
        def finalize_options(self):
            super().finalize_options()  # an editable install would compile everything anew in a temporary folder
            self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

        def build_extensions(self):
            self.compiler.set_executable("compiler_so", [CXX])  # not the flags this Python happened to be built with
            super().build_extensions()

        def build_extension(self, extension):
            if extension.name.endswith("_ops"):
                extension.extra_objects = [object_ for isa in isas for object_ in self.kernel_objects(isa)]
                if cuda_home():
                    extension.extra_objects += self.gpu_objects()
                extension.depends = [*extension.depends, *extension.extra_objects]  # other flags: linked anew
            super().build_extension(extension)

        def kernel_objects(self, isa: str) -> list[str]:
            flags = [*KERNEL_FLAGS, *WARNINGS, *ISA_FLAGS[isa]]
            return self.compiler.compile(
                [str(CPU / name) for name in KERNEL_SOURCES],
                output_dir=str(Path(self.build_temp) / isa),
                include_dirs=[str(ROOT / CPU)],
                extra_postargs={"cxx": [*flags, f"-DXFORMER_FAST_ISA={isa}", *EXTRA_FLAGS]},
                depends=HEADERS,
            )

        def gpu_objects(self) -> list[str]:
            return self.compiler.compile(
                [str(path) for path in sorted(CUDA.glob("*.cu"))],
                output_dir=str(Path(self.build_temp) / "cuda"),
                extra_postargs={"cxx": [], "nvcc": NVCC_FLAGS},
                depends=CUDA_HEADERS,
            )

        def get_ext_filename(self, name):  # the operators are no Python module: one file for every Python
            return name.replace(".", "/") + ".so" if name.endswith("_ops") else super().get_ext_filename(name)

    return Build


def extensions() -> tuple[list[Extension], type[build_ext]]:
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    theirs = [f"-isystem{path}" for path in (*include_paths(), pybind11.get_include())]  # spared our warnings
    host_flags = ["-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", *WARNINGS, *theirs]
    launchers, gpu_flags, gpu_libraries = [str(CPU / name) for name in LAUNCHER_SOURCES], [], []
    if home := cuda_home():
        launchers += [str(path) for path in sorted(CUDA.glob("*_launcher.cpp"))]
        gpu_flags = [f"-isystem{home}/include", f"-I{ROOT / CUDA}"]
        gpu_libraries = [f"-L{home}/lib64", "-lcudart_static", "-ldl", "-lrt", "-pthread"]
        # No symbol of libtorch itself is wanted, which loads the one that knows CUDA's streams: keep it all the same.
        gpu_libraries += ["-Wl,--no-as-needed", "-ltorch"]
    operators = CppExtension(
        "xformer_fast._ops",
        launchers,
        extra_compile_args={"cxx": [*host_flags, STABLE_ABI, *gpu_flags, *EXTRA_FLAGS]},
        extra_link_args=gpu_libraries,
        depends=CUDA_HEADERS,
        py_limited_api=True,  # links no Python library
    )
    facts = Extension(
        "xformer_fast._build",
        ["csrc/module.cpp", str(CPU / "ceiling.cpp")],
        language="c++",
        extra_compile_args=[*host_flags, *EXTRA_FLAGS],
        extra_link_args=["-pthread"],
        depends=HEADERS,
    )
    return [operators, facts], kernels_per_isa(BuildExtension.with_options(use_ninja=True))


os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a venv's ninja
problem = "XFORMER_FAST_BUILD=skip" if MODE == "skip" else missing_tool()
if problem and MODE == "require":
    raise SystemExit(f"xformer_fast: cannot build the C++ kernels: {problem}")
modules, command = ([Extension("xformer_fast._ops", [])], build_ext) if problem else extensions()
setup(ext_modules=modules, cmdclass={"build_ext": with_leave_to_fail(command, problem)})

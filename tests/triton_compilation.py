"""Compiles launches of Triton kernels to sm_80 and sm_90 machine code, without a GPU, exactly as a launch there would.

A stand-in for Triton's driver names the target, and launches stop after compilation.
"""

import contextlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

MOST_BLOCKS = 65_535  # of a grid along its second and third axis
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # bytes a block may have
# What ptxas makes of PTX (a test says so). To disassemble every kernel would take longer than to compile it.
MACHINE_NAMES = {r"\bwgmma\.mma_async\b": "HGMMA", r"\bmma\.sync\b": "HMMA", r"\bcp\.async\.c[ag]\b": "LDGSTS"}


class Driver:
    """What compilation asks of Triton's driver; one device number an architecture keeps their caches apart."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def compiling(arch: int, *modules, only: str = "", **attributes):
    """Yields the list of (kernel name, compiled kernel) of the launches inside, which `modules` make, or of those of
    the kernel `only`; `attributes` are the answers of those functions of theirs that ask a device."""
    compiled, run = [], triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **keywords):
        assert all(blocks <= MOST_BLOCKS for blocks in grid[1:]), f"{self.__name__}: a grid of {grid}"
        if only in ("", self.__name__):
            compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **keywords)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", compile_only)
        for module in modules:
            if hasattr(module, "launch_context"):
                patch.setattr(module, "launch_context", lambda tensor: contextlib.nullcontext())
            for name, value in attributes.items():
                if hasattr(module, name):
                    patch.setattr(module, name, lambda device, value=value: value)
        patch.setattr(triton.runtime.driver, "_active", Driver(arch))
        yield compiled


def disassemble(kernel, *options: str) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
        command = [tools / "cuobjdump", *options, file.name]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def narrow_products(kernel) -> list[str]:
    """Lines of Triton's own code that multiply the stride of a View, or of a map, in 32 bits: such an offset wraps past
    2^31 elements."""
    code = kernel.asm["ttir"]
    arguments = re.findall(r'%(\w+): (\S+) [^%]*?loc\("(\w+)"', code[code.index("tt.func public") :].split("\n")[0])
    tensors = {name for _, kind, name in arguments if kind.startswith("!tt.ptr")} - {"terms", "statistics"}
    strides = {argument for argument, kind, name in arguments if name in tensors and kind == "i32"}
    found = []
    for line in code.splitlines():
        if spread := re.match(r"\s*%(\w+) = tt\.(?:splat|broadcast|expand_dims) %(\w+)", line):
            strides |= {spread[1]} if spread[2] in strides else set()
        product = re.match(r"\s*%\w+ = arith\.muli %(\w+), %(\w+) : (?:i32|tensor<[0-9x]*xi32>)", line)
        if product and strides & set(product.groups()):
            found.append(line.strip())
    return found


def resources(compiled: list) -> list[dict]:
    """Registers, bytes of stack and shared memory, instructions of MACHINE_NAMES and narrow products of each kernel."""
    rows = []
    for name, kernel in compiled:
        usage = re.findall(r"(REG|STACK|LOCAL):(\d+)", disassemble(kernel, "-res-usage"))
        used = {machine for ptx, machine in MACHINE_NAMES.items() if re.search(ptx, kernel.asm["ptx"])}
        row = {"kernel": name, "shared": kernel.metadata.shared, "asynchronous": "LDGSTS" in used}
        row["matrix"], row["narrow"] = sorted(used - {"LDGSTS"}), narrow_products(kernel)
        rows.append({**row, **{field: int(number) for field, number in usage}})
    return rows

"""The maps of csrc/cuda/hopper.cuh against their description in the PTX ISA 9.0, and a kernel made of them compiled.

The descriptions are written down here as that document has them, as tables and rules, never as the header's formulas.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NONE, BYTES128, BYTES64, BYTES32 = range(4)  # "Matrix Descriptor Format": values of bits 62-63
SPAN = {BYTES128: 128, BYTES64: 64, BYTES32: 32}

# "Swizzling Modes": of eight 16-byte units a line of 128 bytes, the document prints which unit stands where; the
# pattern repeats after 1024, 512 and 256 bytes.
PATTERNS = {
    BYTES128: [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 3, 2, 5, 4, 7, 6],
        [2, 3, 0, 1, 6, 7, 4, 5],
        [3, 2, 1, 0, 7, 6, 5, 4],
        [4, 5, 6, 7, 0, 1, 2, 3],
        [5, 4, 7, 6, 1, 0, 3, 2],
        [6, 7, 4, 5, 2, 3, 0, 1],
        [7, 6, 5, 4, 3, 2, 1, 0],
    ],
    BYTES64: [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 3, 2, 5, 4, 7, 6],
        [2, 3, 0, 1, 6, 7, 4, 5],
        [3, 2, 1, 0, 7, 6, 5, 4],
    ],
    BYTES32: [[0, 1, 2, 3, 4, 5, 6, 7], [1, 0, 3, 2, 5, 4, 7, 6]],
}


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no g++")
    library = tmp_path_factory.mktemp("hopper") / "maps.so"
    source = ROOT / "tests" / "cuda_emulation" / "hopper" / "maps.cpp"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc' / 'cuda'}"]
    subprocess.run(["g++", *flags, source, "-o", library], check=True)
    maps = ctypes.CDLL(str(library))
    maps.hopper_matrix_descriptor.restype = maps.hopper_rows_descriptor.restype = ctypes.c_uint64
    maps.hopper_swizzled.restype = ctypes.c_uint32
    maps.hopper_tile_map.restype = ctypes.c_char_p
    pointer, word = ctypes.c_void_p, ctypes.c_uint32
    maps.hopper_tile_map.argtypes = [ctypes.c_uint64, ctypes.c_int, pointer, pointer, word, word, pointer]
    return maps


@pytest.mark.parametrize("mode", PATTERNS)
def test_swizzles(maps, mode):
    for unit in range(256):
        line, place = divmod(unit, 8)
        pattern = PATTERNS[mode]
        expected = 128 * line + 16 * pattern[line % len(pattern)].index(place)
        for byte in (0, 15):
            assert maps.hopper_swizzled(16 * unit + byte, mode) == expected + byte
    assert maps.hopper_swizzled(12345, NONE) == 12345


def test_swizzles_are_those_of_the_sm80_tiles(maps):
    """Rows of 128 bytes: unit c of row r stands at c ^ r % 8 in both, so that one tile serves ldmatrix and wgmma."""
    for row in range(16):
        for unit in range(8):
            assert maps.hopper_swizzled(128 * row + 16 * unit, BYTES128) == 128 * row + 16 * (unit ^ row % 8)


def fields(descriptor: int) -> dict[str, int]:
    """ "Matrix Descriptor Format": matrix-descriptor-encode(x) = (x & 0x3FFFF) >> 4."""
    bits = {"start": (0, 14), "leading": (16, 14), "stride": (32, 14), "base": (49, 3), "swizzle": (62, 2)}
    rest = descriptor
    for low, width in bits.values():
        rest &= ~((2**width - 1) << low)
    assert rest == 0, "a reserved bit is set"
    return {name: descriptor >> low & (2**width - 1) for name, (low, width) in bits.items()}


def test_matrix_descriptors(maps):
    got = fields(maps.hopper_matrix_descriptor(0x1C400, BYTES64, 4096, 512))
    assert got == {"start": 0x1C400 >> 4, "leading": 256, "stride": 32, "base": 0, "swizzle": 2}
    for mode, span in SPAN.items():
        for depth in range(0, span // 2, 16):
            got = fields(maps.hopper_rows_descriptor(0x2000, mode, depth))
            start = (0x2000 + 2 * depth) >> 4
            assert got == {"start": start, "leading": 1, "stride": 8 * span >> 4, "base": 0, "swizzle": mode}


@pytest.mark.parametrize("mode", SPAN)
def test_rows_descriptors_find_their_elements(maps, mode):
    """ "Strides", K-major: from one row of eight to the next a swizzle's span, from eight rows to the next the stride
    byte offset, from the start address on; then the swizzle, of the address's bits."""
    span, tile = SPAN[mode], 0x2000
    for depth in range(0, span // 2, 16):
        got = fields(maps.hopper_rows_descriptor(tile, mode, depth))
        for row in range(64):
            for k in range(16):
                address = 16 * got["start"] + row // 8 * 16 * got["stride"] + row % 8 * span + 2 * k
                lies = tile + maps.hopper_swizzled(row * span + 2 * (depth + k), mode)  # where copy_box puts it
                assert maps.hopper_swizzled(address, mode) == lies


def test_accumulators(maps):
    """ "Register Fragments", D of wgmma.m64nNk16: row and column of d[i] in a thread."""
    seen = set()
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(32):
            row = 16 * warp + lane // 4 + (8 if i % 4 >= 2 else 0)
            column = 8 * (i // 4) + 2 * (lane % 4) + (i & 1)
            assert (maps.hopper_accumulator_row(thread, i), maps.hopper_accumulator_column(thread, i)) == (row, column)
            seen.add((row, column))
    assert len(seen) == 64 * 64


def tile_map(maps, shape, strides, rows=64, mode=BYTES128, address=0x7F0000000000):
    numbers = (ctypes.c_uint64 * 13)()
    sizes, steps = (ctypes.c_uint64 * 4)(*shape), (ctypes.c_uint64 * 3)(*strides)
    problem = maps.hopper_tile_map(address, 2, sizes, steps, rows, mode, numbers)
    return None if problem is None else problem.decode(), list(numbers)


def test_tile_maps(maps):
    """cuTensorMapEncodeTiled: sizes and box in elements, strides of the outer axes in bytes."""
    problem, numbers = tile_map(maps, (128, 4096, 8, 2), (8 * 128, 128, 4096 * 8 * 128))
    assert problem is None
    assert numbers[:4] == [128, 4096, 8, 2]
    assert numbers[4:8] == [64, 64, 1, 1]  # a row of the box is a row of the swizzle
    assert numbers[9:12] == [2048, 256, 2 * 4096 * 8 * 128]
    assert numbers[12] == 64 * 128


@pytest.mark.parametrize(
    "change, why",
    [
        ({"address": 0x7F0000000008}, "begins at no multiple of 16"),
        ({"shape": (128, 0, 8, 2)}, "an axis has none"),
        ({"strides": (8 * 128 + 4, 128, 2**20)}, "a stride is no multiple of 16"),
        ({"strides": (2**40, 128, 2**20)}, "a stride is no multiple of 16 bytes below 2\\^40"),
        ({"rows": 257}, "a side of the box"),
        ({"rows": 0}, "a side of the box"),
    ],
)
def test_tile_maps_that_would_be_refused(maps, change, why):
    good = {"shape": (128, 4096, 8, 2), "strides": (8 * 128, 128, 4096 * 8 * 128)}
    problem, _ = tile_map(maps, **(good | change))
    assert problem and re.search(why, problem)


def test_phases(maps):
    """ "mbarrier": phases complete in turn, from parity 0 on; try_wait.parity(p) passes after the phase of parity p,
    until the next one of that parity is pending. A ring is played through, the producer as far ahead as it may be."""
    rounds, stages = 20, 3
    numbers = (ctypes.c_int * (3 * rounds))()
    maps.hopper_stages(rounds, numbers)
    completed = {kind: [0] * stages for kind in ("full", "empty")}  # phases of each barrier

    def passes(kind, index, parity):  # the last complete phase has that parity; before a barrier's first it is 1
        return (completed[kind][index] - 1) % 2 == parity

    produced = consumed = 0
    while consumed < rounds:
        while produced < rounds and passes("empty", numbers[3 * produced], numbers[3 * produced + 2]):
            assert produced - consumed < stages, "a buffer is filled before it was emptied"
            completed["full"][numbers[3 * produced]] += 1
            produced += 1
        index, parity = numbers[3 * consumed], numbers[3 * consumed + 1]
        assert index == consumed % stages
        assert produced > consumed and passes("full", index, parity), "a consumer waits for ever"
        completed["empty"][index] += 1
        consumed += 1


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_a_product_of_tiles_compiles_for_sm_90a(tmp_path):
    source = ROOT / "tests" / "cuda_emulation" / "hopper" / "product.cu"
    flags = ["-std=c++17", "-O3", "--Werror", "all-warnings", "-Xptxas", "-v", f"-I{ROOT / 'csrc' / 'cuda'}", "-keep"]
    command = ["nvcc", "-c", *flags, "-gencode=arch=compute_90a,code=sm_90a", source, "-o", tmp_path / "product.o"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores" in done.stderr
    text = (tmp_path / "product.ptx").read_text()
    for instruction in ("wgmma.mma_async", "mbarrier.try_wait.parity", "cp.async.bulk.tensor.4d"):
        assert instruction in text

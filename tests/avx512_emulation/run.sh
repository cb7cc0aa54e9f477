#!/bin/bash
# The kernels of AVX-512 and AVX-512-BF16, executed on a CPU that has AVX2 alone (avx512_emulation.h): the tests of the C++
# operators against a copy of the package built in build/avx512_emulation. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
copy=$PWD/build/avx512_emulation
mkdir -p "$copy"
cp -a csrc kernels xformer_fast setup.py pyproject.toml README.md LICENSE "$copy/"
rm -f "$copy"/xformer_fast/*.so
(
  cd "$copy"
  XFORMER_FAST_BUILD=require XFORMER_FAST_EMULATE_AVX512="$OLDPWD/tests/avx512_emulation/avx512_emulation.h" \
    "$python" setup.py -q build_ext --inplace > build.log 2>&1 || { grep -A12 'error' build.log | head -60; exit 1; }
)
PYTHONPATH="$copy:$PWD/tests" "$python" -P -m pytest -p no:cacheprovider --rootdir "$PWD" -k "avx512 or thread" "$@"

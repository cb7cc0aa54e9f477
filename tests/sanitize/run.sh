#!/bin/bash
# Random calls of the C++ operators, forward and backward, under AddressSanitizer and UBSan.
#   tests/sanitize/run.sh [number of calls]      PYTHON: the interpreter, default .venv's
# A copy of the package is built in build/sanitize; a second run rebuilds what changed.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
calls=${1:-2000}
copy=$PWD/build/sanitize
sanitizers="-fsanitize=address,undefined"

mkdir -p "$copy"
cp -a csrc kernels xformer_fast setup.py pyproject.toml README.md LICENSE "$copy/"
rm -f "$copy"/xformer_fast/*.so
echo "building with $sanitizers"
(
  cd "$copy"
  # The Python that loads the result is not built so: libasan comes first by LD_PRELOAD, and only our own code is watched.
  XFORMER_FAST_BUILD=require LDFLAGS="$sanitizers" \
    XFORMER_FAST_CXXFLAGS="-O1 -g1 -Wno-error -fno-omit-frame-pointer -fno-sanitize-recover=undefined $sanitizers" \
    "$python" setup.py -q build_ext --inplace > build.log 2>&1 || { tail -40 build.log; exit 1; }
)

compiler=${CXX:-g++}
LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  PYTHONPATH="$copy" "$python" tests/sanitize/fuzz.py --calls "$calls" --note "$copy/last_call.txt" || {
  status=$?
  echo "FAILED with status $status in this call:"
  cat "$copy/last_call.txt"
  exit "$status"
}
echo "clean: $calls calls under AddressSanitizer and UBSan"

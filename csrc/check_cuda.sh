#!/bin/sh
# Compiles the CUDA kernels for sm_80 and sm_90 with warnings as errors and fails if one of them keeps anything in local
# memory (stack frame or spills). Needs nvcc and torch's headers, no GPU.   csrc/check_cuda.sh [python]
set -eu
cd "$(dirname "$0")"
python="${1:-python}"
nvcc="${CUDA_HOME:+$CUDA_HOME/bin/}nvcc"
command -v "$nvcc" > /dev/null || { echo "check_cuda: no nvcc (set CUDA_HOME); nothing was checked" >&2; exit 3; }
include="$("$python" -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "include"))')"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
for source in cuda/*.cu; do
  report="$work/$(basename "$source").log"
  "$nvcc" -std=c++20 -O3 -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000 -Xcompiler -fPIC,-Wall,-Wextra,-Werror \
    --Werror all-warnings -Xptxas -v -isystem "$include" -isystem "$include/torch/csrc/api/include" \
    -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -c "$source" -o "$work/out.o" \
    > "$report" 2>&1 || { cat "$report" >&2; exit 1; }
  kernels="$(grep -c 'bytes stack frame' "$report")"
  if grep 'bytes stack frame' "$report" | grep -qv '0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads'; then
    echo "check_cuda: $source uses local memory:" >&2
    grep -B1 'bytes stack frame' "$report" >&2
    exit 1
  fi
  registers="$(sed -n 's/.*Used \([0-9]*\) registers.*/\1/p' "$report" | sort -n | tail -1)"
  echo "$source: $kernels kernels for sm_80 and sm_90, no warning, no local memory, at most $registers registers"
done

#!/usr/bin/env bash
# Every GPU test and benchmark. Needs torch with CUDA, triton and this package's dependencies.
#   benchmarks/gpu.sh            tests, operators, DiT and FLUX up to 4K, in under nine minutes
#   benchmarks/gpu.sh tests|windowed|linear|gated|dit|flux|flux-8k|memory-check    one part
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="src:${PYTHONPATH:-}"

tests() { timeout "${1:-540}" python -m pytest -m gpu tests/test_gpu.py; }
windowed() { timeout "${1:-540}" python benchmarks/gpu_windowed.py "${@:2}"; }
linear() { timeout "${1:-540}" python benchmarks/gpu_linear.py "${@:2}"; }
gated() { timeout "${1:-540}" python benchmarks/gpu_gated.py "${@:2}"; }
flux() { timeout "${1:-540}" python benchmarks/gpu_flux.py "${@:2}"; }
dit() { timeout "${1:-540}" python benchmarks/gpu_dit.py "${@:2}"; }
# Reads and writes out of bounds and races, on the kernels at one small size.
memory_check() {
  timeout 540 compute-sanitizer --tool memcheck --error-exitcode 1 python -m pytest -m gpu tests/test_gpu.py \
    -k "test_kernel_on_every_layout and 8 and bfloat16"
}

failed=0
# A part that fails or runs out of time says so, and the others go on: each checks its own results before it times them,
# and stores row by row what it has measured.
part() {
  local status=0
  "$@" || status=$?
  case "$status" in
    0) ;;
    124) echo "$1: out of time, run this part alone" >&2 ;;
    *) echo "$1: failed" >&2; failed=1 ;;
  esac
}

case "${1:-all}" in
  all)
    part tests 170
    part windowed 110 --sides 128 256 64 512 --seconds 0.2
    part linear 40 --seconds 0.2
    part gated 40 --seconds 0.2
    part dit 60
    part flux 110
    exit "$failed"
    ;;
  tests) tests ;;
  windowed) windowed 540 --flex-windows 8 16 32 ;;
  linear) linear ;;
  gated) gated ;;
  dit) dit 540 --seconds 5 ;;
  flux) flux ;;
  flux-8k) flux 540 --sides 512 ;;
  memory-check) memory_check ;;
  *) echo "unknown part $1: expected tests, windowed, linear, gated, dit, flux, flux-8k or memory-check" >&2; exit 2 ;;
esac

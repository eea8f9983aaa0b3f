#!/usr/bin/env bash
# Every GPU test and benchmark. Needs torch with CUDA, triton and this package's dependencies.
#   benchmarks/gpu.sh            tests, operators and FLUX up to 4K, in under nine minutes
#   benchmarks/gpu.sh tests|operators|gated|flux|flux-8k|memory-check    one part
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="src:${PYTHONPATH:-}"

tests() { timeout "${1:-540}" python -m pytest -m gpu tests/test_gpu.py; }
operators() { timeout "${1:-540}" python benchmarks/gpu_windowed.py "${@:2}"; }
flux() { timeout "${1:-540}" python benchmarks/gpu_flux.py "${@:2}"; }
gated() { timeout "${1:-540}" python benchmarks/gpu_gated.py "${@:2}"; }
others() { timeout "${1:-540}" python benchmarks/gpu.py --sides 64 128; }
# Reads and writes out of bounds and races, on the kernels at one small size.
memory_check() {
  timeout 540 compute-sanitizer --tool memcheck --error-exitcode 1 python -m pytest -m gpu tests/test_gpu.py \
    -k "test_kernel_on_every_layout and 8 and bfloat16"
}

out_of_time() {
  local status=$?
  test "$status" -eq 124 || exit "$status"
  echo "$1: out of time, run this part alone" >&2
}

case "${1:-all}" in
  all)
    # What has been measured is stored row by row, so that a part which runs out of time loses only its last rows.
    # A test that fails ends everything.
    tests 240 || out_of_time "tests"
    operators 130 --sides 128 256 64 512 --seconds 0.2 || out_of_time "operators"
    others 30 || out_of_time "other operators"
    gated 45 --sides 128 64 256 512 --seconds 0.1 || out_of_time "gated"
    flux 130 || out_of_time "flux"
    ;;
  tests) tests ;;
  operators) operators 540 --flex-windows 8 16 32 ;;
  gated) gated ;;
  flux) flux ;;
  flux-8k) flux 540 --sides 512 ;;
  memory-check) memory_check ;;
  *) echo "unknown part $1: expected tests, operators, gated, flux, flux-8k or memory-check" >&2; exit 2 ;;
esac

#!/usr/bin/env bash
# Every GPU test and benchmark. Needs torch with CUDA, triton, pytest-xdist and this package's dependencies; those that
# are not installed may lie in a folder named by PYTHONPATH.
#   benchmarks/gpu.sh            in under nine minutes: tests, operators, DiT, FLUX at 2K and 4K as it is, and with
#                                compiled blocks as far as the time goes
#   benchmarks/gpu.sh tests|windowed|linear|gated|dit|flux|flux-8k|memory-check    one part; flux has 1K as well
#   benchmarks/gpu.sh fla-flux|fla-dit-s|fla-linear    beside fla-core, gated at two shapes and linear: it tunes itself
#                                for minutes
# With OUT=folder the results go there instead of to benchmarks/results, and beside them the log and a list of the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -n "${OUT:-}" && -z "${LOGGED:-}" ]]; then
  mkdir -p "$OUT"
  LOGGED=1 benchmarks/gpu.sh "$@" 2>&1 | tee -a "$OUT/log"
  exit
fi
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# One for all: torch's compiler would set another, in the middle of a benchmark.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${HOME:-/tmp}/.triton/cache}"
output="${OUT:-benchmarks/results}"

# `limited SECONDS COMMAND...`; interrupted, and not its workers at the same time, pytest sums up what it has seen, for
# which it waits ten seconds for them.
limited() { timeout --foreground -s INT -k 30 "$@"; }
tests() {
  local workers
  workers=$(env -u OMP_NUM_THREADS nproc) # which takes that variable for an answer
  OMP_NUM_THREADS=1 limited "$1" python3 -m pytest -vv -m gpu -n "$workers" --dist worksteal \
    ${OUT:+"--junitxml=$OUT/tests.xml"} tests/test_gpu.py "${@:2}"
}
tests_without_fla() { tests "$1" --deselect tests/test_gpu.py::test_fla_agrees; }
benchmark() { limited "$1" python3 "benchmarks/gpu_$2.py" --output "$output" "${@:3}"; }
# Reads and writes out of bounds, of the windowed kernels at one window; not races, for which memcheck does not look.
# Without torch's pool of memory, in which what lies beyond the end of one tensor belongs to another and goes unseen.
memory_check() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 540 compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 \
    python3 -m pytest -m gpu tests/test_gpu.py -k "test_kernel_on_every_layout and 8 and bfloat16"
}

# Compiling takes longer than running, but what is compiled stays on the disk. So the benchmarks run once without
# measuring, all at once, before the first of them is timed. What Triton compiles depends on sizes only in whether they
# are multiples of 16, which the tokens of all sides are: one side does for linear and gated attention. What torch
# compiles, FlexAttention and FLUX's blocks, depends on every size but the number of blocks.
warm_up() {
  local side shape
  for side in 64 128 256 512; do compile "$1" windowed --sides "$side" --seconds 0; done
  for side in 128 256; do compile "$1" flux --sides "$side" --layers 1; done
  compile "$1" linear --sides 64 --seconds 0
  for shape in flux dit-s; do compile "$1" gated --shapes "$shape" --sides 64 --seconds 0; done
  compile "$1" dit --layers 1 --methods linear gated "gated, one way" --seconds 0
  wait
}
# FlexAttention at every window: one process after the other, that would take longer than there is.
warm_up_flex() {
  local side window
  for side in 64 128 256 512; do
    for window in 8 16 32; do
      compile "$1" windowed --sides "$side" --windows "$window" --flex-windows "$window" --seconds 0
    done
  done
  wait
}
compile() {
  (
    status=0 log="$scratch/$BASHPID.log"
    # There are more processes than cores.
    OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=2 \
      timeout -k 5 "$1" python3 "benchmarks/gpu_$2.py" --output "$scratch" "${@:3}" >"$log" 2>&1 || status=$?
    echo "compiled in $SECONDS s, status $status: ${*:2}"
    if ((status)); then tail -n 3 "$log"; fi
  ) &
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0
# `part END COMMAND...` runs a command, which takes a limit first, until so many seconds after the start. One that fails
# or runs out of time says so, and the others go on: each checks its own results before it times them, and stores row by
# row what it has measured.
part() {
  local status=0 name="${3:-$2}" left=$(($1 - SECONDS))
  "$2" "$((left > 0 ? left : 1))" "${@:3}" || status=$? # 0 would be no limit
  if ((status == 124 || (status == 137 && SECONDS >= $1))); then
    echo "$name: out of time, run this part alone" >&2
    if [[ $name == tests* ]]; then failed=1; fi
  elif ((status)); then
    echo "$name: failed with status $status" >&2
    failed=1
  fi
  echo "$name: until $SECONDS s" >&2
}

case "${1:-all}" in
  all)
    warm_up 210 &
    part 215 tests_without_fla
    wait
    part 335 benchmark windowed --seconds 0.2
    part 370 benchmark linear --seconds 0.2 --most-softmax-tokens 65536
    part 415 benchmark gated --seconds 0.2 --most-softmax-tokens 65536
    part 465 benchmark dit --seconds 0.5
    part 520 benchmark flux --sides 256 128
    exit "$failed"
    ;;
  tests) tests 540 ;;
  windowed)
    warm_up_flex 240
    benchmark $((540 - SECONDS)) windowed --flex-windows 8 16 32
    ;;
  linear | gated | flux) benchmark 540 "$1" ;;
  dit) benchmark 540 dit --seconds 5 ;;
  fla-flux | fla-dit-s) benchmark 540 gated --fla bare --shapes "${1#fla-}" --most-softmax-tokens 65536 ;;
  fla-linear) benchmark 540 linear --fla --cases "flux, image alone" --most-softmax-tokens 65536 ;;
  flux-8k) benchmark 540 flux --sides 512 ;;
  memory-check) memory_check ;;
  *)
    echo "unknown part $1: expected tests, windowed, linear, gated, dit, flux, flux-8k, memory-check, fla-flux, fla-dit-s" \
      "or fla-linear" >&2
    exit 2
    ;;
esac

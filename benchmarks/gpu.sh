#!/usr/bin/env bash
# Every GPU test and benchmark, in under nine minutes. Needs torch with CUDA and this package's dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="src:${PYTHONPATH:-}"
timeout 240 python -m pytest -m gpu tests/test_gpu.py
timeout 270 python benchmarks/gpu.py

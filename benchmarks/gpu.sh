#!/usr/bin/env bash
# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
#
# Runs the GPU benchmarks on a machine without a network: installs the wheels fetched by scripts/gpu_wheels.sh into a
# temporary folder, and runs benchmarks/gpu.py. Results go to $OUT (default: outputs/gpu): results.json, results.md, log.txt.
#
#     benchmarks/gpu.sh [--seconds 540] [--parts right,learns,fast,profile,scales]
#     benchmarks/gpu.sh --dry-run       # tiny shapes, also on a CPU
#
# Variables: WHEELS, the folder of the wheels (default: wheels/). PYTHON, the interpreter (default: python3). COMMIT, the
# measured commit if git is not available.
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=${WHEELS:-wheels}
python=${PYTHON:-python3}
out=${OUT:-outputs/gpu}
ls "$wheels"/*.whl > /dev/null || { echo "$wheels holds no wheels: run scripts/gpu_wheels.sh first." >&2; exit 2; }
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
    --target "$site" "$wheels"/*.whl
export PYTHONPATH=$site:$PWD${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
# All processes share the kernels that Triton compiles.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$site/triton}
"$python" -m benchmarks.gpu --out "$out" "$@"

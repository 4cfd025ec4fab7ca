#!/usr/bin/env bash
# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
#
# Fetches the wheels for a GPU machine without a network, about 25 MB, in the versions of constraints.txt:
#
#     scripts/gpu_wheels.sh [FOLDER] [PYTHON_VERSION]      # wheels/ and 3.12 by default
#
# The machine must have Python, CUDA builds of torch and triton, and the dependencies of transformers (numpy, tokenizers,
# safetensors, huggingface_hub, accelerate, pyarrow, pandas, pytest, ...). `benchmarks/gpu.sh` installs from the folder.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-wheels}
python_version=${2:-3.12}

names=(
    trl transformers datasets peft dill multiprocess # the trainer
    rapidfuzz aiolimiter tenacity # similarity, teachers
    genai-prices httpx2 httpcore2 truststore pydantic pydantic_core annotated-types typing-inspection typing_extensions # prices
    math-verify latex2sympy2_extended antlr4-python3-runtime # pass@1
    hjson # DeepSpeed's
)
versions=()
for name in "${names[@]}"; do
    # Package names may differ in dashes and underscores.
    version=$(grep -iE "^${name//[-_]/[-_]}==" constraints.txt) || { echo "$name is not in constraints.txt" >&2; exit 1; }
    versions+=("$version")
done
mkdir -p "$folder"
rm -f "$folder"/*.whl # two versions of one package would stop the install
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version "$python_version" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
    --dest "$folder" "${versions[@]}"
# DeepSpeed is published as source only. A wheel without prebuilt operators works with any Python.
python3 -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$folder" "$(grep '^deepspeed==' constraints.txt)"
du -sh "$folder"

#!/usr/bin/env bash
# ms-swift, verl and Megatron-Bridge themselves, from PyPI, trained on the CPU with every algorithm and compared with
# their own training without context parallelism. Makes .venv-frameworks (3 GB) on first use.
#
#   bash scripts/test_frameworks.sh [arguments for pytest]
#   bash scripts/test_frameworks.sh --table [--only FRAMEWORK ...]       runs it and prints the table of docs/frameworks.md
#
# With MINDSPEED_FOLDER and MINDSPEED_LLM_PATH (scripts/test_npu_contract.sh) the table has the rows of MindSpeed as well.
# PYTHON: the Python of the environment, 3.11. TORCH_INDEX_URL: an index of CPU wheels of torch, without which pip's own
# may bring a build for CUDA, 6 GB more. Transformer Engine is tests/frameworks/transformer_engine_on_cpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$PWD/.venv-frameworks inputs=tests/frameworks
python=$folder/bin/python
installed=$(cat constraints.txt "$inputs/requirements.txt" "$inputs/frameworks.txt")
pip() { "$python" -m pip "$1" --quiet --disable-pip-version-check "${@:2}"; }

if ! cmp --silent "$folder/installed.txt" - <<<"$installed"; then
  echo "== Making .venv-frameworks"
  "${PYTHON:-python3}" -m venv --clear "$folder"
  pip install "$(grep '^pip==' constraints.txt)"
  torch=$(grep '^torch==' constraints.txt)
  pip install ${TORCH_INDEX_URL:+-i "$TORCH_INDEX_URL" --no-deps} "$torch"
  pip install --constraint constraints.txt --requirement "$inputs/requirements.txt" numpy pytest torch
  pip install --no-deps --requirement "$inputs/frameworks.txt"
  echo "$installed" >"$folder/installed.txt"
fi

on_cpu() {
  env MINDSPEED_CP_DEVICE=cpu OMP_NUM_THREADS=1 CUDA_DEVICE_MAX_CONNECTIONS=1 \
    PYTHONPATH="$PWD:$PWD/$inputs:$PWD/tests/helpers" "$python" "$@"
}
if [ "${1:-}" != --table ]; then
  on_cpu -m pytest -q -p no:cacheprovider "$inputs" "$@"
  exit
fi
on_cpu "$inputs/parity.py" "${@:2}"
if [ "$#" = 1 ] && [ -n "${MINDSPEED_FOLDER:-}${MINDSPEED_LLM_PATH:-}" ]; then
  PYTHON='' LOSSES=1 bash scripts/test_npu_contract.sh
fi

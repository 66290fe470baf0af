#!/usr/bin/env bash
# The NPU's test bed: the unmodified torch_npu wheel on a machine without an NPU (tests/ascend/README.md).
#   bash scripts/test_npu_contract.sh [arguments of pytest]
# Installs torch_npu beside the environment that scripts/test.sh made (a folder of its own: import torch would load it),
# builds the stub of CANN there, and runs tests/ascend, all of it. Linux with gcc and binutils. Makes .venv where it is not.
#   TORCH_NPU=2.13.0          the release; the environment must hold the torch of the same number
#   MEGATRON_LM_FOLDER=DIR    a folder with Megatron-LM checkouts core_v0.12.1 and core_v0.16.1: their pretrain_gpt.py too,
#                             which needs pip install six regex pydantic
#   PYTHON=python             another environment than .venv
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
TORCH_NPU=${TORCH_NPU:-2.13.0}
if [ "$PYTHON" = .venv/bin/python ] && [ ! -x "$PYTHON" ]; then python3 scripts/environment.py dev; fi
prefix=$("$PYTHON" -c 'import sys; print(sys.prefix)')
export TORCH_NPU_FOLDER=${TORCH_NPU_FOLDER:-$prefix/torch_npu-$TORCH_NPU} OMP_NUM_THREADS=1
pip() { "$PYTHON" -m pip install -qq --disable-pip-version-check --no-deps "$@"; }
[ -d "$TORCH_NPU_FOLDER/torch_npu" ] || pip --target "$TORCH_NPU_FOLDER" "torch_npu==$TORCH_NPU"
[ -d "$prefix/megatron-core-0.12.1" ] || pip --target "$prefix/megatron-core-0.12.1" megatron-core==0.12.1
PYTHONPATH=tests/ascend "$PYTHON" -c 'import bed, sys; why = bed.missing(); why and sys.exit(f"test_npu_contract.sh: error: {why}"); bed.build()'
exec "$PYTHON" -m pytest -q -p no:cacheprovider --full tests/ascend "$@"

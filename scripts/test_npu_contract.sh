#!/usr/bin/env bash
# The NPU's test bed: the unmodified torch_npu wheel on a machine without an NPU (tests/ascend/README.md).
#   bash scripts/test_npu_contract.sh [arguments of pytest]
# Installs torch_npu beside the environment that scripts/test.sh made (a folder of its own: import torch would load it),
# builds the stub of CANN there, and runs tests/ascend, all of it. Linux with gcc and binutils. Makes .venv where it is not.
#   TORCH_NPU=2.7.1.post8     another release than 2.13.0; where .venv has another torch, .venv-npu-2.7.1 is made for it
#   MEGATRON_LM_FOLDER=DIR    a folder with Megatron-LM checkouts core_v0.12.1 and core_v0.16.1: their pretrain_gpt.py too,
#                             which needs pip install six regex pydantic
#   MINDSPEED_FOLDER=DIR      a folder in which the package of MindSpeed core_r0.16.0 lies: both in one process, in every order
#   MINDSPEED_LLM_PATH=LIST   folders of MindSpeed-LLM, its Megatron-LM, its MindSpeed and its packages, with : between
#   LOSSES=1                  print the rows of these two in the table of docs/frameworks.md instead
#   PYTHON=python             another environment than these
#   VERIFY=--quick            run scripts/verify_npu.sh on the bed instead, whole or with these options
#   TABLE=FILE.json           write this release's part of the table in docs/devices.md instead (tests/ascend/table.py)
set -euo pipefail
cd "$(dirname "$0")/.."

export TORCH_NPU=${TORCH_NPU:-2.13.0} OMP_NUM_THREADS=1
torch=${TORCH_NPU%%.post*}
pip() { "$PYTHON" -m pip install -qq --disable-pip-version-check "$@"; }
has_torch() { [ -x "$1" ] && [ "$("$1" -c 'import importlib.metadata as m; print(m.version("torch").split("+")[0])')" = "$torch" ]; }

if [ -z "${PYTHON:-}" ]; then
  PYTHON=.venv/bin/python
  [ -x "$PYTHON" ] || python3 scripts/environment.py dev
  if ! has_torch "$PYTHON"; then
    PYTHON=.venv-npu-$torch/bin/python
    if ! has_torch "$PYTHON"; then
      python3 -m venv ".venv-npu-$torch"
      # Without what it asks for: PyPI's torch of that time is the CUDA build, and NVIDIA's libraries are gigabytes.
      pip --no-deps "torch==$torch" megatron-core==0.16.1
      pip numpy pyyaml pytest hypothesis einops sympy networkx jinja2 fsspec filelock typing_extensions packaging rich \
        setuptools tensorboard psutil pytest-xdist
    fi
  fi
fi
prefix=$("$PYTHON" -c 'import sys; print(sys.prefix)')
export TORCH_NPU_FOLDER=${TORCH_NPU_FOLDER:-$prefix/torch_npu-$TORCH_NPU}
[ -d "$TORCH_NPU_FOLDER/torch_npu" ] || pip --no-deps --target "$TORCH_NPU_FOLDER" "torch_npu==$TORCH_NPU"
[ -d "$prefix/megatron-core-0.12.1" ] || pip --no-deps --target "$prefix/megatron-core-0.12.1" megatron-core==0.12.1
if ! TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$PYTHON" -c 'import torch' 2>/dev/null; then
  [ -d "$TORCH_NPU_FOLDER/cuda" ] || bash tests/ascend/cuda_stub.sh "$PYTHON" "$TORCH_NPU_FOLDER/cuda"
  export LD_LIBRARY_PATH=$TORCH_NPU_FOLDER/cuda${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
PYTHONPATH=tests/ascend "$PYTHON" -c 'import bed, sys; why = bed.missing(); why and sys.exit(f"test_npu_contract.sh: error: {why}"); bed.build()'
if [ -n "${VERIFY+set}" ]; then
  eval "$("$PYTHON" tests/ascend/bed.py)"
  # Sizes follow the device's memory, and the bed computes on the CPU.
  export PYTHON NPU_STUB_MEMORY_MIB=${NPU_STUB_MEMORY_MIB:-32} RANKS=${RANKS:-2}
  # shellcheck disable=SC2086  # several options
  exec bash scripts/verify_npu.sh --device npu $VERIFY "$@"
fi
[ -z "${TABLE:-}" ] || exec "$PYTHON" tests/ascend/table.py run "$TABLE" "$@"
if [ -n "${LOSSES:-}" ]; then
  PYTHONPATH=$PWD:$PWD/tests/helpers${PYTHONPATH:+:$PYTHONPATH} exec "$PYTHON" tests/ascend/beside_runs.py
fi
exec "$PYTHON" -m pytest -q -p no:cacheprovider --full tests/ascend "$@"

#!/usr/bin/env bash
# Verify mindspeed_cp on the NPUs of this machine: prints a pass/fail table and writes one file to send.
#   bash scripts/verify_npu.sh --quick                 the kernel, parity, Ulysses and Ring, their speed; ten minutes
#   bash scripts/verify_npu.sh [--report FILE]         everything, one or two hours
#   bash scripts/verify_npu.sh --only "KV cache" --minutes 20      checks with this text in their name, limit in minutes
#   bash scripts/verify_npu.sh [--device npu|cuda|cpu] [--list]
# Uses the python of the environment (PYTHON=...), with torch, torch_npu and megatron-core installed; sources CANN's
# set_env.sh from ASCEND_HOME_PATH's usual places if nobody has. Every check runs, even if others failed.
#   RANKS=8                   devices that the training runs use
#   MEGATRON_LM_PATH=DIR      also run DIR/pretrain_gpt.py
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

if [[ "$*" != *--device* || "$*" == *--device\ npu* ]] && [[ -z ${ASCEND_HOME_PATH:-} ]]; then
  for setup in /usr/local/Ascend/ascend-toolkit/set_env.sh "$HOME/Ascend/ascend-toolkit/set_env.sh"; do
    # shellcheck disable=SC1090  # CANN's own script, where it is installed
    if [[ -f $setup ]]; then set +u; source "$setup"; set -u; break; fi
  done
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${PYTHON:-python}" tests/check verify_npu "$@"

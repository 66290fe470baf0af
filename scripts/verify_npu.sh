#!/usr/bin/env bash
# shellcheck disable=SC2317,SC2329  # check calls the functions below by name
# Verify mindspeed_cp on the NPUs of this machine, and print a pass/fail table to paste into an issue.
#   bash scripts/verify_npu.sh [--device npu|cuda|cpu] [--report FILE] [--list]
# Uses the python of the environment (PYTHON=...), with torch, torch_npu and megatron-core installed; sources CANN's
# set_env.sh from ASCEND_HOME_PATH's usual places when no one has. Every check runs, whatever the others gave.
#   RANKS=8                   devices that the training runs use
#   MEGATRON_LM_PATH=DIR      also run DIR/pretrain_gpt.py
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

DEVICE=npu REPORT="" LIST=0
while (( $# )); do
  case $1 in
    --device) DEVICE=${2:?--device needs npu, cuda or cpu}; shift 2 ;;
    --report) REPORT=${2:?--report needs a file}; shift 2 ;;
    --list) LIST=1; shift ;;
    *) printf 'verify_npu.sh: error: %s is not known; see the first lines of this script.\n' "$1" >&2; exit 2 ;;
  esac
done
PYTHON=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
LOGS=$(mktemp -d)
ROWS=()
FAILED=0
RANKS=${RANKS:-$([[ $DEVICE == cpu ]] && echo 4 || echo 8)}

if [[ $DEVICE == npu && -z ${ASCEND_HOME_PATH:-} ]]; then
  for setup in /usr/local/Ascend/ascend-toolkit/set_env.sh "$HOME/Ascend/ascend-toolkit/set_env.sh"; do
    # shellcheck disable=SC1090  # CANN's own script, where it is installed
    if [[ -f $setup ]]; then set +u; source "$setup"; set -u; break; fi
  done
fi

# check NAME COMMAND...: run it, keep its output, add a row.
check() {
  local name=$1 log start result
  shift
  if (( LIST )); then printf '%s: %s\n' "$name" "$*"; return; fi
  log=$LOGS/$(tr -c 'a-zA-Z0-9\n' _ <<<"$name").log
  start=$SECONDS
  printf '%s ... ' "$name"
  if "$@" >"$log" 2>&1; then result=pass; else result=FAIL; FAILED=1; fi
  printf '%s (%ss)\n' "$result" "$((SECONDS - start))"
  [[ $result == pass ]] || tail -n 25 "$log"
  ROWS+=("| $name | $result | $((SECONDS - start)) s | $(grep -vE '^\s*$' "$log" | tail -n 1 | tr '|' '/' | cut -c 1-100) |")
}

available() {
  "$PYTHON" - "$DEVICE" <<'PY'
import sys
from mindspeed_cp.kernels import select_kernel
print("kernel", select_kernel(None, sys.argv[1]).name)
PY
}

versions() {
  "$PYTHON" - "$DEVICE" <<'PY'
import importlib.metadata as metadata, importlib.util, sys, torch
device, parts = sys.argv[1], [f"torch {torch.__version__}"]
for package in ("torch_npu", "megatron-core"):
    try:
        parts.append(f"{package} {metadata.version(package)}")
    except metadata.PackageNotFoundError:
        parts.append(f"{package} not installed")
if device == "npu" and importlib.util.find_spec("torch_npu"):
    import torch_npu  # noqa: F401
if device != "cpu" and getattr(torch, device, None) is not None and getattr(torch, device).is_available():
    module = getattr(torch, device)
    parts.append(f"{module.device_count()} x {module.get_device_name(0)}")
parts.append(f"CANN {__import__('os').environ.get('ASCEND_HOME_PATH', 'not sourced')}" if device == "npu" else device)
print(", ".join(parts))
PY
}

dry_runs() {
  local script
  for script in scripts/launch/*.sh; do
    [[ $(basename "$script") == common.sh ]] && continue
    DRY_RUN=1 PYTHON=$PYTHON bash "$script" || { printf '%s failed\n' "$script"; return 1; }
  done
  printf 'all launch scripts resolve\n'
}

# One row of the report for each: twenty steps a run, loss and gradient norm compared step by step.
runs() {
  local size=()
  [[ $DEVICE == cpu ]] && size=(--tiny)
  "$PYTHON" scripts/verify_runs.py "$1" "$LOGS/runs" --ranks "$RANKS" "${size[@]}" "${@:2}"
}

pytest() { "$PYTHON" -m pytest -q -p no:cacheprovider --device "$DEVICE" "$@"; }

check "device and kernel" available
check "operators, every block shape" pytest "tests/kernels/test_kernel_$( [[ $DEVICE == cuda ]] && echo cuda || echo npu ).py"
check "kernel choice" pytest tests/kernels/test_kernel_select.py
check "parity of every algorithm" pytest tests/kernels/test_kernel_parity.py
check "parity over all features" pytest tests/attention/test_attention_exact.py
check "launch scripts, dry run" dry_runs
check "training, every algorithm" runs algorithms
check "training, KV cache policies" runs policies
check "training, sequence parallel, distributed optimizer, recompute, bf16" runs modes
check "training, packed documents, unaligned" runs batches
check "checkpoint and resume" runs resume
if [[ -n ${MEGATRON_LM_PATH:-} ]]; then
  check "Megatron-LM's own pretrain_gpt.py" runs megatron --checkout "$MEGATRON_LM_PATH"
fi
check "performance" runs performance
(( LIST )) && exit 0

{
  printf '\n**mindspeed_cp on %s**: %s\n\n' "$DEVICE" "$(versions 2>&1 | tail -n 1)"
  printf '| check | result | time | last line |\n|---|---|---|---|\n'
  printf '%s\n' "${ROWS[@]}"
  if [[ -f $LOGS/performance.log ]]; then printf '\n'; grep '^|' "$LOGS/performance.log"; fi
  if (( FAILED )); then
    printf '\n```\n'
    "$PYTHON" -m mindspeed_cp.megatron_adaptor 2>&1 | head -n 1
    { [[ $DEVICE == npu ]] && npu-smi info; } 2>/dev/null | head -n 20
    printf '```\n'
  fi
} | tee "${REPORT:-/dev/null}"
printf '\nlogs: %s\n' "$LOGS"
exit $FAILED

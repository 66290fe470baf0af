#!/usr/bin/env bash
# shellcheck disable=SC2317,SC2329  # check calls the functions below by name
# Verify mindspeed_cp on the NPUs of this machine, and print a pass/fail table to paste into an issue.
#   bash scripts/verify_npu.sh [--device npu|cuda|cpu] [--report FILE] [--list]
# Uses the python of the environment (PYTHON=...), with torch, torch_npu and megatron-core installed; sources CANN's
# set_env.sh from ASCEND_HOME_PATH's usual places when no one has. Every check runs, whatever the others gave.
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

# Twenty steps with and without context parallelism; loss and gradient norm are compared step by step.
training() {
  local folder=$LOGS/training name flags ranks=8 common
  [[ $DEVICE == cpu ]] && ranks=4
  mkdir -p "$folder"
  "$PYTHON" scripts/prepare_data.py --output "$folder/topics" || return 1
  common="--data-path $folder/topics --num-layers 2 --hidden-size 256 --num-attention-heads 16 --seq-length 1024 --train-iters 20
    --global-batch-size 8 --lr 3e-4 --position-embedding-type rope --use-flash-attn"
  while read -r name flags; do
    # shellcheck disable=SC2086  # flags are words
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node $ranks scripts/pretrain_gpt.py $common $flags \
      --log-file "$folder/$name.jsonl" || return 1
  done <<EOF
alone
ulysses --context-parallel-size $ranks --context-parallel-algo ulysses_cp_algo
ring --context-parallel-size $ranks --context-parallel-algo megatron_cp_algo --use-cp-send-recv-overlap
double_ring --context-parallel-size $ranks --context-parallel-algo megatron_cp_algo --cp-window-size 2
hybrid --context-parallel-size $ranks --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2
EOF
  "$PYTHON" - "$folder" <<'PY'
import json, pathlib, sys
runs = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in pathlib.Path(sys.argv[1]).glob("*.jsonl")}
steps = {name: [record for record in records if "loss" in record] for name, records in runs.items()}
alone, worst = steps.pop("alone"), 0.0
assert len(alone) == 20 and all(len(records) == 20 for records in steps.values()), {name: len(r) for name, r in steps.items()}
for name, records in steps.items():
    gap = max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(records, alone) for key in ("loss", "grad_norm"))
    print(f"{name}: largest relative difference of loss and gradient norm {gap:.1e}")
    worst = max(worst, gap)
print(f"largest relative difference {worst:.1e}, allowed 1e-3")
sys.exit(worst > 1e-3)
PY
}

pytest() { "$PYTHON" -m pytest -q -p no:cacheprovider --device "$DEVICE" "$@"; }

check "device and kernel" available
check "operators, every block shape" pytest "tests/test_kernel_$( [[ $DEVICE == cuda ]] && echo cuda || echo npu ).py"
check "kernel choice" pytest tests/test_kernel_select.py
check "parity of every algorithm" pytest tests/test_kernel_parity.py
check "parity over all features" pytest tests/test_attention_exact.py
check "launch scripts, dry run" dry_runs
check "20 training steps, cp against none" training
(( LIST )) && exit 0

{
  printf '\n**mindspeed_cp on %s**: %s\n\n' "$DEVICE" "$(versions 2>&1 | tail -n 1)"
  printf '| check | result | time | last line |\n|---|---|---|---|\n'
  printf '%s\n' "${ROWS[@]}"
} | tee "${REPORT:-/dev/null}"
printf '\nlogs: %s\n' "$LOGS"
exit $FAILED

#!/usr/bin/env bash
# Installs into .venv, trains the same small GPT three times (without context parallelism, with Ulysses and with Ring on four
# ranks) and compares the losses. Needs Python 3.10 or later with venv, and two cores. Exit status 1 when the losses differ.
# PYTHON and TORCH_INDEX_URL: see scripts/environment.py.
set -euo pipefail
cd "$(dirname "$0")/.."

RUNS=${RUNS:-runs/quickstart}
STEPS=${STEPS:-20}
SEQ_LENGTH=${SEQ_LENGTH:-1024}
export OMP_NUM_THREADS=1 MINDSPEED_CP_DEVICE=cpu

"${PYTHON:-python3}" scripts/environment.py train

echo "== Preparing data: the help topics of Python's standard library as bytes"
mkdir -p "$RUNS"
.venv/bin/python scripts/prepare_data.py --output "$RUNS/topics"

train() { # name, ranks, flags of the run
  local name=$1 ranks=$2
  shift 2
  echo "== Training: $name"
  .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node "$ranks" scripts/pretrain_gpt.py \
    --data-path "$RUNS/topics" --num-layers 2 --hidden-size 128 --num-attention-heads 8 --seq-length "$SEQ_LENGTH" \
    --position-embedding-type rope --swiglu --normalization RMSNorm --global-batch-size 2 --train-iters "$STEPS" \
    --lr 4e-3 --lr-warmup-iters 2 --use-flash-attn --log-interval 5 --log-file "$RUNS/$name.jsonl" "$@"
}

train cp1 1
train ulysses 4 --context-parallel-size 4 --context-parallel-algo ulysses_cp_algo
train ring 4 --context-parallel-size 4 --context-parallel-algo megatron_cp_algo --use-cp-send-recv-overlap

.venv/bin/python scripts/compare_runs.py --plot loss.png --tolerance 1e-4 \
  "cp=1=$RUNS/cp1.jsonl" "Ulysses cp=4=$RUNS/ulysses.jsonl" "Ring cp=4=$RUNS/ring.jsonl"

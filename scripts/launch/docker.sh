#!/usr/bin/env bash
# Docker: runs a launch script in a container with torch (and CANN or CUDA); this repository is mounted into it.
#   IMAGE=my/torch:latest bash scripts/launch/docker.sh llama2 7b [flags of pretrain_gpt.py]
# The variables of common.sh that are set here are passed to it. DRY_RUN=1 prints the command of docker.
# DRY_RUN=1: prints the command behind the line '# command' and starts nothing.
set -euo pipefail
FAMILY=${1:?usage: IMAGE=... bash scripts/launch/docker.sh FAMILY [SIZE] [flags]}
shift
IMAGE=${IMAGE:?set IMAGE to one that holds torch}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[[ -f $REPOSITORY/scripts/launch/$FAMILY.sh ]] || { echo "docker.sh: error: there is no scripts/launch/$FAMILY.sh; choose llama2, qwen, qwen1_5 or gpt3." >&2; exit 2; }

COMMAND=(docker run --rm --ipc=host --network=host --ulimit memlock=-1 -v "$REPOSITORY:/workspace" -w /workspace)
case ${DEVICE:-gpu} in
  npu)
    for device in /dev/davinci[0-9]* /dev/davinci_manager /dev/devmm_svm /dev/hisi_hdc; do
      if [[ -e $device ]]; then COMMAND+=(--device "$device"); fi
    done
    COMMAND+=(-v /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro)
    ;;
  gpu) COMMAND+=(--gpus all) ;;
  cpu) ;;
  *) echo "docker.sh: error: DEVICE $DEVICE is not known; choose npu, gpu or cpu." >&2; exit 2 ;;
esac
# Only names: docker takes their values from this environment.
for name in SIZE TINY SEQ_LENGTH CP TP PP VPP CLUSTER DEVICE_MEMORY CP_ALGO ULYSSES_DEGREE CP_WINDOW MASK_TYPE KV_CACHE_POLICY \
  KV_EXCHANGE OVERLAP CALCULATOR KEEP_ATTENTION MICRO_BATCH GLOBAL_BATCH TRAIN_ITERS LR MIN_LR LR_WARMUP_ITERS WEIGHT_DECAY CLIP_GRAD \
  SEED PRECISION RECOMPUTE SEQUENCE_PARALLEL DISTRIBUTED_OPTIMIZER DATA_PATH TOKENIZER_TYPE TOKENIZER_MODEL VOCAB_SIZE SPLIT SAVE LOAD \
  SAVE_INTERVAL EVAL_ITERS EVAL_INTERVAL LOG_INTERVAL DEVICE NPROC_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT TIMEOUT_MINUTES; do
  if [[ -n ${!name:-} ]]; then COMMAND+=(--env "$name"); fi
done
COMMAND+=("$IMAGE" bash "scripts/launch/$FAMILY.sh" "$@")
if [[ ${DRY_RUN:-0} == 1 ]]; then
  echo "# command"
  printf '%q ' "${COMMAND[@]}"
  echo
else
  exec "${COMMAND[@]}"
fi

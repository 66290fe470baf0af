# shellcheck shell=bash
# Common code of the launch scripts of all model families; they source this file. Every variable below can be set from the
# environment, and flags after the size are passed to pretrain_gpt.py unchanged (the last one wins).
#
#   SIZE=7b                   or the first argument of the family's script
#   TINY=1                    the same architecture, small enough to train on a CPU
#   DRY_RUN=1                 print the resolved configuration and a command to paste into any shell, start nothing
#   MEGATRON_LM_PATH=DIR      run DIR/pretrain_gpt.py; without it the trainer of this repository
#   SEQ_LENGTH=32k|128k|1m|N  tokens of a sequence; the first three choose a fitting CP, CP_ALGO, ULYSSES_DEGREE, CP_WINDOW;
#                             N may end in k or m
#   CP TP PP VPP              context, tensor and pipeline parallel sizes, interleaved parts of a stage; data parallel is the rest
#   CP=auto                   the planner's fastest setting that fits (python -m mindspeed_cp.plan) on NNODES x NPROC_PER_NODE
#                             devices of CLUSTER=ascend-910b|ascend-910c|a100|h100 with DEVICE_MEMORY=64GB; given TP and PP stay
#   CP_ALGO ULYSSES_DEGREE CP_WINDOW MASK_TYPE KV_CACHE_POLICY KV_EXCHANGE OVERLAP CALCULATOR KEEP_ATTENTION=1|0    context parallelism
#   MICRO_BATCH GLOBAL_BATCH TRAIN_ITERS LR MIN_LR LR_WARMUP_ITERS WEIGHT_DECAY CLIP_GRAD SEED    training
#   PRECISION=bf16|fp32 RECOMPUTE=full|selective|none SEQUENCE_PARALLEL=1|0 DISTRIBUTED_OPTIMIZER=1|0
#   DATA_PATH TOKENIZER_TYPE TOKENIZER_MODEL VOCAB_SIZE SPLIT    data; without DATA_PATH: mock data, or text of the standard library
#   SAVE LOAD SAVE_INTERVAL EVAL_ITERS EVAL_INTERVAL LOG_INTERVAL TENSORBOARD_DIR    files
#   DEVICE=npu|gpu|cpu NPROC_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT PYTHON TIMEOUT_MINUTES    machines (or Slurm's)

# DRY_RUN=1: prints the command behind the line '# command' and starts nothing.
LAUNCH_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPOSITORY=$(cd "$LAUNCH_DIR/../.." && pwd)
PYTHON=$(command -v "${PYTHON:-python}" || echo "${PYTHON:-python}")
# shellcheck disable=SC2034  # printed by name
MODEL=$(basename "$0" .sh)

fail() {
  printf '%s: error: %s\n' "$(basename "$0")" "$1" >&2
  exit 2
}

# must RULE PATTERN NAMES: each of these variables is empty or follows the pattern.
must() {
  local name rule=$1 pattern=$2
  for name in "${@:3}"; do
    [[ -z ${!name:-} || ${!name} =~ ^($pattern)$ ]] || fail "$name ${!name} must be $rule, or left out."
  done
}

# check_numbers: checks every number from the environment before any computation with it, because bash would evaluate its
# text.
check_numbers() {
  must "a whole number of at least 1, such as 2" "[1-9][0-9]{0,11}" TP PP VPP NPROC_PER_NODE NNODES MICRO_BATCH GLOBAL_BATCH \
    TRAIN_ITERS CP_WINDOW ULYSSES_DEGREE VOCAB_SIZE SAVE_INTERVAL LOG_INTERVAL EVAL_INTERVAL TIMEOUT_MINUTES SLURM_NNODES \
    SLURM_JOB_NUM_NODES
  must "a whole number of at least 1, such as 2, or auto" "[1-9][0-9]{0,11}|auto" CP
  must "a whole number of at least 0, such as 0" "0|[1-9][0-9]{0,11}" NODE_RANK EVAL_ITERS LR_WARMUP_ITERS SEED SLURM_NODEID SLURM_JOB_ID
  must "a number of at least 0, such as 1.5e-4" "([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?" LR MIN_LR WEIGHT_DECAY CLIP_GRAD
  must "1 or 0" "[01]" TINY DRY_RUN SEQUENCE_PARALLEL DISTRIBUTED_OPTIMIZER OVERLAP KEEP_ATTENTION
  must "a port from 1 to 65535, such as 29500" "[1-9][0-9]{0,3}|[1-5][0-9]{4}|6([0-4][0-9]{3}|5([0-4][0-9]{2}|5([0-2][0-9]|3[0-5])))" \
    MASTER_PORT
  must "full, selective or none" "full|selective|none" RECOMPUTE
  must "bf16 or fp32" "bf16|fp32" PRECISION
}

# read_model ARGUMENTS: the size is the first argument, or $SIZE, or the family's first; the rest are flags for
# pretrain_gpt.py. The sizes of the model come from the planner's table; TINY keeps the architecture and shrinks the numbers.
read_model() {
  local table=$REPOSITORY/mindspeed_cp/planner/models.txt known given=${SIZE:-} vocabulary
  known=$(sed -n "s/^$MODEL-\([^ ]*\) .*/\1/p" "$table" | xargs)
  if [[ ${1:-} != "" && ${1:-} != -* ]]; then
    given=$1
    shift
  fi
  SIZE=${given:-${known%% *}}
  SIZE=${SIZE,,}
  [[ $SIZE != *[[:space:]]* && " $known " == *" $SIZE "* ]] || fail "size $SIZE is not known; choose one of ${known// /, }."
  EXTRA_FLAGS=("$@")
  read -r _ LAYERS HIDDEN FFN HEADS KV_HEADS vocabulary _ < <(grep "^$MODEL-$SIZE " "$table")
  if [[ ${TINY:-0} == 1 ]]; then
    # Two KV heads represent any grouping.
    if ((KV_HEADS < HEADS)); then KV_HEADS=2; else KV_HEADS=8; fi
    LAYERS=2 HIDDEN=64 FFN=176 HEADS=8
    VOCAB_SIZE=${VOCAB_SIZE:-512} SEQ_LENGTH=${SEQ_LENGTH:-256} TP=${TP:-1} PP=${PP:-1} CP=${CP:-2}
    GLOBAL_BATCH=${GLOBAL_BATCH:-2} TRAIN_ITERS=${TRAIN_ITERS:-10} LR=${LR:-1e-3} RECOMPUTE=${RECOMPUTE:-none}
    LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-0} EVAL_ITERS=${EVAL_ITERS:-0}
  fi
  VOCAB_SIZE=${VOCAB_SIZE:-$vocabulary}
}

# Sizes of a model that fits 64 GB devices; the environment overrides them.
default_parallel() {
  if [[ ${CP:-} == auto ]]; then return; fi
  TP=${TP:-$1} PP=${PP:-$2}
}

# CP=auto: the planner's output for --shell; TP and PP that are already set stay.
plan_context_parallel() {
  local plan name value given=()
  plain_length
  [[ ${TINY:-0} != 1 ]] || fail "CP=auto plans the full model, and TINY=1 trains another one; leave one of them out."
  for name in CP_ALGO ULYSSES_DEGREE CP_WINDOW KV_EXCHANGE KV_CACHE_POLICY RECOMPUTE KEEP_ATTENTION; do
    [[ -z ${!name:-} ]] || fail "CP=auto chooses $name, and it is ${!name}; leave it out, or give CP."
  done
  TP_GIVEN=${TP:-} PP_GIVEN=${PP:-} TP=${TP:-1} PP=${PP:-1} CP=8
  choose_device # sets the number of devices, on a CPU TP x PP x CP of the line above
  TP=$TP_GIVEN PP=$PP_GIVEN
  local devices=$((${NNODES:-${SLURM_NNODES:-${SLURM_JOB_NUM_NODES:-1}}} * NPROC_PER_NODE))
  given=(--model "$MODEL-$SIZE" --devices "$devices" --devices-per-node "$NPROC_PER_NODE" --seq-length "$SEQ_LENGTH"
    --global-batch "${GLOBAL_BATCH:-$devices}" --micro-batch "${MICRO_BATCH:-1}"
    --mask-type "${MASK_TYPE:-causal}" --cluster "${CLUSTER:-ascend-910b}")
  if [[ -n ${DEVICE_MEMORY:-} ]]; then given+=(--memory "$DEVICE_MEMORY"); fi
  if [[ -n ${TP:-} ]]; then given+=(--tp "$TP"); fi
  if [[ -n ${PP:-} ]]; then given+=(--pp "$PP"); fi
  plan=$(PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}" TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
    "$PYTHON" -m mindspeed_cp.plan "${given[@]}" --shell) || fail "CP=auto found no setting; give CP, or change what it says."
  GLOBAL_BATCH=${GLOBAL_BATCH:-$devices}
  unset CP
  while IFS='=' read -r name value; do
    if [[ -z ${!name:-} ]]; then printf -v "$name" '%s' "$value"; fi
  done <<<"$plan"
}

# SEQ_LENGTH as a number: 64k is 65536.
plain_length() {
  [[ ${SEQ_LENGTH,,} =~ ^([1-9][0-9]{0,8})([km]?)$ ]] ||
    fail "SEQ_LENGTH $SEQ_LENGTH must be a number of tokens above 0, such as 32k, 128k, 1m or 4096."
  case ${BASH_REMATCH[2]} in
    k) SEQ_LENGTH=$((BASH_REMATCH[1] * 1024)) ;;
    m) SEQ_LENGTH=$((BASH_REMATCH[1] * 1048576)) ;;
    *) SEQ_LENGTH=${BASH_REMATCH[1]} ;;
  esac
}

# Sequence length -> CP, algorithm and windows. At 32k each of 4 ranks holds 8k tokens, too few to hide a ring's transfers:
# Ulysses. At 128k some models have too few heads per tensor-parallel rank for 8 ranks: Hybrid. At 1M a ring of 8 spans
# nodes: windows of 4 keep most of its transfers within a node.
choose_context_parallel() {
  SEQ_LENGTH=${SEQ_LENGTH:-32k}
  if [[ ${CP:-} == auto ]]; then plan_context_parallel; fi
  case ${SEQ_LENGTH,,} in
    32k) SEQ_LENGTH=32768 preset=(4 ulysses_cp_algo "" 1) ;;
    128k) SEQ_LENGTH=131072 preset=(8 hybrid_cp_algo 4 1) ;;
    1m) SEQ_LENGTH=1048576 preset=(32 hybrid_cp_algo 4 4) ;;
    *)
      plain_length
      preset=("${CP:-1}" ulysses_cp_algo "" 1)
      ;;
  esac
  # The preset's degree and window belong to its size and algorithm.
  if [[ ${CP:-${preset[0]}} != "${preset[0]}" || ${CP_ALGO:-${preset[1]}} != "${preset[1]}" ]]; then
    local degree=""
    if [[ ${CP_ALGO:-} == hybrid_cp_algo || (-z ${CP_ALGO:-} && ${preset[1]} == hybrid_cp_algo) ]]; then degree=2; fi
    preset=("${CP:-${preset[0]}}" "${CP_ALGO:-${preset[1]}}" "$degree" 1)
  fi
  CP=${CP:-${preset[0]}} CP_ALGO=${CP_ALGO:-${preset[1]}}
  ULYSSES_DEGREE=${ULYSSES_DEGREE:-${preset[2]}} CP_WINDOW=${CP_WINDOW:-${preset[3]}}
}

count_visible() {
  if [[ -n $1 ]]; then
    tr ',' '\n' <<<"$1" | grep -c . || true
  else
    echo "$2"
  fi
}

# NPU before GPU before CPU; a named DEVICE that is not available (a dry run elsewhere) counts as a node of eight.
choose_device() {
  local npus gpus
  npus=$(count_visible "${ASCEND_RT_VISIBLE_DEVICES:-}" "$(find /dev -maxdepth 1 -name 'davinci[0-9]*' 2>/dev/null | wc -l)")
  gpus=$(count_visible "${CUDA_VISIBLE_DEVICES:-}" "$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)")
  if [[ -z ${DEVICE:-} ]]; then
    if ((npus > 0)); then DEVICE=npu; elif ((gpus > 0)); then DEVICE=gpu; else DEVICE=cpu; fi
  fi
  case $DEVICE in
    npu) NPROC_PER_NODE=${NPROC_PER_NODE:-$((npus > 0 ? npus : 8))} ;;
    gpu) NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 8))} ;;
    cpu) NPROC_PER_NODE=${NPROC_PER_NODE:-$((TP * CP * PP))} ;;
    *) fail "DEVICE $DEVICE is not known; choose npu, gpu or cpu, or leave it out." ;;
  esac
}

# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: from the environment, else Slurm's, else only this machine.
choose_nodes() {
  NNODES=${NNODES:-${SLURM_NNODES:-${SLURM_JOB_NUM_NODES:-1}}}
  NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
  if [[ -z ${MASTER_ADDR:-} && -n ${SLURM_JOB_NODELIST:-} ]]; then
    read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST") || true
  fi
  if [[ -z ${MASTER_ADDR:-} ]]; then
    ((NNODES == 1)) || fail "MASTER_ADDR is not set, and NNODES is $NNODES; set MASTER_ADDR to the address of the first node."
    MASTER_ADDR=127.0.0.1
  fi
  # Jobs that share a node must not share a port.
  MASTER_PORT=${MASTER_PORT:-$((${SLURM_JOB_ID:-0} > 0 ? 20000 + ${SLURM_JOB_ID:-0} % 20000 : 29500))}
  local world=$((NNODES * NPROC_PER_NODE)) model=$((TP * CP * PP))
  ((world % model == 0)) || fail "NNODES $NNODES x NPROC_PER_NODE $NPROC_PER_NODE = $world processes must be a multiple of TP $TP x \
CP $CP x PP $PP = $model; use NNODES=$(((model + NPROC_PER_NODE - 1) / NPROC_PER_NODE)), or smaller TP, CP or PP."
  DP=$((world / model)) WORLD=$world
}

model_flags() {
  FLAGS+=(--num-layers "$LAYERS" --hidden-size "$HIDDEN" --ffn-hidden-size "$FFN" --num-attention-heads "$HEADS"
    --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH" "${ARCHITECTURE[@]}")
  if ((KV_HEADS < HEADS)); then FLAGS+=(--group-query-attention --num-query-groups "$KV_HEADS"); fi
}

parallel_flags() {
  FLAGS+=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP"
    --distributed-timeout-minutes "${TIMEOUT_MINUTES:-30}")
  if [[ ${VPP:-1} != 1 ]]; then FLAGS+=(--num-virtual-stages-per-pipeline-rank "$VPP"); fi
  if ((TP > 1)) && [[ ${SEQUENCE_PARALLEL:-1} == 1 ]]; then FLAGS+=(--sequence-parallel); fi
  if [[ ${DISTRIBUTED_OPTIMIZER:-1} == 1 ]]; then FLAGS+=(--use-distributed-optimizer); fi
  if [[ $CP == 1 ]]; then return; fi
  FLAGS+=(--context-parallel-algo "$CP_ALGO" --cp-attention-mask-type "${MASK_TYPE:-causal}" --use-flash-attn)
  if [[ -n $ULYSSES_DEGREE ]]; then FLAGS+=(--ulysses-degree-in-cp "$ULYSSES_DEGREE"); fi
  if ((CP_WINDOW > 1)); then FLAGS+=(--cp-window-size "$CP_WINDOW"); fi
  if [[ ${OVERLAP:-1} == 1 && $CP_ALGO != ulysses_cp_algo ]]; then FLAGS+=(--use-cp-send-recv-overlap); fi
  if [[ -n ${KV_CACHE_POLICY:-} ]]; then FLAGS+=(--context-parallel-kv-cache-policy "$KV_CACHE_POLICY"); fi
  if [[ -n ${KV_EXCHANGE:-} ]]; then FLAGS+=(--cp-kv-exchange "$KV_EXCHANGE"); fi
  if [[ ${KEEP_ATTENTION:-0} == 1 ]]; then FLAGS+=(--cp-keep-attention); fi
  if [[ -n ${CALCULATOR:-} ]]; then FLAGS+=(--gather-size-calculator "$CALCULATOR"); fi
}

training_flags() {
  local recompute=${RECOMPUTE:-$( ((SEQ_LENGTH > 65536)) && echo full || echo selective)}
  PRECISION=${PRECISION:-$([[ $DEVICE == cpu ]] && echo fp32 || echo bf16)}
  FLAGS+=(--micro-batch-size "${MICRO_BATCH:-1}" --global-batch-size "${GLOBAL_BATCH:-$((DP * 16))}"
    --train-iters "${TRAIN_ITERS:-1000}" --lr "${LR:-1.5e-4}" --min-lr "${MIN_LR:-1e-6}" --lr-decay-style cosine
    --lr-warmup-iters "${LR_WARMUP_ITERS:-50}" --weight-decay "${WEIGHT_DECAY:-0.1}" --clip-grad "${CLIP_GRAD:-1.0}"
    --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.01 --attention-dropout 0.0 --hidden-dropout 0.0
    --seed "${SEED:-1234}")
  case $recompute in
    full) FLAGS+=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1) ;;
    selective) FLAGS+=(--recompute-granularity selective) ;;
  esac
  if [[ $PRECISION == bf16 ]]; then FLAGS+=(--bf16); fi
}

file_flags() {
  FLAGS+=(--log-interval "${LOG_INTERVAL:-1}" --eval-interval "${EVAL_INTERVAL:-1000}" --eval-iters "${EVAL_ITERS:-10}")
  if [[ -n ${SAVE:-} ]]; then FLAGS+=(--save "$SAVE" --save-interval "${SAVE_INTERVAL:-500}"); fi
  if [[ -n ${LOAD:-} ]]; then FLAGS+=(--load "$LOAD"); fi
  if [[ -n ${TENSORBOARD_DIR:-} ]]; then FLAGS+=(--tensorboard-dir "$TENSORBOARD_DIR"); fi
}

# Flags that only Megatron-LM's own pretrain_gpt.py has.
megatron_flags() {
  [[ -f $MEGATRON_LM_PATH/pretrain_gpt.py ]] || fail "MEGATRON_LM_PATH $MEGATRON_LM_PATH holds no pretrain_gpt.py; point it at a Megatron-LM checkout."
  PROGRAM=(-m mindspeed_cp.run "$MEGATRON_LM_PATH/pretrain_gpt.py")
  FLAGS+=(--transformer-impl "${TRANSFORMER_IMPL:-local}" --no-create-attention-mask-in-dataloader
    --no-gradient-accumulation-fusion --no-persist-layer-norm --no-rope-fusion --no-masked-softmax-fusion)
  if [[ -n ${DATA_PATH:-} ]]; then
    FLAGS+=(--data-path "$DATA_PATH" --split "${SPLIT:-99,1,0}")
  else
    FLAGS+=(--mock-data)
  fi
  if [[ -n ${TOKENIZER_MODEL:-} ]]; then
    FLAGS+=(--tokenizer-type "${TOKENIZER_TYPE:-$DEFAULT_TOKENIZER}" --tokenizer-model "$TOKENIZER_MODEL")
  else
    # NullTokenizer adds the end-of-document token itself.
    FLAGS+=(--tokenizer-type NullTokenizer --vocab-size "$((VOCAB_SIZE - 1))")
  fi
}

# The embedded trainer reads an indexed dataset; without DATA_PATH text of Python's standard library is written once.
embedded_flags() {
  PROGRAM=("$REPOSITORY/scripts/pretrain_gpt.py")
  FLAGS+=(--data-path "${DATA_PATH:-$REPOSITORY/data/topics}" --vocab-size "$VOCAB_SIZE" --split "${SPLIT:-90,10,0}")
  if [[ -z ${DATA_PATH:-} ]]; then
    PREPARE=("$PYTHON" "$REPOSITORY/scripts/prepare_data.py" --output "$REPOSITORY/data/topics")
  fi
}

# put NAME VALUE: sets a variable of the run unless the environment has it; ENVIRONMENT collects these variables.
put() {
  export "$1=${!1:-$2}"
  ENVIRONMENT+=("$1=${!1}")
}

set_environment() {
  ENVIRONMENT=()
  PYTHONPATH="${MEGATRON_LM_PATH:+$MEGATRON_LM_PATH:}$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
  put PYTHONPATH ""
  # Megatron orders communication and computation by submitting them to one hardware queue.
  put CUDA_DEVICE_MAX_CONNECTIONS 1
  case $DEVICE in
    npu)
      # Usual settings on Ascend: less fragmentation, a separate thread that enqueues operators, threads bound to the cores
      # near the device, and time for slow starts.
      put PYTORCH_NPU_ALLOC_CONF expandable_segments:True
      put TASK_QUEUE_ENABLE 2
      put CPU_AFFINITY_CONF 1
      put HCCL_CONNECT_TIMEOUT 1800
      put HCCL_EXEC_TIMEOUT "$((${TIMEOUT_MINUTES:-30} * 60))"
      ;;
    cpu)
      # Several ranks share the cores. If torch_npu is installed without CANN, torch itself fails to load it.
      put MINDSPEED_CP_DEVICE cpu
      put OMP_NUM_THREADS 1
      put TORCH_DEVICE_BACKEND_AUTOLOAD 0
      ;;
  esac
}

print_resolved() {
  local name
  echo "# resolved configuration"
  for name in MODEL SIZE DEVICE NNODES NODE_RANK NPROC_PER_NODE MASTER_ADDR MASTER_PORT TP CP PP DP SEQ_LENGTH CP_ALGO \
    ULYSSES_DEGREE CP_WINDOW LAYERS HIDDEN FFN HEADS KV_HEADS VOCAB_SIZE PRECISION; do
    printf '%s=%s\n' "$name" "${!name}"
  done
  # This needs no device, and with torch_npu but without CANN torch would not start.
  TORCH_DEVICE_BACKEND_AUTOLOAD=0 WORLD_SIZE=$WORLD "$PYTHON" "$LAUNCH_DIR/describe.py" "${FLAGS[@]}" "${EXTRA_FLAGS[@]}"
  # Paths may be relative, so the command begins where this script was started.
  echo "# command"
  printf 'cd %q && ' "$PWD"
  if ((${#PREPARE[@]})); then
    printf '{ [ -f %q ] || ' "$REPOSITORY/data/topics.idx"
    printf '%q ' env "${ENVIRONMENT[@]}" "${PREPARE[@]}"
    printf '; } && '
  fi
  printf '%q ' env "${ENVIRONMENT[@]}" "${COMMAND[@]}"
  echo
}

# Resolve everything and start torchrun, or print with DRY_RUN=1.
launch() {
  FLAGS=() PREPARE=()
  check_numbers
  choose_context_parallel
  choose_device
  choose_nodes
  model_flags
  parallel_flags
  training_flags
  file_flags
  set_environment
  if [[ -n ${MEGATRON_LM_PATH:-} ]]; then megatron_flags; else embedded_flags; fi
  COMMAND=("$PYTHON" -m mindspeed_cp.torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPROC_PER_NODE"
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" "${PROGRAM[@]}" "${FLAGS[@]}" "${EXTRA_FLAGS[@]}")
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    print_resolved
  else
    if ((${#PREPARE[@]})) && [[ ! -f $REPOSITORY/data/topics.idx ]]; then "${PREPARE[@]}"; fi
    exec "${COMMAND[@]}"
  fi
}

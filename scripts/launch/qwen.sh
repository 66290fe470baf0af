#!/usr/bin/env bash
# Qwen: RMSNorm, RoPE, SwiGLU, bias in the QKV projection alone; the 72B has a larger rotary base and a wider MLP.
#   bash scripts/launch/qwen.sh [7b|14b|72b] [flags of pretrain_gpt.py ...]        variables: common.sh
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DEFAULT_TOKENIZER=HuggingFaceTokenizer
read_size "7b 14b 72b" "$@"
case $SIZE in
  7b) model_shape 32 4096 11008 32 32 && default_parallel 2 1 && VOCAB_SIZE=${VOCAB_SIZE:-151936} ;;
  14b) model_shape 40 5120 13696 40 40 && default_parallel 2 2 && VOCAB_SIZE=${VOCAB_SIZE:-152064} ;;
  72b) model_shape 80 8192 24576 64 64 && default_parallel 8 4 && VOCAB_SIZE=${VOCAB_SIZE:-152064} ROTARY_BASE=${ROTARY_BASE:-1000000} ;;
esac
ARCHITECTURE=(--normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear --add-qkv-bias
  --position-embedding-type rope --rotary-base "${ROTARY_BASE:-10000}" --untie-embeddings-and-output-weights)
launch

#!/usr/bin/env bash
# Qwen, and Qwen1.5 through qwen1_5.sh: RMSNorm, RoPE, SwiGLU, bias only in the QKV projection. Qwen's 72B and every size of
# Qwen1.5 have a larger rotary base; the 72B has a wider MLP.
#   bash scripts/launch/qwen.sh [7b|14b|72b] [flags of pretrain_gpt.py ...]        variables: common.sh
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DEFAULT_TOKENIZER=HuggingFaceTokenizer
read_model "$@"
case $SIZE in
  7b) default_parallel 2 1 ;;
  14b) default_parallel 2 2 ;;
  *) default_parallel 8 4 ;;
esac
case $MODEL-$SIZE in
  qwen-7b | qwen-14b) base=10000 ;;
  *) base=1000000 ;;
esac
ARCHITECTURE=(--normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear --add-qkv-bias
  --position-embedding-type rope --rotary-base "${ROTARY_BASE:-$base}" --untie-embeddings-and-output-weights)
launch

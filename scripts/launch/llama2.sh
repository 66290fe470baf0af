#!/usr/bin/env bash
# LLaMA 2: RMSNorm, RoPE, SwiGLU, no bias; the 70B shares each KV head among eight query heads.
#   bash scripts/launch/llama2.sh [7b|13b|70b] [flags of pretrain_gpt.py ...]        variables: common.sh
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DEFAULT_TOKENIZER=Llama2Tokenizer
read_size "7b 13b 70b" "$@"
case $SIZE in
  7b) model_shape 32 4096 11008 32 32 && default_parallel 2 1 ;;
  13b) model_shape 40 5120 13824 40 40 && default_parallel 2 2 ;;
  70b) model_shape 80 8192 28672 64 8 && default_parallel 8 4 ;;
esac
VOCAB_SIZE=${VOCAB_SIZE:-32000}
ARCHITECTURE=(--normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear --position-embedding-type rope
  --rotary-base "${ROTARY_BASE:-10000}" --untie-embeddings-and-output-weights)
launch

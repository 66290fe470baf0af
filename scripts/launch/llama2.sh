#!/usr/bin/env bash
# LLaMA 2: RMSNorm, RoPE, SwiGLU, no bias; the 70B shares each KV head among eight query heads.
#   bash scripts/launch/llama2.sh [7b|13b|70b] [flags of pretrain_gpt.py ...]        variables: common.sh
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DEFAULT_TOKENIZER=Llama2Tokenizer
read_model "$@"
case $SIZE in
  7b) default_parallel 2 1 ;;
  13b) default_parallel 2 2 ;;
  *) default_parallel 8 4 ;;
esac
ARCHITECTURE=(--normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear --position-embedding-type rope
  --rotary-base "${ROTARY_BASE:-10000}" --untie-embeddings-and-output-weights)
launch

#!/usr/bin/env bash
# GPT-3 style: LayerNorm, GELU, biases, learned positions, input and output embeddings shared.
#   bash scripts/launch/gpt3.sh [1.3b|125m|350m|2.7b|6.7b|13b|175b] [flags of pretrain_gpt.py ...]        variables: common.sh
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DEFAULT_TOKENIZER=HuggingFaceTokenizer
read_size "1.3b 125m 350m 2.7b 6.7b 13b 175b" "$@"
case $SIZE in
  125m) model_shape 12 768 3072 12 12 && default_parallel 1 1 ;;
  350m) model_shape 24 1024 4096 16 16 && default_parallel 1 1 ;;
  1.3b) model_shape 24 2048 8192 16 16 && default_parallel 1 1 ;;
  2.7b) model_shape 32 2560 10240 32 32 && default_parallel 2 1 ;;
  6.7b) model_shape 32 4096 16384 32 32 && default_parallel 2 1 ;;
  13b) model_shape 40 5120 20480 40 40 && default_parallel 2 2 ;;
  175b) model_shape 96 12288 49152 96 96 && default_parallel 8 8 ;;
esac
VOCAB_SIZE=${VOCAB_SIZE:-50257}
ARCHITECTURE=(--normalization LayerNorm --norm-epsilon 1e-5 --position-embedding-type learned_absolute)
launch

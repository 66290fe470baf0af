#!/usr/bin/env bash
# GPT-3 style: LayerNorm, GELU, biases, learned positions, shared input and output embeddings.
#   bash scripts/launch/gpt3.sh [1.3b|125m|350m|2.7b|6.7b|13b|175b] [flags of pretrain_gpt.py ...]        variables: common.sh
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DEFAULT_TOKENIZER=HuggingFaceTokenizer
read_model "$@"
case $SIZE in
  125m | 350m | 1.3b) default_parallel 1 1 ;;
  2.7b | 6.7b) default_parallel 2 1 ;;
  13b) default_parallel 2 2 ;;
  *) default_parallel 8 8 ;;
esac
ARCHITECTURE=(--normalization LayerNorm --norm-epsilon 1e-5 --position-embedding-type learned_absolute)
launch

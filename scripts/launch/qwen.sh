#!/usr/bin/env bash
# Qwen: RMSNorm, RoPE, SwiGLU, bias in the QKV projection alone; the 72B has a larger rotary base and a wider MLP.
#   bash scripts/launch/qwen.sh [7b|14b|72b] [flags of pretrain_gpt.py ...]        variables: common.sh
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

qwen_model "$@"
if [[ $SIZE == 72b ]]; then launch_qwen 1000000; else launch_qwen 10000; fi

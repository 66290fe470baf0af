#!/usr/bin/env bash
# Qwen1.5: as Qwen, with a rotary base of a million in every size.
#   bash scripts/launch/qwen1_5.sh [7b|14b|72b] [flags of pretrain_gpt.py ...]        variables: common.sh
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

qwen_model "$@"
launch_qwen 1000000

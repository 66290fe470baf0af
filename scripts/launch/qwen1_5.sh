#!/usr/bin/env bash
# Qwen1.5; qwen.sh recognises it by this script's name.
#   bash scripts/launch/qwen1_5.sh [7b|14b|72b] [flags of pretrain_gpt.py ...]        variables: common.sh
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/qwen.sh" "$@"

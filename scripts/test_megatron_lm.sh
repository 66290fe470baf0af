#!/usr/bin/env bash
# Train the unchanged pretrain_gpt.py of every Megatron-LM checkout in a folder, on the CPU, with each algorithm and each kind
# of parallelism, and compare loss and gradient norm of every step with context-parallel size 1. Prints a markdown table.
#   bash scripts/test_megatron_lm.sh FOLDER [--versions 0.12.1 0.16.1] [--quick] [--only TEXT]      PYTHON=python
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" tests/check megatron_lm "$@"

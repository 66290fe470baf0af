#!/usr/bin/env bash
# Soak: train under torchrun --max-restarts while ranks are killed (kill -9) at random, for N minutes; then compare with a
# run that nobody disturbed. Prints restarts, steps lost and the losses; exit status 1 where a loss differs.
#   bash scripts/soak.sh [MINUTES=10] [--ranks 4] [--seed 1] [--every SECONDS] [--hosts 2]
# --hosts 2 takes two network namespaces with a torchrun each (needs root, as scripts/two_hosts.sh does).
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" scripts/soak.py "$@"

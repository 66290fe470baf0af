#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them all on the default megatron-core, then those that touch Megatron on
# the oldest supported one. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OLD_MEGATRON=${OLD_MEGATRON:-0.12.1}
OLD=.venv/megatron-core-$OLD_MEGATRON
export OMP_NUM_THREADS=1

[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
pip() { .venv/bin/python -m pip "$1" -qq --disable-pip-version-check "${@:2}"; }
pip install --constraint constraints.txt --editable '.[dev]'
# Beside the default one and found before it: the same environment otherwise. Without the dependencies that 0.12 declares,
# which are those of its own test suite and of tools that are not used here.
[ -d "$OLD/megatron" ] || pip install --no-deps --target "$OLD" "megatron-core==$OLD_MEGATRON"

# Two modules at a time, each worker with its own ranks; -n 0 as an argument runs one after the other.
pytest() { .venv/bin/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder "$@"; }

echo "== ruff"
.venv/bin/python -m ruff check .

echo "== All tests, $(.venv/bin/python -m pip list 2>/dev/null | grep megatron-core | tr -s ' ')"
pytest "$@"

echo "== Tests that touch Megatron, megatron-core $OLD_MEGATRON"
PYTHONPATH="$PWD/$OLD${PYTHONPATH:+:$PYTHONPATH}" pytest -m megatron "$@"

#!/usr/bin/env bash
# Installs what the tests need into .venv, then runs formatter, linter, type checker and tests: all tests on the default
# megatron-core and, at the same time, those that touch Megatron on the oldest supported one.
#
#   bash scripts/test.sh [--full] [arguments for pytest]
#
# --full runs all combinations of parameters, which otherwise are covered pairwise. MEGATRON names the versions of
# megatron-core to test on, of which the default one gets all tests; WORKERS is the number of its test modules that run at a
# time. PYTHON and TORCH_INDEX_URL: see scripts/environment.py.
set -euo pipefail
cd "$(dirname "$0")/.."

export OMP_NUM_THREADS=1
"${PYTHON:-python3}" scripts/environment.py dev
python=$PWD/.venv/bin/python
default=$(sed -n 's/^megatron-core==//p' constraints.txt)
read -ra versions <<<"${MEGATRON:-$default $("$python" scripts/environment.py --oldest)}"

echo "== ruff"
"$python" -m ruff format --check .
"$python" -m ruff check .

# Each worker takes whole modules and has its own ranks.
run_pytest() { "$python" -m pytest -q --dist loadscope --no-loadscope-reorder "$@"; }

run_beside() { # version, arguments for pytest
  local folder=.venv/megatron-core-$1 version=$1 status=0
  shift
  # PYTHONPATH puts it before the default one; otherwise the environment is the same. It is installed without the
  # dependencies that older ones declare: those of their own test suites, tools that are not used here, and numpy before 2.
  [ -d "$folder/megatron" ] ||
    "$python" -m pip install -qq --disable-pip-version-check --no-deps --target "$folder" "megatron-core==$version"
  PYTHONPATH="$PWD/$folder${PYTHONPATH:+:$PYTHONPATH}" run_pytest -n 1 -m megatron -p no:cacheprovider "$@" || status=$?
  [ "$status" -eq 5 ] || return "$status" # 5: these arguments select no test that touches Megatron
}

logs=$(mktemp -d) failed=0
declare -A started=()
trap 'kill "${started[@]}" 2>/dev/null || true; rm -rf "$logs"' EXIT
"$python" scripts/check_types.py >"$logs/mypy" 2>&1 &
started[mypy]=$!
for version in "${versions[@]}"; do
  [ "$version" = "$default" ] && continue
  run_beside "$version" "$@" >"$logs/$version" 2>&1 &
  started[$version]=$!
done
if [[ " ${versions[*]} " == *" $default "* ]]; then
  echo "== All tests, megatron-core $default"
  run_pytest -n "${WORKERS:-2}" "$@" || failed=1
fi
for name in "${!started[@]}"; do
  wait "${started[$name]}" || failed=1
  unset "started[$name]"
  [ "$name" = mypy ] && echo "== mypy" || echo "== Tests that touch Megatron, megatron-core $name"
  cat "$logs/$name"
done
if [[ "$*" == "" || "$*" == --full ]]; then
  if [ -d .venv-frameworks ]; then
    echo "== ms-swift and verl"
    bash scripts/test_frameworks.sh || failed=1
  else
    echo "== ms-swift and verl were not run: bash scripts/test_frameworks.sh makes their environment and runs them"
  fi
fi
exit "$failed"

#!/usr/bin/env bash
# Tests a Megatron version, such as the newest, and reports what broke: patches whose signatures differ from a tried version.
#
#   bash scripts/try_megatron.sh VERSION|newest|CHECKOUT [--quick] [--steps signatures import tests table]
#
# VERSION is a wheel of megatron-core, CHECKOUT a folder of Megatron-LM, whose pretrain_gpt.py is run too. The exit status is
# 1 if anything failed. PYTHON and TORCH_INDEX_URL: see scripts/environment.py.
set -euo pipefail
cd "$(dirname "$0")/.."
wanted=${1:?name a version of megatron-core, newest, or the folder of a Megatron-LM checkout}
shift

export OMP_NUM_THREADS=1
if [ -d "$wanted" ]; then wanted=$(cd "$wanted" && pwd); fi
"${PYTHON:-python3}" scripts/environment.py dev
python=$PWD/.venv/bin/python
pip() { "$python" -m pip install -qq --disable-pip-version-check "$@"; }
pip --constraint constraints.txt six regex pydantic # imported by Megatron's training code but not declared
folder=$wanted
if [ ! -d "$wanted" ]; then
  folder=$PWD/.venv/megatron-core-$wanted
  [ "$wanted" != newest ] || rm -rf "$folder" # the newest version may have changed
  requirement=megatron-core==$wanted
  [ "$wanted" != newest ] || requirement=megatron-core
  [ -d "$folder/megatron" ] || pip --no-deps --target "$folder" "$requirement"
fi
exec "$python" tests/check try_megatron "$folder" "$@"

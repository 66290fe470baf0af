#!/usr/bin/env bash
# Checks the planner's ranking where that is possible without devices: two network namespaces as two hosts with two ranks each,
# for several rates of the link between them, and a full mesh of four namespaces. The kernel's rate and the links' rates are
# measured in the same run.
#   bash scripts/check_plan.sh [RATES, default "4gbit 400mbit 50mbit"] [RATES OF THE MESH, default "200mbit 50mbit"]   PYTHON=python
# Exit status 1 when the predicted fastest setting takes over 10 % longer than the measured fastest one, 77 where namespaces or tc
# are not permitted.
set -euo pipefail
cd "$(dirname "$0")/.."
status=0
for rate in ${1:-4gbit 400mbit 50mbit}; do
  echo "== $rate between the hosts for each rank"
  found=0
  RATE=$rate PROGRAM=scripts/check_plan.py bash scripts/two_hosts.sh all --rate "$rate" >/tmp/check_plan.$$ 2>/tmp/check_plan.$$.err || found=$?
  if ((found == 77)); then cat /tmp/check_plan.$$.err >&2; exit 77; fi
  grep '^a: ' /tmp/check_plan.$$ | sed 's/^a: //' || tail -n 20 /tmp/check_plan.$$.err
  ((found == 0)) || status=1
  rm -f /tmp/check_plan.$$ /tmp/check_plan.$$.err
done
for rate in ${2:-200mbit 50mbit}; do
  echo "== $rate between any two of four ranks"
  found=0
  RATE=$rate PROGRAM=scripts/check_plan.py bash scripts/mesh.sh || found=$?
  if ((found == 77)); then exit 77; fi
  ((found == 0)) || status=1
done
exit "$status"

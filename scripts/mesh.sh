#!/usr/bin/env bash
# A full mesh on one machine: a network namespace for each rank, and for each pair of them a link of its own, that fast in
# each direction (veth, tc tbf). Needs root (or the right to make namespaces), iproute2 and util-linux.
#   RATE=50mbit PROGRAM=scripts/check_plan.py bash scripts/mesh.sh [options of the program]      PYTHON=python RANKS=4
# Exit status 77 where namespaces or tc are not permitted.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} RANKS=${RANKS:-4}
: "${RATE:?set RATE, such as 50mbit}" "${PROGRAM:?set PROGRAM, such as scripts/check_plan.py}"
NAME=cpm$$
OUTPUT=$(mktemp -d)

cleanup() {
  local pid rank
  for pid in $(jobs -p); do kill "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  for ((rank = 0; rank < RANKS; rank++)); do ip netns del "$NAME$rank" 2>/dev/null || true; done
  rm -rf "$OUTPUT"
}
trap cleanup EXIT

refuse() {
  echo "mesh.sh: $1 here" >&2
  exit 77
}

ISOLATED=(unshare --pid --fork --kill-child --mount-proc)  # no rank sees another's memory
for ((rank = 0; rank < RANKS; rank++)); do
  ip netns add "$NAME$rank" 2>/dev/null || refuse "namespaces are not permitted"
  ip netns exec "$NAME$rank" "${ISOLATED[@]}" true 2>/dev/null || refuse "unshare --pid is not permitted"
  ip -n "$NAME$rank" link set lo up
  # A rank's address lies on no link, so that every peer reaches it by the link between them.
  ip -n "$NAME$rank" link add d0 type dummy 2>/dev/null || ip -n "$NAME$rank" link add d0 type bridge || refuse "there is neither dummy nor bridge"
  ip -n "$NAME$rank" addr add "10.99.0.$((rank + 1))/32" dev d0
  ip -n "$NAME$rank" link set d0 up
  ip netns exec "$NAME$rank" sysctl -qw net.ipv4.tcp_slow_start_after_idle=0 net.ipv4.conf.all.rp_filter=0
done

# one_way FROM TO: the end of the link at FROM, its rate, and the route over it. Nothing is dropped: the queue holds what
# TCP sends.
one_way() {
  local near="$NAME$1" device="v$1-$2" subnet=10.98.$(($1 < $2 ? $1 * RANKS + $2 : $2 * RANKS + $1)) place=$(($1 < $2 ? 1 : 2))
  tc -n "$near" qdisc add dev "$device" root tbf rate "$RATE" burst 64kb limit 64mb 2>/dev/null || refuse "tc cannot limit the rate of a link"
  ip -n "$near" route add "10.99.0.$(($2 + 1))/32" via "$subnet.$((3 - place))" dev "$device" src "10.99.0.$(($1 + 1))" \
    initcwnd 3000 initrwnd 3000 congctl reno
}

for ((rank = 0; rank < RANKS; rank++)); do
  for ((peer = rank + 1; peer < RANKS; peer++)); do
    ip link add "v$rank-$peer" netns "$NAME$rank" type veth peer name "v$peer-$rank" netns "$NAME$peer"
    ip -n "$NAME$rank" addr add "10.98.$((rank * RANKS + peer)).1/30" dev "v$rank-$peer"
    ip -n "$NAME$peer" addr add "10.98.$((rank * RANKS + peer)).2/30" dev "v$peer-$rank"
    ip -n "$NAME$rank" link set "v$rank-$peer" up
    ip -n "$NAME$peer" link set "v$peer-$rank" up
    one_way "$rank" "$peer"
    one_way "$peer" "$rank"
  done
done

PIDS=()
for ((rank = 0; rank < RANKS; rank++)); do
  ip netns exec "$NAME$rank" "${ISOLATED[@]}" env GLOO_SOCKET_IFNAME=d0 OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" \
    "$PYTHON" -m torch.distributed.run --nnodes "$RANKS" --node-rank "$rank" --nproc-per-node 1 --master-addr 10.99.0.1 \
    --master-port 29532 "$PROGRAM" --mesh --rate "$RATE" "$@" >"$OUTPUT/$rank.out" 2>"$OUTPUT/$rank.err" &
  PIDS+=($!)
done
STATUS=0
for pid in "${PIDS[@]}"; do wait "$pid" || STATUS=1; done
cat "$OUTPUT/0.out"
if ((STATUS)); then tail -n 20 "$OUTPUT"/*.err >&2; fi
exit "$STATUS"

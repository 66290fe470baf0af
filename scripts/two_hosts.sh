#!/usr/bin/env bash
# Two hosts on one machine: two network namespaces joined by a veth pair, each with process numbers of its own, torchrun with
# two ranks on each, so that what crosses the network is really crossed. Needs root (or the right to make namespaces),
# iproute2 and util-linux.
#   bash scripts/two_hosts.sh hybrid|double_ring|hybrid,double_ring [options of two_hosts_attention.py]      PYTHON=python
#   RATE=500mbit        a link for each of the two ranks of a host, that fast in each direction (tc tbf), instead of one unlimited
#   PROGRAM=scripts/x.py instead of two_hosts_attention.py
#   CUT_AFTER=SECONDS   take the link down that long after the first step; both sides must then exit with an error
# Exit status 77 where namespaces are not permitted.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
IFS=, read -ra ALGORITHMS <<<"${1:?usage: bash scripts/two_hosts.sh hybrid|double_ring|hybrid,double_ring [options]}"
shift
NAME=cp$$
OUTPUT=$(mktemp -d)

cleanup() {
  local pid
  for pid in $(jobs -p); do kill "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  ip netns del "${NAME}a" 2>/dev/null || true
  ip netns del "${NAME}b" 2>/dev/null || true
  rm -rf "$OUTPUT"
}
trap cleanup EXIT

ISOLATED=(unshare --pid --fork --kill-child --mount-proc)  # ranks of one host see each other's memory, those of the other not
if ! ip netns add "${NAME}a" 2>/dev/null || ! ip netns exec "${NAME}a" "${ISOLATED[@]}" true 2>/dev/null; then
  echo "two_hosts.sh: namespaces are not permitted here (ip netns add, unshare --pid)" >&2
  exit 77
fi
ip netns add "${NAME}b"
ip link add "${NAME}0" netns "${NAME}a" type veth peer name "${NAME}1" netns "${NAME}b"

# up SUFFIX INDEX: address and loopback of one host. Offloads stay on: the device then counts large segments with one header each.
up() {
  ip -n "$NAME$1" addr add "10.203.7.$(($2 + 1))/24" dev "$NAME$2"
  ip -n "$NAME$1" link set "$NAME$2" up
  ip -n "$NAME$1" link set lo up
}
up a 0
up b 1

# One link for each local rank: what is sent to a rank leaves by the link that its address belongs to.
LINKS=""
if [[ -n ${RATE:-} ]]; then
  ip link add "${NAME}2" netns "${NAME}a" type veth peer name "${NAME}3" netns "${NAME}b"
  for end in a0 a2 b1 b3; do
    suffix=${end:0:1} index=${end:1}
    if ((index > 1)); then
      ip -n "$NAME$suffix" addr add "10.203.8.$((index - 1))/24" dev "$NAME$index"
      ip -n "$NAME$suffix" link set "$NAME$index" up
    fi
    # Nothing is dropped and nothing starts slowly, as on the links between accelerators: the queue holds whatever TCP
    # sends, and TCP sends whatever there is.
    if ! ip netns exec "$NAME$suffix" tc qdisc add dev "$NAME$index" root tbf rate "$RATE" burst 64kb limit 64mb; then
      echo "two_hosts.sh: tc cannot limit the rate of a link here" >&2
      exit 77
    fi
    ip -n "$NAME$suffix" route change "10.203.$((7 + index / 2)).0/24" dev "$NAME$index" initcwnd 3000 initrwnd 3000 congctl reno
    ip netns exec "$NAME$suffix" sysctl -qw net.ipv4.tcp_slow_start_after_idle=0
  done
  LINKS=yes
fi

host() {
  local suffix=$1 index=$2
  shift 2
  ip netns exec "$NAME$suffix" "${ISOLATED[@]}" env GLOO_SOCKET_IFNAME="$NAME$index" LINKS="${LINKS:+$NAME$index,$NAME$((index + 2))}" OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" \
    "$PYTHON" -m torch.distributed.run --nnodes 2 --node-rank "$index" --nproc-per-node 2 --master-addr 10.203.7.1 --master-port 29531 \
    "${PROGRAM:-scripts/two_hosts_attention.py}" --algorithm "${ALGORITHMS[@]}" --counter "/sys/class/net/$NAME$index/statistics/tx_bytes" "$@"
}

EXTRA=()
if [[ -n ${CUT_AFTER:-} ]]; then EXTRA=(--steps-until-cut); fi
host a 0 "$@" "${EXTRA[@]}" >"$OUTPUT/a.out" 2>"$OUTPUT/a.err" &
FIRST=$!
host b 1 "$@" "${EXTRA[@]}" >"$OUTPUT/b.out" 2>"$OUTPUT/b.err" &
SECOND=$!

if [[ -n ${CUT_AFTER:-} ]]; then
  until grep -q running "$OUTPUT/a.out" || ! kill -0 "$FIRST" 2>/dev/null; do sleep 0.2; done
  sleep "$CUT_AFTER"
  ip -n "${NAME}a" link set "${NAME}0" down
  echo "link cut"
fi
STATUS_A=0 STATUS_B=0
wait "$FIRST" || STATUS_A=$?
wait "$SECOND" || STATUS_B=$?
sed 's/^/a: /' "$OUTPUT/a.out"
sed 's/^/b: /' "$OUTPUT/b.out"
sed 's/^/a: /' "$OUTPUT/a.err" >&2
sed 's/^/b: /' "$OUTPUT/b.err" >&2
echo "exit status: $STATUS_A on the first host, $STATUS_B on the second"
((STATUS_A == 0 && STATUS_B == 0))

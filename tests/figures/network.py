"""Hosts on one machine: network namespaces, joined by links with a rate of their own.

Each host has process numbers of its own too, so that its ranks see each other's memory and that of no other host. Needs
root (or the right to make namespaces), iproute2 and util-linux. On a link nothing is dropped and nothing starts slowly,
as between accelerators: the queue holds whatever TCP sends, and TCP sends whatever there is.
"""

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO

REFUSED = 77  # the exit status that means "cannot be tried here"
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
ISOLATED = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
# Starts the ranks of a host; its status is 1 when one of them failed.
RANKS = """
for ((i = 0; i < LOCAL_WORLD_SIZE; i++)); do
  RANK=$((FIRST_RANK + i)) LOCAL_RANK=$i "$@" & ranks+=("$!")
done
for rank in "${ranks[@]}"; do wait "$rank" || failed=1; done
exit "${failed:-0}"
"""
AT_ONCE = ("initcwnd", "3000", "initrwnd", "3000", "congctl", "reno")  # of a route
SETTINGS = (
    "tcp_slow_start_after_idle=0", "conf.all.rp_filter=0", "tcp_rmem=4096 4194304 8388608",
    "tcp_wmem=4096 4194304 8388608",
)  # fmt: skip


def bits_per_second(rate: str) -> float:
    """ "20mbit" -> 2e7."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if found is None:
        raise ValueError(f"RATE {rate} must be a number with kbit, mbit or gbit; try 20mbit.")
    return float(found[1]) * UNITS[found[2]]


@dataclass(frozen=True)
class Network:
    """Hosts by the names of their namespaces.

    Args:
        address: of the first host. device: which the ranks of a host listen on.
    """

    hosts: tuple[str, ...]
    address: str
    device: str

    def start(self, host: int, ranks: int, command: Sequence[str], port: int, **files: IO[str]) -> subprocess.Popen:
        """Start ``ranks`` processes of ``command`` on one host, with the variables that torch.distributed reads."""
        own = {
            "MASTER_ADDR": self.address, "MASTER_PORT": port, "WORLD_SIZE": ranks * len(self.hosts),
            "LOCAL_WORLD_SIZE": ranks, "FIRST_RANK": host * ranks, "GLOO_SOCKET_IFNAME": self.device,
            "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        environment = os.environ | {name: str(value) for name, value in own.items()}
        inside = ["ip", "netns", "exec", self.hosts[host], *ISOLATED]
        return subprocess.Popen([*inside, "bash", "-c", RANKS, "ranks", *command], env=environment, text=True, **files)

    def sent(self, host: int, device: str) -> int:
        """Bytes that left ``host`` by this device, headers included."""
        path = f"/sys/class/net/{device}/statistics/tx_bytes"
        # A namespace's own devices show in a sysfs that is mounted inside it.
        return int(subprocess.check_output(["ip", "netns", "exec", self.hosts[host], "cat", path]))

    def cut(self) -> None:
        """Take the first link of the first host down."""
        call("ip", "-n", self.hosts[0], "link", "set", self.device, "down")


def call(*words: object) -> None:
    """Run a command that makes a network.

    Raises:
        PermissionError: this machine does not let us, or has no such command.
    """
    try:
        subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        raise PermissionError(f"no network namespaces here: {said.decode(errors='replace').strip()}") from error


@contextmanager
def _hosts(count: int) -> Iterator[tuple[str, ...]]:
    """Namespaces without links; all is gone afterwards."""
    names = tuple(f"cp{os.getpid()}-{host}" for host in range(count))
    try:
        for name in names:
            call("ip", "netns", "add", name)
            call("ip", "netns", "exec", name, *ISOLATED, "true")
            call("ip", "-n", name, "link", "set", "lo", "up")
            for setting in SETTINGS:
                subprocess.run(["ip", "netns", "exec", name, "sysctl", "-qw", f"net.ipv4.{setting}"], check=False)
        yield names
    finally:
        for name in names:
            with suppress(PermissionError):
                call("ip", "netns", "del", name)


def _join(ends: Sequence[tuple[str, str, str]]) -> None:
    """A link between two (namespace, device, address)."""
    (first, device, _), (second, peer, _) = ends
    call("ip", "link", "add", device, "netns", first, "type", "veth", "peer", "name", peer, "netns", second)
    for name, device, address in ends:
        call("ip", "-n", name, "addr", "add", address, "dev", device)
        call("ip", "-n", name, "link", "set", device, "up")


@contextmanager
def two_hosts(links: int = 1, rate: str | None = None) -> Iterator[Network]:
    """Two hosts with so many links between them, eth0 and on, each of this rate in each direction."""
    with _hosts(2) as names:
        for link in range(links):
            device = f"eth{link}"
            _join([(name, device, f"10.203.{7 + link}.{host + 1}/24") for host, name in enumerate(names)])
            for name in names if rate else ():
                call("tc", "-n", name, "qdisc", "add", "dev", device, "root", "tbf", "rate", rate,
                     "burst", "64kb", "limit", "64mb")  # fmt: skip
                call("ip", "-n", name, "route", "change", f"10.203.{7 + link}.0/24", "dev", device, *AT_ONCE)
        yield Network(names, "10.203.7.1", "eth0")


def mesh_device(host: int, peer: int) -> str:
    """The end at ``host`` of its link to ``peer``."""
    return f"v{host}-{peer}"


@contextmanager
def mesh(count: int, rate: str | None = None) -> Iterator[Network]:
    """Hosts with a link between any two; each is reached by an address that lies on no link."""
    with _hosts(count) as names:
        for host, name in enumerate(names):
            try:
                call("ip", "-n", name, "link", "add", "d0", "type", "dummy")
            except PermissionError:  # a kernel without dummies
                call("ip", "-n", name, "link", "add", "d0", "type", "bridge")
            call("ip", "-n", name, "addr", "add", f"10.99.0.{host + 1}/32", "dev", "d0")
            call("ip", "-n", name, "link", "set", "d0", "up")
        for host in range(count):
            for peer in range(host + 1, count):
                _join_in_mesh(names, host, peer, rate)
        yield Network(names, "10.99.0.1", "d0")


def _join_in_mesh(names: Sequence[str], host: int, peer: int, rate: str | None) -> None:
    """A link with a route and a rate in each direction."""
    subnet, pairs = f"10.98.{host * len(names) + peer}", ((host, peer), (peer, host))
    _join([(names[me], mesh_device(me, other), f"{subnet}.{at}/30") for at, (me, other) in enumerate(pairs, 1)])
    for at, (me, other) in enumerate(pairs, 1):
        device = mesh_device(me, other)
        call("ip", "-n", names[me], "route", "add", f"10.99.0.{other + 1}/32", "via", f"{subnet}.{3 - at}",
             "dev", device, "src", f"10.99.0.{me + 1}", *AT_ONCE)  # fmt: skip
        if rate is not None:
            _limit(names[me], device, rate)


def _limit(name: str, device: str, rate: str) -> None:
    """Let data pass at this rate; acknowledgements, packets of less than 128 bytes, are not held up behind it."""

    def tc(*words: object) -> None:
        call("tc", "-n", name, words[0], "add", "dev", device, *words[1:])

    tc("qdisc", "root", "handle", "1:", "htb", "default", 10)
    tc("class", "parent", "1:", "classid", "1:10", "htb", "rate", rate, "quantum", 3000, "burst", "64kb")
    tc("class", "parent", "1:", "classid", "1:20", "htb", "rate", "10gbit", "quantum", 3000)
    small = ("match", "u16", "0x0000", "0xff80", "at", 2)
    tc("filter", "parent", "1:", "protocol", "ip", "u32", *small, "flowid", "1:20")

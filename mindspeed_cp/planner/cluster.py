"""The planner's model of the machines: peak rates of devices and links, and the fraction that they reach."""

from dataclasses import MISSING, dataclass, field, replace
from math import inf
from typing import Any

HEAD_DIM = 128  # head dimension at which attention_efficiency is given


def _field(help: str, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Cluster:
    """Nodes of devices, their peak rates, and the fractions of these that are reached; each field is a flag.

    Rates are FLOP/s in the precision of the matrix products, and bytes/s in one direction; a latency is in seconds.
    ``attention_efficiency`` holds for heads of HEAD_DIM. Consecutive global ranks share a node. ``links`` counts the
    peers of its node that a device reaches at once: 1 with a switch, where all share its port.
    """

    devices_per_node: int = _field("neighbouring devices of a node, such as 8")
    flops: float = _field("peak of a device, such as 320TFLOP/s")
    intra_bandwidth: float = _field("of one link within a node, one way, such as 28GB/s")
    inter_bandwidth: float = _field("of one adapter between nodes, one way, such as 200Gbit/s")
    latency: float = _field("of a transfer, such as 10us", 10e-6)
    compute_efficiency: float = _field("share of --flops that large matrix products reach, such as 0.8", 0.5)
    link_efficiency: float = _field("share of the links' rate that is reached, such as 0.8", 0.8)
    attention_efficiency: float = _field("share of --flops that attention reaches in long blocks, such as 0.6", 0.5)
    half_rows: float = _field("rows of a matrix product with which it reaches half of that, such as 256", 0.0)
    half_tokens: float = _field("tokens of a block with which attention reaches half of that, such as 512", 0.0)
    half_head: float = _field("size of a head with which attention reaches half of that, such as 32", 0.0)
    links: int = _field("peers within a node that a device reaches at once: 1 at a switch, 7 in a mesh of 8", 1)
    devices_per_adapter: int = _field("that share an adapter between nodes, such as 1", 1)
    memory: float = 64e9  # bytes of one device; --memory has a help of its own
    memory_bandwidth: float = _field("of a device, such as 1600GB/s", inf)

    def __post_init__(self) -> None:
        for name in ("devices_per_node", "flops", "intra_bandwidth", "inter_bandwidth", "memory"):
            if not 0 < getattr(self, name) < inf:
                raise ValueError(f"{_flag(name)} {getattr(self, name)} must be above 0 and finite.")
        for name in ("links", "devices_per_adapter", "memory_bandwidth"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{_flag(name)} {getattr(self, name)} must be at least 1.")
        for name in ("latency", "half_rows", "half_tokens", "half_head"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{_flag(name)} {getattr(self, name)} must be 0 or more, and finite.")
        for name in ("compute_efficiency", "attention_efficiency", "link_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{_flag(name)} {getattr(self, name)} must lie above 0 and be at most 1, such as 0.5.")

    def node(self, global_rank: int) -> int:
        return global_rank // self.devices_per_node

    def bandwidth(self, inter: bool, peers: int = 1) -> float:
        """Bytes/s that one device reaches in one direction, to ``peers`` peers at once."""
        if inter:
            return self.inter_bandwidth * self.link_efficiency / self.devices_per_adapter
        return self.intra_bandwidth * self.link_efficiency * min(max(peers, 1), self.links)

    def link(self, rank: int, peer: int) -> tuple[bool, int]:
        """(whether the link to ``peer`` leaves the node, its number); transfers on one link queue."""
        if self.node(rank) != self.node(peer):
            return True, 0
        return False, (peer - rank) % self.devices_per_node % self.links

    def product_seconds(self, flops: float, rows: float, columns: float) -> float:
        """Seconds of matrix products with ``rows`` rows, where ``columns`` is the smaller of the other two sizes."""
        share = rows / (rows + self.half_rows) * columns / (columns + self.half_rows)
        return flops / (self.flops * self.compute_efficiency * share)

    def attention_seconds(self, flops: float, tokens: float, head_dim: int) -> float:
        """Seconds of the attention kernel for a block whose shorter side has ``tokens`` tokens."""
        head = min(head_dim, HEAD_DIM)
        share = tokens / (tokens + self.half_tokens)
        share *= head / (head + self.half_head) * (HEAD_DIM + self.half_head) / HEAD_DIM
        return flops / (self.flops * self.attention_efficiency * share)

    @property
    def attention_rate(self) -> float:
        """FLOP/s of attention with long blocks and heads of HEAD_DIM."""
        return self.flops * self.attention_efficiency


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# The fraction of the peaks that kernels reach is published for NVIDIA's devices; docs/choosing.md gives the sources.
# Products reach half of it with ``rows`` rows, attention with blocks of ``tokens`` tokens.
def _reached(cluster: Cluster, products: float, attention: float, rows: float, tokens: float) -> Cluster:
    return replace(
        cluster, compute_efficiency=products, attention_efficiency=attention, half_rows=rows, half_tokens=tokens,
        half_head=32.0,
    )  # fmt: skip


def _ascend(cluster: Cluster) -> Cluster:
    return _reached(cluster, 0.75, 0.55, 256, 512)


# Published dense bf16 peaks of one device, and of its links in one direction; docs/choosing.md gives the sources.
CLUSTERS = {
    # Ascend/msmodeling (Huawei's simulator), tensor_cast/device.py: ATLAS_800_A2_313T_64G. Its 196 GB/s of HCCS are a
    # full mesh of seven links; RoCE between.
    "ascend-910b": _ascend(Cluster(8, 294.9e12, 28e9, 25e9, links=7, memory=64e9, memory_bandwidth=1.6e12)),
    # One of its two dies, which frameworks see as devices. Same source: ATLAS_800_A3_752T_128G_DIE; RoCE: half of the
    # 400 Gbit/s of arXiv 2506.12708. In a supernode the links within (UB, switched) span up to 768 dies.
    "ascend-910c": _ascend(Cluster(16, 353.9e12, 196e9, 25e9, memory=64e9, memory_bandwidth=1.6e12)),
    # NVIDIA A100 and DGX A100 datasheets: NVLink 600 GB/s both ways, a 200 Gbit/s adapter for each device.
    "a100": _reached(Cluster(8, 312e12, 300e9, 25e9, memory=80e9, memory_bandwidth=2.0e12), 0.87, 0.62, 128, 384),
    # NVIDIA H100 datasheet (SXM), DGX BasePOD: NVLink 900 GB/s both ways, a 400 Gbit/s adapter for each device.
    "h100": _reached(Cluster(8, 989e12, 450e9, 50e9, memory=80e9, memory_bandwidth=3.35e12), 0.80, 0.60, 256, 512),
}
# Devices with NVLink or HCCS within a node; others must be described by --flops and further flags.
DEVICE_NAMES = {"910B": "ascend-910b", "910_93": "ascend-910c", "910C": "ascend-910c", "A100": "a100", "H100": "h100"}
THIS_MACHINE = "this-machine"  # measured when it is named, and not stored
DEFAULT = "ascend-910b"  # if no cluster is named and no accelerator is found


def known_device(name: str) -> str | None:
    """The preset for a device name from the driver, or None."""
    return next((preset for part, preset in DEVICE_NAMES.items() if part in name), None)

"""What the planner must know of the machines."""

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Cluster:
    """Devices in nodes, with peak rates and the share of them that is reached.

    Args:
        devices_per_node: neighbouring global ranks that share a node.
        flops: peak of one device in the precision of attention, FLOP/s.
        intra_bandwidth, inter_bandwidth: peak of one device, in one direction, within and between nodes, bytes/s.
        latency: of one transfer, seconds.
        compute_efficiency, link_efficiency: reached share of the peaks, above 0 and at most 1. Assumed, not measured.
    """

    devices_per_node: int
    flops: float
    intra_bandwidth: float
    inter_bandwidth: float
    latency: float = 10e-6
    compute_efficiency: float = 0.5
    link_efficiency: float = 0.8

    def __post_init__(self) -> None:
        for name in ("devices_per_node", "flops", "intra_bandwidth", "inter_bandwidth"):
            if not 0 < getattr(self, name) < inf:
                raise ValueError(f"{_flag(name)} {getattr(self, name)} must be above 0 and finite.")
        if not 0 <= self.latency < inf:
            raise ValueError(f"--latency {self.latency} must be 0 or more seconds, and finite.")
        for name in ("compute_efficiency", "link_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{_flag(name)} {getattr(self, name)} must lie above 0 and be at most 1, such as 0.5.")

    def node(self, global_rank: int) -> int:
        return global_rank // self.devices_per_node

    def bandwidth(self, inter: bool) -> float:
        """Reached bytes/s of one device in one direction."""
        return (self.inter_bandwidth if inter else self.intra_bandwidth) * self.link_efficiency

    @property
    def rate(self) -> float:
        """Reached FLOP/s of one device."""
        return self.flops * self.compute_efficiency


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# Dense bf16 peaks of one device and its links, one way, as the vendors publish them; docs/choosing.md says where.
CLUSTERS = {
    # Ascend/msmodeling (Huawei's simulator), tensor_cast/device.py: ATLAS_800_A2_313T_64G; HCCS within, RoCE between.
    "ascend-910b": Cluster(8, 294.9e12, 196e9, 25e9),
    # One of its two dies, as frameworks see them. There too: ATLAS_800_A3_752T_128G_DIE; RoCE: half of the 400
    # Gbit/s of arXiv 2506.12708. In a supernode the links within (UB) span up to 768 dies.
    "ascend-910c": Cluster(16, 353.9e12, 196e9, 25e9),
    # NVIDIA A100 and DGX A100 datasheets: NVLink 600 GB/s both ways, a 200 Gbit/s adapter for each device.
    "a100": Cluster(8, 312e12, 300e9, 25e9),
    # NVIDIA H100 datasheet (SXM), DGX BasePOD: NVLink 900 GB/s both ways, a 400 Gbit/s adapter for each device.
    "h100": Cluster(8, 989e12, 450e9, 50e9),
}
THIS_MACHINE = "this-machine"  # measured where and when it is named, and written nowhere

"""How, and in which form, keys and values travel in a call: as configured, or chosen by bytes and topology."""

from typing import Literal

from mindspeed_cp.attention.expansion import Expansion
from mindspeed_cp.attention.ring_plan import ring_plan
from mindspeed_cp.comm.groups import ContextParallelGroups, Linkage
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.slice_mask import SliceMask
from mindspeed_cp.settings.config import ContextParallelConfig

Exchange = Literal["ring", "direct", "mesh", "allgather"]

# FLOPs of matrix products per byte on the links, in equal time, rounded down from the planner's presets.
FLOPS_PER_BYTE: dict[Linkage, int] = {"switch": 1000, "mesh": 1000, "nodes": 10000}
NODES_IN_FLIGHT = 2  # between servers, one more step in flight evens out the delays of shared links


def exchange_for(
    config: ContextParallelConfig,
    groups: ContextParallelGroups,
    layout: SequenceLayout,
    masks: tuple[SliceMask, ...],
    dense: bool,
) -> Exchange:
    """The exchange of a call. "auto" means the mesh exchange if each pair of ranks has its own link, else the direct
    exchange if it sends less than the ring.
    """
    row = config.row.exchange or "ring"
    if row != "ring" or config.kv_exchange == "ring":
        return row
    if config.kv_exchange != "auto":
        return config.kv_exchange
    if config.hierarchy[2] > 1:
        return "ring"
    if groups.topology == "mesh":
        return "mesh"
    return "direct" if not dense and ring_plan(layout, masks, True, exact=True).direct_sends_less else "ring"


def steps_in_flight(config: ContextParallelConfig, exchange: Exchange, topology: Linkage) -> int:
    """How many steps may be in flight. "auto" means as many as there are links if each step uses a different one (the
    direct exchange, or a window of Double Ring, on a mesh), and one if a step uses all links.
    """
    if config.in_flight != "auto":
        return config.in_flight
    _, window, windows = config.hierarchy
    if exchange == "direct" or (exchange == "ring" and windows > 1):
        return {"mesh": max(window - 1, 1), "switch": 1, "nodes": NODES_IN_FLIGHT}[topology]
    return 1


def sends_latents(config: ContextParallelConfig, expansion: Expansion, topology: Linkage, itemsize: int) -> bool:
    """Whether the inputs of ``expansion`` travel instead of the keys and values that it computes.

    "auto" compares the bytes that this saves with the FLOPs that are repeated. Both are proportional to the rows that
    travel, so one row, forward and backward, decides, and the result is the same on all ranks.

    Args:
        expansion: for all heads of the call. itemsize: bytes per element that travels.
    """
    if config.context_parallel_size == 1:
        return False
    if config.mla_exchange != "auto":
        return config.mla_exchange == "latent"
    ulysses, ring = config.hierarchy[0], config.ring_size
    heads, rows = expansion.kv_heads * (expansion.dk + expansion.dv), sum(expansion.widths)
    # Ulysses sends each rank its heads of a row, or the whole latent; the ring then sends rows of a Ulysses group.
    saved = (ulysses - 1) * (heads / ulysses - rows) + (ring - 1) * (heads - ulysses * rows)
    # Forward expands all rows instead of the rank's own; backward expands all again and computes their gradients.
    repeated = (ring - 1) + ring + 2 * (ring - 1)
    # Keys and values travel twice, and their gradients once.
    return 3 * saved * itemsize * FLOPS_PER_BYTE[topology] >= repeated * expansion.flops

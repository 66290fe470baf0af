"""How keys and values travel around the ring of one call: what the configuration says, or what suits the links."""

from typing import Literal

from mindspeed_cp.attention.ring_plan import ring_plan
from mindspeed_cp.comm.groups import ContextParallelGroups, Linkage
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.slice_mask import SliceMask
from mindspeed_cp.settings.config import ContextParallelConfig

Exchange = Literal["ring", "direct", "mesh", "allgather"]

NODES_IN_FLIGHT = 2  # between servers one step more under way evens out what links of several users delay


def exchange_for(
    config: ContextParallelConfig,
    groups: ContextParallelGroups,
    layout: SequenceLayout,
    masks: tuple[SliceMask, ...],
    dense: bool,
) -> Exchange:
    """The exchange of a call. "auto" is the mesh exchange where each pair of ranks has a link of its own, else direct
    where that sends less than the ring.
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
    """How many steps may be under way. "auto" is as many as there are links where each step uses another one (direct
    exchange, and a window of Double Ring, on a mesh), and one where one step fills all links.
    """
    if config.in_flight != "auto":
        return config.in_flight
    _, window, windows = config.hierarchy
    if exchange == "direct" or (exchange == "ring" and windows > 1):
        return {"mesh": max(window - 1, 1), "switch": 1, "nodes": NODES_IN_FLIGHT}[topology]
    return 1

"""What rank 0 prints about the first batch that a model computes: the contents of settings/start_block.py."""

from mindspeed_cp.linear.rows import contiguous_parts, conversion
from mindspeed_cp.megatron.records import MicroBatch
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.settings import layers
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.start_block import Start

EXCHANGES = {
    "ring": "keys and values go round the ring",
    "direct": "each rank sends what its peer needs",
    "mesh": "slices of keys and values to all at once",
    "auto": "keys and values by whichever exchange sends less",
    "allgather": "keys and values by one all-gather",
}


def start_of(record: MicroBatch, config: ContextParallelConfig, kernel: str, patches: tuple[int, int]) -> Start:
    """The Start block for ``record``, the first batch.

    Args:
        config: configuration of the group over which the batch was split.
        kernel, patches: as in ``Start``.
    """
    lengths = [record.layout.length(rank) for rank in range(record.layout.cp_size)]
    return Start(
        config.describe(),
        _sizes(config),
        record.seq_len,
        (min(lengths), max(lengths)),
        _layout(record.layout, config),
        kernel,
        _exchange(config),
        _documents(record),
        patches,
    )


def _layout(layout: SequenceLayout, config: ContextParallelConfig) -> str:
    """The layout of all attention layers, and how many rows of a rank travel for each layer with a recurrent state if
    --cp-linear-exchange state needs one part per rank.
    """
    if config.linear_exchange != "state":
        return layout.kind
    plan = conversion(layout, contiguous_parts(layout))
    ranks = range(layout.cp_size)
    leaving = [sum(b - a for to in ranks if to != rank for a, b in plan.sent(rank, to)) for rank in ranks]
    return f"{layout.kind}, of which {max(leaving):,} travel around layers with a state" if plan.moves else layout.kind


def _exchange(config: ContextParallelConfig) -> str:
    """How keys and values, or heads, travel, for each kind of layers."""
    others = [each for each in config.layer_configs if config.layers_of(each)]
    said = [f"{layers.said(config.layers_of(each))}: {_way(each)}" for each in others]
    return "; ".join([_way(config.other_layers), *said])


def _way(config: ContextParallelConfig) -> str:
    ways = ["heads for tokens"] if config.hierarchy[0] > 1 else []
    if config.ring_size > 1:
        ways.append(EXCHANGES["allgather" if config.row.exchange == "allgather" else config.kv_exchange])
    return ", then ".join(ways)


def _documents(record: MicroBatch) -> str:
    if record.slices is not None:
        numbers = {len(row) for row in record.slices}
        return f"and masks as slices ({', '.join(map(str, sorted(numbers)))} here)"
    if record.documents is None:
        return "not known"
    numbers = {len(row) - 1 for row in record.documents}
    return f"kept apart ({', '.join(map(str, sorted(numbers)))} here)"


def _sizes(config: ContextParallelConfig) -> dict[str, int]:
    """The size of every kind of parallelism, as far as Megatron made the groups; other groups are not known here."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return {"cp": config.context_parallel_size}
    return {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "cp": config.context_parallel_size,
        "dp": parallel_state.get_data_parallel_world_size(),
    }

"""HCCL's buffers: the largest message of each process group, and the group option that fits it.

A communicator of HCCL takes twice HCCL_BUFFSIZE (default 200 MB) of device memory. Every message goes through that
buffer, in pieces if it is larger, and each piece waits for the previous one.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.training_setup import TrainingSetup

DEFAULT_MEGABYTES = 200
P2P_MEGABYTES = 20  # buffer of the communicator that single messages (isend, irecv) make for each pair
SMALLEST, LARGEST = 16, 800  # MB; above the largest, splitting into pieces costs less than the memory
MEGABYTE = 1 << 20


class AttentionShape(NamedTuple):
    """The attention of one layer on a tensor-parallel rank.

    Args:
        heads, kv_heads: heads of the rank.
        itemsize: bytes of an element of the training's dtype.
    """

    seq_len: int
    batch: int
    heads: int
    kv_heads: int
    dk: int
    dv: int
    itemsize: int


def largest_messages(
    config: ContextParallelConfig, shape: AttentionShape, num_layers: int | None = None
) -> dict[str, int]:
    """Bytes of the largest message of every process group that carries attention, by the name of the group.

    Args:
        num_layers: of the model; None counts all settings of layers.
    """
    found = dict[str, int]()
    for each in config.used_by(num_layers):
        for name, num_bytes in _messages_of(each, shape).items():
            found[name] = max(found.get(name, 0), num_bytes)
    return found


def _messages_of(config: ContextParallelConfig, shape: AttentionShape) -> dict[str, int]:
    """The same of layers that share their settings.

    For an all-to-all it is all data that a rank sends in it; for the ring one shard of keys and values, or of their
    gradients, which has the same size.
    """
    cp, (ulysses, window, windows) = config.context_parallel_size, config.hierarchy
    if cp == 1:
        return {}
    found, kv_heads, rows = {}, shape.kv_heads, -(-shape.seq_len // cp) * shape.batch
    if ulysses > 1:
        kv_heads = math.lcm(kv_heads, ulysses)
        width = shape.heads * shape.dk + kv_heads * (shape.dk + shape.dv)
        found["ulysses" if ulysses < cp else "cp"] = rows * width * shape.itemsize
    if window * windows > 1:
        # After the Ulysses exchange there are more rows of fewer heads, in total the same number of elements.
        shard = rows * kv_heads * (shape.dk + shape.dv) * shape.itemsize
        found["ring" if ulysses > 1 else "cp"] = shard
        if windows > 1:
            found["outer"] = shard
    return found


def megabytes_for(num_bytes: int) -> int:
    """Return the HCCL_BUFFSIZE for messages of this size."""
    return min(max(num_bytes // MEGABYTE + 1, SMALLEST), LARGEST)


def shape_of(setup: TrainingSetup) -> AttentionShape | None:
    """Return the shape that a launch describes; None if a size is missing."""
    heads, tp = setup.num_attention_heads, setup.tensor_parallel_size
    if heads is None or setup.seq_length is None or setup.head_dim is None:
        return None
    kv_heads = max(1, (setup.num_query_groups or heads) // tp)
    itemsize = 2 if setup.half_precision else 4
    dim = setup.head_dim
    return AttentionShape(setup.seq_length, setup.micro_batch_size, heads // tp, kv_heads, dim, dim, itemsize)


def buffers_of(config: ContextParallelConfig, setup: TrainingSetup) -> dict[str, int]:
    """MB of the buffer of every process group, by the name of the group; empty where the sizes are not known."""
    shape = shape_of(setup)
    messages = {} if shape is None else largest_messages(config, shape, setup.all_layers)
    return {name: megabytes_for(num_bytes) for name, num_bytes in messages.items()}


def group_options(buffers: Mapping[str, int], name: str) -> Any:
    """Return ``pg_options`` of dist.new_group on HCCL for the group ``name``; None keeps HCCL_BUFFSIZE."""
    if name not in buffers:
        return None
    from torch_npu._C._distributed_c10d import ProcessGroupHCCL

    options = ProcessGroupHCCL.Options()
    options.hccl_config = {"hccl_buffer_size": buffers[name]}
    return options

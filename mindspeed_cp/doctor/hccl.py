"""What a launch needs from HCCL: largest message, buffers, communicators; and conflicting settings.

Pure functions of the launch; no NPU is needed.
"""

from collections.abc import Iterator, Mapping, Sequence

from mindspeed_cp.comm.hccl import (
    DEFAULT_MEGABYTES,
    MEGABYTE,
    P2P_MEGABYTES,
    AttentionShape,
    largest_messages,
    megabytes_for,
    shape_of,
)
from mindspeed_cp.doctor.finding import Finding
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.training_setup import TrainingSetup

AIV = "HCCL_OP_EXPANSION_MODE"
VIRTUAL_STAGES = ("--num-virtual-stages-per-pipeline-rank", "--num-layers-per-virtual-pipeline-stage")


def findings(
    config: ContextParallelConfig,
    shape: AttentionShape,
    environment: Mapping[str, str],
    *,
    num_layers: int | None = None,
    others: Sequence[str] = (),
    single_messages: bool = False,
) -> Iterator[Finding]:
    """Findings about messages, buffers and communicators of attention and of Megatron's groups ``others``.

    Args:
        num_layers: of the model; None counts all settings of layers.
        others: names of Megatron's process groups with more than one rank, except the context-parallel one.
        single_messages: whether messages between two ranks are posted one by one (--cp-p2p isend, virtual stages);
            each pair of ranks then has a communicator and a stream.
    """
    messages = largest_messages(config, shape, num_layers)
    if not messages:
        return
    buffers = _buffers(messages, others, _megabytes(environment, "HCCL_BUFFSIZE"))
    num_pairs = max(map(_peers, config.used_by(num_layers))) if single_messages else 0
    of_pairs = 2 * (_megabytes(environment, "P2P_HCCL_BUFFSIZE") or P2P_MEGABYTES)  # a communicator has two buffers
    total = 2 * sum(buffers.values()) + num_pairs * of_pairs
    largest = max(messages, key=lambda name: messages[name])
    size, buffer, fitting = messages[largest] / 1e6, buffers[largest], megabytes_for(messages[largest])
    pairs = f" and {num_pairs} of single pairs" if num_pairs else ""
    yield Finding(
        "note",
        f"HCCL: the largest message has {size:,.0f} MB ({largest} group, buffer {buffer} MB); at least "
        f"{len(buffers)} communicators{pairs} take {total:,} MB of a device",
    )
    if messages[largest] > buffer * MEGABYTE and buffer < fitting:
        yield Finding(
            "warning",
            f"HCCL cuts the {size:,.0f} MB message of the {largest} group into pieces: its buffer has {buffer} MB",
            f"export HCCL_BUFFSIZE={fitting}, at twice that for each communicator",
        )
    if num_pairs:
        yield Finding(
            "note",
            f"single messages cost a rank {num_pairs} communicators and streams of {of_pairs} MB; "
            "--cp-p2p batch has none of its own",
        )
    count = len(buffers) + num_pairs
    if environment.get(AIV, "").upper() == "AIV" and count > 1:
        yield Finding(
            "warning",
            f"{AIV}=AIV: Ascend documents it for one communicator at a time, and a rank has {count} here",
            f"unset {AIV}",
        )


def _megabytes(environment: Mapping[str, str], name: str) -> int:
    """The value of a variable, 0 if it is not set."""
    text = environment.get(name, "")
    return int(text) if text.isdigit() else 0


def _buffers(messages: Mapping[str, int], others: Sequence[str], everywhere: int) -> dict[str, int]:
    """Name of a process group -> MB of its buffer.

    Args:
        everywhere: HCCL_BUFFSIZE, which takes precedence; 0 if it is not set.
    """
    buffers = dict.fromkeys(("cp", *others), DEFAULT_MEGABYTES)
    for name, num_bytes in messages.items():
        least = buffers.get(name, 0)  # Megatron's own messages use the context-parallel group too
        buffers[name] = max(megabytes_for(num_bytes), least)
    return dict.fromkeys(buffers, everywhere) if everywhere else buffers


def _peers(config: ContextParallelConfig) -> int:
    """How many ranks a rank exchanges keys and values with."""
    ulysses, window, windows = config.hierarchy
    ring = window * windows
    if ring == 1 or config.row.exchange == "allgather":
        return 0
    if config.kv_exchange != "ring":
        return ring - 1
    return min(2, window - 1) + min(2, windows - 1)


def of_launch(
    config: ContextParallelConfig, setup: TrainingSetup, flags: Sequence[str], environment: Mapping[str, str]
) -> Iterator[Finding]:
    """``findings`` of a command line, or a note if it does not determine the head dimension.

    Args:
        flags: the training script's flags.
        environment: variables that the ranks get.
    """
    shape = shape_of(setup)
    if shape is None:
        yield Finding("note", "HCCL's buffers were not computed: that needs --num-attention-heads and --hidden-size")
        return
    sizes = {"tp": setup.tensor_parallel_size, "pp": setup.pipeline_parallel_size}
    product = setup.tensor_parallel_size * setup.pipeline_parallel_size * config.context_parallel_size
    sizes["dp"] = (setup.world_size or product) // product
    virtual = any(flag.partition("=")[0] in VIRTUAL_STAGES for flag in flags)
    yield from findings(
        config,
        shape,
        environment,
        num_layers=setup.all_layers,
        others=[name for name, size in sizes.items() if size > 1],
        single_messages=config.p2p == "isend" or virtual,
    )

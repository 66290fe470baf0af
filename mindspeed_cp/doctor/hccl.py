"""What a launch needs from HCCL: largest message, buffers, communicators; and conflicting settings.

Pure functions of the launch; no NPU is needed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Communicators:
    """The communicators of one rank.

    Args:
        groups: name of a process group -> MB of its buffer; a communicator has two buffers.
        pairs: how many ranks this rank sends single messages to (isend, irecv); each has a communicator and a stream.
        pair_megabytes: MB of each pair's buffer.
    """

    groups: dict[str, int] = field(default_factory=dict)
    pairs: int = 0
    pair_megabytes: int = P2P_MEGABYTES

    @property
    def count(self) -> int:
        return len(self.groups) + self.pairs

    @property
    def megabytes(self) -> int:
        return 2 * (sum(self.groups.values()) + self.pairs * self.pair_megabytes)


def communicators(
    config: ContextParallelConfig,
    shape: AttentionShape,
    environment: Mapping[str, str],
    *,
    others: tuple[str, ...] = (),
    single_messages: bool = False,
) -> Communicators:
    """The communicators of attention on one rank, and those of Megatron's groups ``others``.

    Args:
        others: names of Megatron's process groups with more than one rank, except the context-parallel one.
        single_messages: whether messages between two ranks are posted one by one (--cp-p2p isend, virtual stages).
    """
    given = environment.get("HCCL_BUFFSIZE", "")
    everywhere = int(given) if given.isdigit() and int(given) else 0
    groups = dict.fromkeys(("cp", *others), everywhere or DEFAULT_MEGABYTES)
    for name, num_bytes in largest_messages(config, shape).items():
        least = DEFAULT_MEGABYTES if name == "cp" else 0  # Megatron's own messages use that group too
        groups[name] = everywhere or max(megabytes_for(num_bytes), least)
    own = environment.get("P2P_HCCL_BUFFSIZE", "")
    megabytes = int(own) if own.isdigit() and int(own) else P2P_MEGABYTES
    return Communicators(groups, _peers(config) if single_messages else 0, megabytes)


def _peers(config: ContextParallelConfig) -> int:
    """How many ranks a rank exchanges keys and values with."""
    ulysses, window, windows = config.hierarchy
    ring = window * windows
    if ring == 1 or config.row.exchange == "allgather":
        return 0
    if config.kv_exchange != "ring":
        return ring - 1
    around = min(2, window - 1) if window > 1 else 0
    return around + (min(2, windows - 1) if windows > 1 else 0)


def findings(
    config: ContextParallelConfig,
    shape: AttentionShape,
    environment: Mapping[str, str],
    *,
    others: tuple[str, ...] = (),
    single_messages: bool = False,
) -> Iterator[Finding]:
    """Findings about messages, buffers and communicators of a launch; arguments as for ``communicators``."""
    messages = largest_messages(config, shape)
    if not messages:
        return
    found = communicators(config, shape, environment, others=others, single_messages=single_messages)
    largest = max(messages, key=lambda name: messages[name])
    size, buffer = messages[largest] / 1e6, found.groups[largest]
    pairs = f" and {found.pairs} of single pairs" if found.pairs else ""
    yield Finding(
        "note",
        f"HCCL: the largest message has {size:,.0f} MB ({largest} group, buffer {buffer} MB); at least "
        f"{len(found.groups)} communicators{pairs} take {found.megabytes:,} MB of a device",
    )
    if messages[largest] > buffer * MEGABYTE and buffer < megabytes_for(messages[largest]):
        yield Finding(
            "warning",
            f"HCCL cuts the {size:,.0f} MB message of the {largest} group into pieces: its buffer has {buffer} MB",
            f"export HCCL_BUFFSIZE={megabytes_for(messages[largest])}, at twice that for each communicator",
        )
    if found.pairs:
        yield Finding(
            "note",
            f"single messages cost a rank {found.pairs} communicators and streams of {2 * found.pair_megabytes} MB; "
            "--cp-p2p batch has none of its own",
        )
    if environment.get(AIV, "").upper() == "AIV" and found.count > 1:
        yield Finding(
            "warning",
            f"{AIV}=AIV: Ascend documents it for one communicator at a time, and a rank has {found.count} here",
            f"unset {AIV}",
        )


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
        others=tuple(name for name, size in sizes.items() if size > 1),
        single_messages=config.p2p == "isend" or virtual,
    )

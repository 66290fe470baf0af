"""Settings outside ContextParallelConfig: those of the adaptor, and those that only determine others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mindspeed_cp.kernels import KERNELS
from mindspeed_cp.settings.setting import megatrons, setting

PartitionMode = Literal["zigzag", "contiguous"]
_EVERY_LAYER = (
    "one layout of a batch serves every layer, and --cp-linear-exchange state gives layers with a state one part on "
    "each rank"
)


@dataclass(frozen=True, kw_only=True)
class AdaptorSettings:
    """Further arguments of ``megatron_adaptor.configure``, besides configuration and setup."""

    kernel: str | None = setting(
        None,
        flag="--cp-kernel",
        help="attention kernel",
        rule="a kernel serves the device it is named after, blockwise every device; an unavailable one is an error "
        "with the reason",
        meanings=lambda: dict.fromkeys(KERNELS, ""),
        default_text="by device",
    )
    documents_from_position_ids: bool = setting(False)
    end_of_document: int | Callable[[], int] | None = setting(None)
    image_token_id: int | None = setting(None)


def _kinds(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


def _sizes(value: Sequence[Any]) -> tuple[int, ...] | None:
    try:
        return tuple(int(size) for size in value) or None
    except (TypeError, ValueError):
        raise ValueError(
            f"--hierarchical-context-parallel-sizes {value!r} must be two whole numbers, the ranks of the all-to-all "
            "and those of the ring."
        ) from None


@dataclass(frozen=True, kw_only=True)
class BorderSettings:
    """Settings from a command line, a file or a framework that are read only while a configuration is created."""

    config_file: str | None = setting(
        None,
        flag="--cp-config",
        help="MindFormers YAML file with parallel_config, parallel and model.model_config",
        rule="a flag on the command line wins over the file, with a notice",
        takes="FILE.yaml",
        agree=False,
        shares=False,
    )
    data_parallel_size: int | None = setting(
        None, keys=("parallel_config.data_parallel",), names=("cp_data_parallel_size",), least=1
    )
    attn_mask_compression: bool | None = setting(
        None, keys=("model.model_config.use_attn_mask_compression",), names=("cp_attn_mask_compression",)
    )
    group_query_attention: bool = megatrons(False)
    reset_attention_mask: bool = megatrons(False)
    reset_position_ids: bool = megatrons(False)
    position_embedding_type: Any = megatrons(None)
    cp_comm_type: Any = megatrons(None, read=_kinds)
    hierarchical_context_parallel_sizes: tuple[int, ...] | None = megatrons(None, read=_sizes)
    cp_partition_mode: PartitionMode | None = megatrons(None)
    attention_cp_layout: PartitionMode | None = megatrons(None)
    linear_cp_layout: str | None = megatrons("zigzag", without_effect=_EVERY_LAYER)
    dynamic_context_parallel: bool = megatrons(False)
    sequence_packing_scheduler: str | None = megatrons(None)
    max_seqlen_per_dp_cp_rank: int | None = megatrons(
        None, least=1, least_means="a rank holds at least one token of a row"
    )

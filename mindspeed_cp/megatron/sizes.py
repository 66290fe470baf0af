"""Dynamic context parallelism of Megatron 0.16 and later: every sub-batch has its own group.

``--hybrid-context-parallel`` gives a sub-batch as many of the data- and context-parallel ranks as its length needs.
There is one scope per size, adopted at the start. The record of a sub-batch contains its scope, so that all later code
sees an ordinary context-parallel group of that size.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist

from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.megatron.decision import of_size
from mindspeed_cp.megatron.records import MicroBatch
from mindspeed_cp.megatron.scopes import Scope

if TYPE_CHECKING:
    from mindspeed_cp.megatron.known import Known as Adaptor

FLAG = "--hybrid-context-parallel"


def refuse_dynamic(why: str) -> NoReturn:
    """Raise ValueError with the reason why dynamic context parallelism cannot work here."""
    raise ValueError(
        f"{FLAG} gives every micro-batch a context-parallel size of its own, and {why}; leave out {FLAG}. Documents of "
        "any length share one row over all ranks with --cp-batch-layout balanced (mindspeed_cp.pack_documents)."
    )


def local_size(params: Any) -> int | None:
    """The context-parallel size in PackedSeqParams, or None; the field does not exist before 0.16."""
    return getattr(params, "local_cp_size", None)


def check_local_size(params: Any, cp_size: int) -> None:
    """Raise ValueError if PackedSeqParams contain a context-parallel size other than ``cp_size``."""
    size = local_size(params)
    if size not in (None, cp_size):
        refuse_dynamic(f"this one has local_cp_size {size}, for which initialize_model_parallel made no groups")


def check_launch(given: Mapping[str, Any]) -> None:
    """Raise ValueError if arguments of initialize_model_parallel do not work with dynamic context parallelism."""
    if (given.get("pipeline_model_parallel_size") or 1) > 1:
        refuse_dynamic("pipeline stages know one size for all (--pipeline-model-parallel-size)")


def check_model(model: Any) -> None:
    """Raise ValueError for models with layers that support only one context-parallel size."""
    config = model.config
    if not any(kind.__name__ == "GPTModel" for kind in type(model).__mro__):
        refuse_dynamic(f"{type(model).__name__} has layers that know one size for all; only GPTModel is supported")
    if not config.calculate_per_token_loss:
        refuse_dynamic("ranks then have unequal numbers of micro-batches; it needs --calculate-per-token-loss")
    for name, flag in (
        ("multi_latent_attention", "--multi-latent-attention"),
        ("num_moe_experts", "--num-experts"),
        ("mtp_num_layers", "--mtp-num-layers"),
        ("experimental_attention_variant", "--experimental-attention-variant"),
    ):
        if getattr(config, name, None):
            refuse_dynamic(f"{flag} knows one size for all")


def adopt_sizes(adaptor: "Adaptor") -> dict[int, Scope]:
    """The scope of every size for which Megatron has made a group; collective over the world."""
    from megatron.core import parallel_state

    settings = adaptor.settings
    assert settings.config is not None
    whole = parallel_state.get_data_parallel_group(with_context_parallel=True)
    one = of_size(settings.config, 1, settings.setup)
    sizes = {1: Scope(one, ContextParallelGroups.build(one))}
    for size, group in sorted((parallel_state._HYBRID_DP_CP_GROUPS | {whole.size(): whole}).items()):
        if size > 1 and whole.size() % size == 0:  # else Megatron's last group would be smaller
            config = of_size(settings.config, size, settings.setup)
            sizes[size] = adaptor.make_groups(group, config)
    return sizes


def scope_of_size(adaptor: "Adaptor", size: int) -> Scope:
    """The scope of micro-batches of one size.

    Raises:
        ValueError: Megatron has made no groups of this size.
    """
    if size not in adaptor.sizes:
        refuse_dynamic(f"this one has size {size}, and there are groups of {', '.join(map(str, adaptor.sizes))}")
    return adaptor.sizes[size]


def ranks_of_all(group: dist.ProcessGroup) -> list[list[int]]:
    """Global ranks of all groups of the same kind as this rank's ``group``, in Megatron's order."""
    mine = tuple(dist.get_process_group_ranks(group))
    everyone: list[tuple[int, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [list(ranks) for ranks in sorted(set(everyone))]


def split_sub_batch(
    adaptor: "Adaptor", batch: dict[str, Any], given: Mapping[str, Any], split: Callable[[Scope, dict[str, Any]], Any]
) -> Any:
    """Split a sub-batch over the ranks of its own size, in place.

    Args:
        given: arguments of get_batch_on_this_cp_rank: up to 0.17 the group, from 0.18 on a function that returns it.
        split: (scope, batch) -> batch.
    """
    group = given.get("cp_group")
    if given.get("is_hybrid_cp"):
        size = batch.get("local_cp_size")
        if size is None or batch.get("cu_seqlens") is None:
            refuse_dynamic("from Megatron 0.18 on a batch must bring local_cp_size and cu_seqlens, and this has none")
        size = int(size)
        group = given["hybrid_cp_group_func"](group_size=size) if size > 1 else None
        batch["hybrid_cp_group"] = group
    return split(scope_of_size(adaptor, 1 if group is None else group.size()), batch)


def sub_batch_record(adaptor: "Adaptor", values: Iterable[Any]) -> MicroBatch:
    """The record of the sub-batch in the arguments of a model. Up to 0.17, sub-batches of size 1 are not split."""
    values = tuple(values)
    params = next((value for value in values if local_size(value) is not None), None)
    if params is None:
        refuse_dynamic("a forward pass got no PackedSeqParams with local_cp_size, which say of which size it is")
    size, record = local_size(params), adaptor.records.find(values)
    if size == 1 and record is None:
        scope, length = scope_of_size(adaptor, 1), int(params.cu_seqlens_q[-1])
        documents = None if params.qkv_format != "thd" else (adaptor.boundaries.documents(params, length),)
        record = MicroBatch(adaptor.layout(length, scope=scope), documents, scope)
    if record is None or record.layout.cp_size != size:
        refuse_dynamic(
            f"this one has local_cp_size {size} and was split over "
            f"{'nothing known' if record is None else record.layout.cp_size}"
        )
    return record

"""Dynamic context parallelism of Megatron 0.16 and later: every sub-batch brings a group of its own.

``--hybrid-context-parallel`` gives a sub-batch as many of the data and context-parallel ranks as its length asks for.
A size is a configuration and its groups, made for every size at the start; ``AdaptorState.running`` takes those of the
sub-batch that runs, so that everything behind it sees an ordinary context-parallel group of that size.
"""

import importlib.util
import inspect
from dataclasses import replace
from functools import wraps
from typing import NoReturn

import torch.distributed as dist
from mindspeed_cp.patches.manager import Patch

from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.megatron.records import MicroBatch
from mindspeed_cp.settings.config import ContextParallelConfig, TrainingSetup, resolve

SCHEDULES = "megatron.core.pipeline_parallel"
FLAG = "--hybrid-context-parallel"
Sizes = dict[int, tuple[ContextParallelConfig, ContextParallelGroups]]


def dynamic_patches():
    """The table."""
    return [
        Patch(
            f"{SCHEDULES}.schedules.backward_step",
            _backward_step,
            f"the schedule of {FLAG} in 0.17 and 0.18 passes model_type, which backward_step no longer takes",
            _schedule_agrees,
        )
    ]


def _schedule_agrees():
    if importlib.util.find_spec(f"{SCHEDULES}.hybrid_cp_schedule") is None:
        return "dynamic context parallelism comes with 0.16"
    schedules = importlib.import_module(f"{SCHEDULES}.schedules")
    known = "model_type" in inspect.signature(schedules.backward_step).parameters
    return "backward_step takes model_type" if known else ""


def _backward_step(original):
    @wraps(original)
    def backward_step(input_tensor, output_tensor, output_tensor_grad, *more, **kwargs):
        return original(input_tensor, output_tensor, output_tensor_grad, *more[-1:], **kwargs)

    return backward_step


def refuse_dynamic(why: str) -> NoReturn:
    """Raise ValueError with the reason for which dynamic context parallelism cannot work here."""
    raise ValueError(f"{FLAG} gives every micro-batch a context-parallel size of its own, and {why}; leave out {FLAG}.")


def local_size(params) -> int | None:
    """The context-parallel size that PackedSeqParams bring, None without; absent before 0.16."""
    return getattr(params, "local_cp_size", None)


def check_local_size(params, cp_size: int) -> None:
    """Raise ValueError when PackedSeqParams bring a context-parallel size that is not ``cp_size``."""
    size = local_size(params)
    if size not in (None, cp_size):
        refuse_dynamic(f"this one has local_cp_size {size}, for which initialize_model_parallel made no groups")


def check_launch(given) -> None:
    """Raise ValueError when the arguments of initialize_model_parallel do not go with dynamic context parallelism."""
    if (given.get("pipeline_model_parallel_size") or 1) > 1:
        refuse_dynamic("pipeline stages know one size for all (--pipeline-model-parallel-size)")


def check_model(model) -> None:
    """Raise ValueError for models whose layers know one context-parallel size alone."""
    config = model.config
    if not any(kind.__name__ == "GPTModel" for kind in type(model).__mro__):
        refuse_dynamic(f"{type(model).__name__} has layers that know one size for all; only GPTModel is supported")
    if not config.calculate_per_token_loss:
        refuse_dynamic("ranks then have unequal numbers of micro-batches; it needs --calculate-per-token-loss")
    for name, flag in (
        ("multi_latent_attention", "--multi-latent-attention"),
        ("num_moe_experts", "--num-experts"),
        ("mtp_num_layers", "--mtp-num-layers"),
    ):
        if getattr(config, name, None):
            refuse_dynamic(f"{flag} knows one size for all")


def build_sizes(config: ContextParallelConfig, setup: TrainingSetup | None, timeout) -> Sizes:
    """The groups of every size for which Megatron has made one; collective over the world."""
    from megatron.core import parallel_state

    whole = parallel_state.get_data_parallel_group(with_context_parallel=True)
    one = _of_size(config, 1, setup)
    sizes = {1: (one, ContextParallelGroups.build(one))}
    for size, group in sorted((parallel_state._HYBRID_DP_CP_GROUPS | {whole.size(): whole}).items()):
        if size == 1 or whole.size() % size:  # Megatron's last group of such a size is smaller than the others
            continue
        mine = _of_size(config, size, setup)
        sizes[size] = mine, ContextParallelGroups.build(mine, ranks_of_all(group), timeout=timeout, cp_group=group)
    return sizes


def ranks_of_all(group) -> list[list[int]]:
    """Global ranks of every group of the world that is like this rank's ``group``, as Megatron ordered them."""
    mine = tuple(dist.get_process_group_ranks(group))
    everyone: list[tuple[int, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [list(ranks) for ranks in sorted(set(everyone))]


def _of_size(config, size, setup):
    """``config`` for another size: its Ulysses degree and window as far as they fit into it."""
    if size == 1:
        return ContextParallelConfig(context_parallel_size=1, attention_mask_type=config.attention_mask_type)
    degree = config.ulysses_degree
    algorithm, degree = ("ulysses_cp_algo", None) if degree and size <= degree else (config.algorithm, degree)
    ring = size // (degree or 1)
    window = config.window_size if config.window_size < ring and ring % config.window_size == 0 else 1
    of_ring = dict(kv_exchange="ring", send_recv_overlap=False, p2p="auto", kv_cache_policy=None, kv_cache_interval=0)
    of_ring |= dict(in_flight=1, topology="auto")
    found = replace(
        config,
        context_parallel_size=size,
        algorithm=algorithm,
        ulysses_degree=degree,
        window_size=window,
        **(of_ring if algorithm != config.algorithm else {}),  # a Hybrid without its ring, and what speaks of one
    )
    if setup is not None:
        resolve(found, replace(setup, world_size=None, seq_length=None))
    return found


def split_sub_batch(batch, state, given, split):
    """Split a sub-batch over the ranks of its own size, in place.

    Args:
        given: arguments of get_batch_on_this_cp_rank; from 0.18 on it chooses the group, before it gets it.
        split: batch -> batch, for the size that runs.
    """
    group = given.get("cp_group")
    if given.get("is_hybrid_cp"):
        size = batch.get("local_cp_size")
        if size is None or batch.get("cu_seqlens") is None:
            refuse_dynamic("from Megatron 0.18 on a batch must bring local_cp_size and cu_seqlens, and this has none")
        size = int(size)
        group = given["hybrid_cp_group_func"](group_size=size) if size > 1 else None
        batch["hybrid_cp_group"] = group
    with state.of_size(1 if group is None else group.size()):
        return split(batch)


def sub_batch_record(state, values) -> MicroBatch:
    """The record of the sub-batch among the arguments of a model. Up to 0.17 one of size 1 was not split."""
    params = next((value for value in values if local_size(value) is not None), None)
    if params is None:
        refuse_dynamic("a forward pass got no PackedSeqParams with local_cp_size, which say of which size it is")
    size, record = local_size(params), state.records.find(values)
    if size == 1 and record is None:
        with state.of_size(1):
            length = int(params.cu_seqlens_q[-1])
            documents = None if params.qkv_format != "thd" else (state.boundaries.documents(params, length),)
            record = MicroBatch(state.layout(length), documents)
    if record is None or record.layout.cp_size != size:
        refuse_dynamic(
            f"this one has local_cp_size {size} and was split over "
            f"{'nothing known' if record is None else record.layout.cp_size}"
        )
    return record

"""Micro-batches with different context-parallel sizes, scheduled by Megatron; ``compare`` runs on each rank."""

import contextlib
from functools import cache, partial

import torch
import torch.distributed as dist
from batch_runs import batch_of, build, configure, losses_of, mask_of, named
from kept_groups import megatron_groups

LONGEST = 64  # tokens of a sub-batch that gets all ranks
EVEN, UNEVEN = (64, 32, 16, 8, 40, 16, 8), (61, 27, 16, 5, 33, 14, 9)
CASES = {
    "ulysses": ({"algorithm": "ulysses_cp_algo"}, 1, EVEN, {}),
    "ring": ({"algorithm": "megatron_cp_algo", "log": True}, 1, UNEVEN, {}),
    "ring, full recomputation": (
        {"algorithm": "megatron_cp_algo"},
        2,
        UNEVEN,
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "double ring": ({"algorithm": "megatron_cp_algo", "window_size": 2}, 4, UNEVEN, {}),
    "hybrid": ({"algorithm": "hybrid_cp_algo", "ulysses_degree": 2}, 4, EVEN, {}),
    "kv all-gather": ({"algorithm": "kvallgather_cp_algo"}, 2, UNEVEN, {}),
    "ring, tensor parallel": ({"algorithm": "megatron_cp_algo"}, 1, UNEVEN, {"tensor_model_parallel_size": 2}),
    "ulysses, tensor and sequence parallel": (
        {"algorithm": "ulysses_cp_algo"},
        2,
        EVEN,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
}


def compare(rank):
    """Case -> (difference of losses, difference of gradients, sizes that ran on any rank, figures of --cp-log or None,
    attention area of this rank), on every rank.
    """
    from mindspeed_cp import megatron_adaptor

    megatron_adaptor.apply()
    return {name: _case(*case) for name, case in CASES.items()} | {"refused": _refusals()}


def sample_of(lengths, seed):
    """A packed row as from a dataset: (S,) tensors, and where its sub-batches end."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    batch = batch_of((tuple(ends.tolist()),), seed, seq=int(ends[-1]))
    return {name: tensor[0] for name, tensor in batch.items()} | {"cu_seqlens": ends.int()}


def parts(sample):
    """The sub-batches of a packed row, as batches of one row."""
    ends = sample["cu_seqlens"].tolist()
    for start, stop in zip(ends, ends[1:]):
        yield {name: tensor[None, start:stop] for name, tensor in sample.items() if name != "cu_seqlens"}


@contextlib.contextmanager
def dynamic_groups(settings, cp_size, tp_size=1):
    configure(settings, cp_size)
    with megatron_groups(
        tensor_model_parallel_size=tp_size, context_parallel_size=cp_size, hybrid_context_parallel=True
    ) as said:
        yield said


def _expected(samples, **settings):
    """(sum of the losses, gradients) of all sub-batches, computed in sequence on one rank."""
    model, total = build(1, calculate_per_token_loss=True, **settings), 0.0
    for sample in samples:
        for part in parts(sample):
            length = part["tokens"].size(1)
            mask = mask_of(((0, length),), length)
            total = total + (losses_of(model, part, mask) * part["loss_mask"]).sum()
    total.backward()
    return total.detach(), _gradients(model)


@cache
def _alone(lengths):
    """``_expected`` of one row for each rank, which computes it for all: every case without tensor parallelism takes
    of these.
    """
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, _expected([sample_of(lengths, dist.get_rank())]))
    return everyone


def _gradients(model):
    """name -> gradient; those that Megatron marks as split over tensor-parallel ranks are summed."""
    from megatron.core import parallel_state

    for _, parameter in named(model):
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
    return {name: parameter.grad.clone() for name, parameter in named(model)}


def _case(settings, cp_size, lengths, model_settings):
    tp_size = model_settings.get("tensor_model_parallel_size", 1)
    rows = [sample_of(lengths, seed) for seed in range(4 // cp_size // tp_size)]
    configure({}, 1)
    with megatron_groups(tensor_model_parallel_size=tp_size):
        alone = _alone(lengths)[: len(rows)] if tp_size == 1 else [_expected(rows, **model_settings)]
    whole = sum(loss for loss, _ in alone)
    expected = {name: sum(gradients[name] for _, gradients in alone) for name in alone[0][1]}
    with dynamic_groups(settings, cp_size, tp_size):
        with _logged() as log:
            loss, found, sizes = _scheduled(rows, cp_size, model_settings)
        area = sum(log._areas) if log else 0
        figures = log and log.interval()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    worst = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    return float((loss - whole).abs() / whole), worst / scale, sizes, figures, area


@contextlib.contextmanager
def _logged():
    """Context manager for one training step, measured by --cp-log; yields the log or None."""
    from mindspeed_cp import megatron_adaptor

    log = megatron_adaptor.state().log
    with log.step() if log else contextlib.nullcontext():
        yield log


def _scheduled(rows, cp_size, model_settings):
    """(loss, gradients, sizes) of all ranks together, by Megatron's own schedule and loader."""
    from megatron.core import parallel_state
    from megatron.core.datasets.data_schedule import HybridCPDataLoaderWrapper
    from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining

    model, sizes = build(cp_size, calculate_per_token_loss=True, **model_settings), set()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    model.config.hybrid_context_parallel, model.config.max_seqlen_per_dp_cp_rank = True, LONGEST // group.size()
    loader = HybridCPDataLoaderWrapper(iter([[rows[parallel_state.get_data_parallel_rank()]]]), model.config)
    stored = forward_backward_no_pipelining(
        forward_step_func=partial(_step, sizes),
        data_iterator=iter([next(loader)]),
        model=model,
        num_microbatches=1,
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    loss, found = torch.stack(stored).sum(), _gradients(model)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sizes)
    for tensor in (loss, *found.values()):
        dist.all_reduce(tensor, group=group)
    return loss, found, sorted(set().union(*everyone))


def _step(sizes, iterator, model):
    """A forward step as in pretrain_gpt.py; only the first tensor-parallel rank has the sub-batch."""
    from megatron.core import parallel_state

    sample = next(iterator) if iterator is not None else None
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        handed = [sample]
        first, group = (
            parallel_state.get_tensor_model_parallel_src_rank(),
            parallel_state.get_tensor_model_parallel_group(),
        )
        dist.broadcast_object_list(handed, first, group)
        (sample,) = handed
    size = sample.pop("local_cp_size")
    sizes.add(int(size))
    batch, params = _split(sample, size)
    losses = losses_of(model, batch, packed_seq_params=params)

    def loss_func(mask, losses):
        loss = (losses * mask).sum()
        return loss, mask.sum().detach().int(), loss.detach().clone()

    return losses, partial(loss_func, batch["loss_mask"])


def _split(sample, size):
    from megatron.core import parallel_state, utils
    from megatron.core.packed_seq_params import PackedSeqParams

    if hasattr(utils, "get_batch_on_this_hybrid_cp_rank"):  # up to 0.17
        return utils.get_batch_on_this_hybrid_cp_rank(sample, int(size))
    length = sample["tokens"].numel()
    ends = torch.tensor([0, length], dtype=torch.int32)
    batch = {name: tensor[None] for name, tensor in sample.items()}
    batch |= {"cu_seqlens": ends[None], "cu_seqlens_padded": None, "local_cp_size": size, "hybrid_cp_group": None}
    batch = utils.get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=True,
        cp_group=parallel_state.get_context_parallel_group(),
        hybrid_cp_group_func=parallel_state.get_hybrid_data_context_parallel_groups,
    )
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=length,
        max_seqlen_kv=length,
        local_cp_size=int(size),
        cp_group=batch["hybrid_cp_group"],
    )
    return batch, params


def _refusals():
    """Name -> error message for what dynamic context parallelism cannot do."""
    from types import SimpleNamespace

    from bridge_parts import message_of
    from megatron.core import parallel_state

    found = {}
    configure({"algorithm": "megatron_cp_algo"}, 2)
    found["pipeline"] = message_of(
        lambda: parallel_state.initialize_model_parallel(
            context_parallel_size=2, pipeline_model_parallel_size=2, hybrid_context_parallel=True
        )
    )
    with dynamic_groups({"algorithm": "megatron_cp_algo"}, 2) as found["said"]:
        part = next(parts(sample_of((16,), 1)))
        for name, settings in (("loss", {}), ("no size", {"calculate_per_token_loss": True})):
            found[name] = message_of(lambda settings=settings: losses_of(build(2, **settings), part))
        params = SimpleNamespace(local_cp_size=2)
        model = build(2, calculate_per_token_loss=True)
        found["not split"] = message_of(lambda: losses_of(model, part, packed_seq_params=params))
    return found

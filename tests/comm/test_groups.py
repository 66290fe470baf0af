"""Process groups: which ranks they join, for one and for many context-parallel groups, and what is refused."""

import gc
import os
import time

import pytest
import torch
import torch.distributed as dist
from cases import Case, arguments, expected, largest_errors, local_inputs, setup_of, whole
from distributed import run_ranks
from setups import shapes

from mindspeed_cp import ContextParallelConfig, ContextParallelGroups, SequenceLayout


def ranks_of(group):
    return None if group is None else dist.get_process_group_ranks(group)


def described(rank, config, cp_ranks=None):
    groups = ContextParallelGroups.build(ContextParallelConfig(**config), cp_ranks)
    try:
        return {
            name: getattr(groups, name)
            for name in (
                "cp_rank",
                "ulysses_rank",
                "ring_rank",
                "global_ranks",
                "cp_size",
                "ring_size",
                "ulysses_degree",
                "ring_global_ranks",
            )
        } | {
            name: ranks_of(getattr(groups, name)) for name in ("cp_group", "ulysses_group", "ring_group", "outer_group")
        }
    finally:
        dist.barrier()  # gloo: a rank that leaves while another still connects breaks that one's connection
        groups.destroy()


@pytest.mark.parametrize(
    "shape",
    [
        shape
        for cp in (2, 3, 4, 6, 8)
        for name in ("ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo")
        for shape in shapes(name, cp)
    ],
    ids=lambda shape: "-".join(map(str, shape.values())),
)
def test_ulysses_ranks_are_neighbours_and_ring_ranks_are_strided(shape):
    cp, config = shape["context_parallel_size"], ContextParallelConfig(**shape)
    degree, window, windows = config.hierarchy
    for rank, got in enumerate(run_ranks(cp, described, shape)):
        first, ring_rank = rank // degree * degree, rank // degree
        ring = list(range(rank % degree, cp, degree))
        assert got["global_ranks"] == tuple(range(cp)) and got["cp_rank"] == rank and got["cp_group"] == list(range(cp))
        assert (got["ulysses_rank"], got["ring_rank"]) == (rank % degree, ring_rank)
        assert got["ulysses_group"] == (list(range(first, first + degree)) if degree > 1 else None)
        assert got["ring_group"] == (ring if window * windows > 1 else None)
        assert got["outer_group"] == (ring if windows > 1 else None)
        assert got["ring_global_ranks"] == tuple(ring)
        assert (got["cp_size"], got["ring_size"], got["ulysses_degree"]) == (cp, window * windows, degree)


@pytest.mark.parametrize(
    "cp_ranks", [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[1, 3], [0, 2]]], ids=["neighbours", "strided", "second-first"]
)
def test_every_context_parallel_group_of_the_world_gets_its_own_groups(cp_ranks):
    for rank, got in enumerate(
        run_ranks(4, described, {"context_parallel_size": 2, "algorithm": "megatron_cp_algo"}, cp_ranks)
    ):
        (mine,) = (ranks for ranks in cp_ranks if rank in ranks)
        assert got["global_ranks"] == tuple(mine)
        assert got["cp_rank"] == mine.index(rank)
        assert got["ring_global_ranks"] == tuple(mine)


def attend_in_groups(rank, case, cp_ranks):
    """attend, but the context-parallel groups are those given; the seed differs from group to group."""
    from dataclasses import replace

    from mindspeed_cp import context_parallel_attention

    config = ContextParallelConfig(**case.config)
    groups = ContextParallelGroups.build(config, cp_ranks)
    (index,) = (number for number, ranks in enumerate(cp_ranks) if rank in ranks)
    case = replace(case, seed=index)
    layout = SequenceLayout.build(config, case.seq_len)
    leaves, sinks, grad_out, mask = local_inputs(groups.cp_rank, case, layout)
    out = context_parallel_attention(*leaves, **arguments(case, config, groups, layout, sinks, mask))
    out.backward(grad_out)
    dist.barrier()
    groups.destroy()
    return index, groups.cp_rank, {"out": out.detach(), **{f"d{n}": leaf.grad for n, leaf in zip("qkv", leaves)}}


@pytest.mark.parametrize(
    "cp_ranks",
    [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 2, 4, 6], [1, 3, 5, 7]], [[0, 3, 4, 7], [1, 2, 5, 6]]],
    ids=["neighbours", "strided", "any"],
)
@pytest.mark.parametrize(
    "shape",
    [
        shape
        for name in ("ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo", "kvallgather_cp_algo")
        for shape in shapes(name, 4)
    ],
    ids=lambda shape: "-".join(map(str, shape.values())),
)
def test_groups_beside_each_other_compute_their_own_sequences(shape, cp_ranks):
    from dataclasses import replace

    case = Case(shape, seq_len=21)
    results = run_ranks(8, attend_in_groups, case, cp_ranks)
    for index in range(2):
        shards = [shard for _, _, shard in sorted((r for r in results if r[0] == index), key=lambda r: r[1])]
        own = replace(case, seed=index)
        assert max(largest_errors(whole(own, shards), expected(own)).values()) < 1e-10


def test_one_rank_needs_no_process_group():
    assert not dist.is_initialized()
    groups = ContextParallelGroups.build(ContextParallelConfig())
    assert (groups.cp_rank, groups.cp_size, groups.global_ranks, groups.cp_group) == (0, 1, (0,), None)


def test_more_than_one_rank_without_torch_distributed_is_an_error():
    with pytest.raises(ValueError, match=r"--context-parallel-size 2 .*init_process_group"):
        ContextParallelGroups.build(ContextParallelConfig(context_parallel_size=2))


def refused(rank, config, cp_ranks):
    """The message of the ValueError, and that no group was made before it."""
    made, new_group = [], dist.new_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", lambda *args, **kwargs: made.append(1) or new_group(*args, **kwargs))
        with pytest.raises(ValueError) as error:
            ContextParallelGroups.build(ContextParallelConfig(**config), cp_ranks)
    return str(error.value), len(made)


@pytest.mark.parametrize(
    "cp_ranks, words",
    [
        (None, "--context-parallel-size 2 .*4.*cp_ranks"),
        ([[0, 1, 2], [3]], "--context-parallel-size 2 "),
        ([[0, 1], [1, 2]], "exactly once"),
        ([[0, 1]], "exactly once"),
        ([[0, 1], [2, 4]], "exactly once"),
        ([[1, 0], [2, 3]], "must ascend"),
    ],
    ids=["world-too-large", "wrong-size", "twice", "missing", "outside", "descending"],
)
def test_groups_that_do_not_fit_the_world_are_refused_before_any_is_made(cp_ranks, words):
    import re

    for message, made in run_ranks(4, refused, {"context_parallel_size": 2}, cp_ranks):
        assert re.search(words, message), message
        assert made == 0


def workspace_reuse(rank, case):
    """Data pointers of the workspace after one and after three calls: nothing is allocated anew."""
    from cases import attend

    _, groups = setup_of(case.config)
    seen = []
    for calls in (1, 2):
        for _ in range(calls):
            attend(rank, case)
        seen.append(sorted(buffer.data_ptr() for buffer in groups.workspace._buffers.values()))
    return seen


def test_communication_buffers_are_reused_from_call_to_call():
    for shape in [next(shapes("ulysses_cp_algo", 2)), next(shapes("megatron_cp_algo", 2))]:
        for first, later in run_ranks(2, workspace_reuse, Case(shape, dtype="bfloat16")):
            assert first and first == later


def test_groups_of_another_device_are_not_needed_for_layouts():
    assert torch.equal(
        SequenceLayout.build(ContextParallelConfig(context_parallel_size=2), 4).positions(1), torch.tensor([2, 3])
    )


def rebuilt(rank, number):
    """Open files, threads and process groups after building, using and destroying groups, first and last time."""
    from mindspeed_cp import context_parallel_attention

    case = Case({"context_parallel_size": 2, "algorithm": "megatron_cp_algo"}, dtype="float32", share_from=0)
    seen = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(number):
            config = ContextParallelConfig(**case.config)
            groups = ContextParallelGroups.build(config, share_from=case.share_from)
            layout = SequenceLayout.build(config, case.seq_len)
            leaves, sinks, grad_out, mask = local_inputs(rank, case, layout)
            keywords = arguments(case, config, groups, layout, sinks, mask)
            context_parallel_attention(*leaves, **keywords).backward(grad_out)
            dist.barrier()
            groups.destroy()
            del groups, keywords, leaves
            seen.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    finally:
        gc.enable()
    return seen


@pytest.mark.cpu_only
def test_groups_that_were_destroyed_leave_no_files_and_no_threads_though_nobody_collects_garbage():
    for seen in run_ranks(2, rebuilt, 6, fresh=True):
        assert seen[1:] == [seen[1]] * 5, seen


def with_a_group_of_their_own(rank, cp_ranks, config):
    """How many groups were made, which one is used, and that it outlives ours."""
    mine = None
    for ranks in cp_ranks:
        group = dist.new_group(ranks)
        mine = group if rank in ranks else mine
    made, new_group = [], dist.new_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", lambda *args, **kwargs: made.append(args) or new_group(*args, **kwargs))
        groups = ContextParallelGroups.build(ContextParallelConfig(**config), cp_ranks, cp_group=mine)
    is_used = groups.cp_group is mine and groups.cp.group is mine
    dist.barrier()
    groups.destroy()
    total = torch.ones(())
    dist.all_reduce(total, group=mine)
    with pytest.raises(ValueError, match=r"cp_group has the global ranks \[0, 1, 2, 3\] and must have"):
        ContextParallelGroups.build(ContextParallelConfig(**config), cp_ranks, cp_group=dist.group.WORLD)
    dist.barrier()
    dist.destroy_process_group(mine)
    return is_used, len(made), float(total)


def refusal_of_a_group_that(rank, cp_group_of):
    """What this rank is told when it passes ``cp_group_of(rank)``."""
    config = ContextParallelConfig(context_parallel_size=2, algorithm="megatron_cp_algo")
    started = time.monotonic()
    with pytest.raises(ValueError, match="cp_group") as caught:
        ContextParallelGroups.build(config, [[0, 1], [2, 3]], cp_group=cp_group_of(rank))
    assert time.monotonic() - started < 10
    return str(caught.value)


def the_whole_world_on_rank_2(rank):
    made = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    return dist.group.WORLD if rank == 2 else made[rank // 2]


def none_on_rank_3(rank):
    made = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    return None if rank == 3 else made[rank // 2]


@pytest.mark.parametrize(
    "cp_group_of, said",
    [
        (the_whole_world_on_rank_2, "on rank 2: cp_group has the global ranks [0, 1, 2, 3] and must have [2, 3]"),
        (none_on_rank_3, "cp_group is given on ranks 0 to 2 and not given on rank 3"),
    ],
)
def test_a_group_that_does_not_fit_on_one_rank_stops_all_ranks(cp_group_of, said):
    assert all(said in message for message in run_ranks(4, refusal_of_a_group_that, cp_group_of))


@pytest.mark.parametrize("algorithm, window, made", [("megatron_cp_algo", 1, 0), ("ulysses_cp_algo", 1, 0)])
def test_a_context_parallel_group_that_exists_is_used_and_left_alone(algorithm, window, made):
    config = {"context_parallel_size": 2, "algorithm": algorithm, "window_size": window}
    assert run_ranks(4, with_a_group_of_their_own, [[0, 2], [1, 3]], config) == [(True, made, 2.0)] * 4

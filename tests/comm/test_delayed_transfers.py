"""Every algorithm on a process group whose sends read late and whose receives write early gives the bits of gloo's."""

from dataclasses import replace

import cases
import delayed_transfers
import pytest
import torch
import torch.distributed as dist
from cases import Case, attend_many
from distributed import RankFailure, free_port, run_ranks

pytestmark = pytest.mark.cpu_only

RING = dict(context_parallel_size=4, algorithm="megatron_cp_algo")
ULYSSES = dict(context_parallel_size=4, algorithm="ulysses_cp_algo")
HYBRID = dict(context_parallel_size=4, algorithm="hybrid_cp_algo", ulysses_degree=2)
PACKED = (0, 5, 6, 17, 24)
CONFIGS = (
    *({**RING, "kv_cache_policy": policy} for policy in (None, "full", "half")),
    {**RING, "send_recv_overlap": True},
    {**RING, "attention_mask_type": "full"},
    *(
        {**RING, **more, "p2p": "isend"}
        for more in ({}, {"send_recv_overlap": True}, {"kv_exchange": "direct"}, {"window_size": 2})
    ),
    *({**RING, "kv_exchange": "direct", "kv_cache_policy": policy} for policy in (None, "full", "half")),
    *({**RING, "kv_exchange": "mesh", "kv_cache_policy": policy} for policy in (None, "full", "half")),
    *({**RING, "kv_exchange": "direct", "in_flight": 3, "send_recv_overlap": overlap} for overlap in (False, True)),
    *({**RING, "kv_exchange": "mesh", "in_flight": steps, "send_recv_overlap": True} for steps in (1, 2)),
    {**RING, "window_size": 2, "in_flight": 2, "send_recv_overlap": True},
    *({**RING, "window_size": 2, "kv_cache_policy": policy} for policy in (None, "full", "half")),
    {**RING, "window_size": 2, "attention_mask_type": "full"},
    *({**ULYSSES, "kv_cache_policy": policy} for policy in (None, "full", "half")),
    {**ULYSSES, "alltoall": False},
    {**HYBRID, "ulysses_chunks": 2},
    *({**HYBRID, "kv_cache_policy": policy} for policy in (None, "full", "half")),
    *({**HYBRID, "kv_exchange": exchange} for exchange in ("direct", "mesh")),
    dict(context_parallel_size=4, algorithm="kvallgather_cp_algo"),
)
FLOAT32 = dict(dtype="float32", share_from=None)


def problems():
    for config in CONFIGS:
        yield Case(config, **FLOAT32)
    yield Case({**HYBRID, "alltoall": False}, runs=(((0, 12),), ((12, 24),), (), ()), **FLOAT32)  # gathers nothing
    direct, mesh = ({**RING, "kv_exchange": exchange} for exchange in ("direct", "mesh"))
    for config in (RING, direct, mesh, ULYSSES, HYBRID):
        yield Case(config, cu_seqlens=PACKED, kv_heads=2, **FLOAT32)
    yield Case({**RING, "window_size": 2}, window=(7, 0), **FLOAT32)
    yield Case(RING, seq_len=23, dtype="bfloat16", share_from=None)
    for dtype, policy in (("float32", None), ("bfloat16", None), ("bfloat16", "full")):
        config = {**ULYSSES, "ulysses_chunks": 3, "kv_cache_policy": policy}
        yield Case(config, heads=16, kv_heads=8, dtype=dtype, share_from=None)


def on_delayed_group(rank, world_size, port, function, *arguments):
    """``function(rank, *arguments)`` with the delayed group as the world."""
    dist.barrier()  # a rank that left would reset the connection of one that still joins
    dist.destroy_process_group()
    cases._setups.clear()
    delayed_transfers.register()
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    dist.init_process_group("delayed", store=store, rank=rank, world_size=world_size)
    try:
        return function(rank, *arguments)
    finally:
        delayed_transfers.finish(store, world_size)


def run_delayed(world_size, function, *arguments):
    return run_ranks(
        world_size, on_delayed_group, world_size, free_port(), function, *arguments, fresh=True, timeout=240
    )


def test_every_algorithm_exchange_and_policy_is_bitwise_the_same():
    every = list(problems())
    delayed, plain = run_delayed(4, attend_many, every), run_ranks(4, attend_many, every)
    wrong = [
        (str(case), rank, name)
        for index, case in enumerate(every)
        for rank in range(4)
        for name in plain[rank][index]
        if not torch.equal(delayed[rank][index][name], plain[rank][index][name])
    ]
    assert not wrong


def test_odd_sizes_and_two_layers_are_bitwise_the_same():
    every = [
        replace(case.with_config(context_parallel_size=3), heads=6, kv_heads=3)
        for case in (
            Case(RING, **FLOAT32),
            Case({**RING, "kv_exchange": "direct"}, **FLOAT32),
            Case({**RING, "kv_exchange": "mesh", "in_flight": 2, "send_recv_overlap": True}, **FLOAT32),
            Case({**RING, "p2p": "isend"}, **FLOAT32),
            Case({**RING, "p2p": "isend", "kv_exchange": "direct"}, **FLOAT32),
            Case(ULYSSES, **FLOAT32),
        )
    ] * 2
    for a, b in zip(run_delayed(3, attend_many, every), run_ranks(3, attend_many, every)):
        for got, wanted in zip(a, b):
            assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_buffers_of_pieces_are_not_reused_while_they_are_read():
    """Six ranks with three steps in flight: the last group of steps is shorter than the others."""
    config = {**RING, "context_parallel_size": 6, "kv_exchange": "direct", "in_flight": 3, "send_recv_overlap": True}
    every = [Case(config, seq_len=48, **FLOAT32)]
    for delayed, plain in zip(run_delayed(6, attend_many, every), run_ranks(6, attend_many, every)):
        assert all(torch.equal(delayed[0][name], plain[0][name]) for name in plain[0])


def reuse(rank, wrong):
    """Send a buffer round the ring of two; ``wrong`` writes it, or reads the receiving one, before the wait."""
    sent, received = torch.full((4,), 1.0 + rank), torch.zeros(4)
    works = dist.batch_isend_irecv([dist.P2POp(dist.irecv, received, 1 - rank), dist.P2POp(dist.isend, sent, 1 - rank)])
    seen = received.clone() if wrong == "early read" else None
    if wrong == "write while sending":
        sent += 10
    for work in works:
        work.wait()
    if wrong == "":
        sent += 10
    return received.tolist(), None if seen is None else bool(seen.isnan().all())


def test_a_wrong_reuse_of_a_buffer_is_caught():
    assert [result[0] for result in run_delayed(2, reuse, "")] == [[2.0] * 4, [1.0] * 4]
    assert [result[0] for result in run_delayed(2, reuse, "write while sending")] == [[12.0] * 4, [11.0] * 4]
    assert all(result[1] for result in run_delayed(2, reuse, "early read"))


def duplicates(rank):
    tensors = torch.zeros(2, 4)
    dist.batch_isend_irecv([dist.P2POp(dist.isend, tensor, 1 - rank) for tensor in tensors])


def reduction(rank):
    dist.all_reduce(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize(
    "function, message", [(duplicates, "two tasks"), (reduction, "at::kDouble")], ids=["batch", "float64"]
)
def test_it_refuses_what_hccl_refuses(function, message):
    with pytest.raises(RankFailure, match=message):
        run_delayed(2, function)

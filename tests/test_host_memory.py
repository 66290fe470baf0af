"""Shared memory between ranks of one host: the same bits, the same counts, nothing overwritten, nothing left behind."""

import copy
import os
import time
from collections import Counter

import cases
import pytest
import torch
import torch.distributed as dist
from cases import Case, attend
from distributed import run_ranks
from test_attention_exact import ALGORITHM_AND_SIZE, shapes
from test_attention_layers import variants

from mindspeed_cp import ContextParallelConfig, ContextParallelGroups, UlyssesContextAttention
from mindspeed_cp.algorithms import ulysses_attention
from mindspeed_cp.comm import count_bytes, host_memory
from mindspeed_cp.comm.host_memory import HEADER_BYTES, HostMemory
from mindspeed_cp.comm.transport import all_gather, post
from mindspeed_cp.comm.workspace import Workspace

pytestmark = pytest.mark.cpu_only
NOTICE = 32  # bytes


def both_ways(rank, case):
    """Results and counted bytes with everything through shared memory, and with everything through gloo."""
    results = []
    for share_from in (0, None):
        with count_bytes() as sent:
            tensors = attend(rank, Case(**{**vars(case), "share_from": share_from}))
        results.append((tensors, dict(sent.bytes), dict(sent.messages)))
    return results


@pytest.mark.parametrize("algorithm, cp", [point for point in ALGORITHM_AND_SIZE if point.values[1] in (2, 3, 4, 6)])
def test_shared_memory_gives_the_bits_and_the_counts_of_gloo(algorithm, cp):
    for index, config in enumerate(variants(algorithm, cp)):
        case = Case(
            config,
            seq_len=(8 * cp, 29, 7)[index % 3],
            heads=12,
            kv_heads=(12, 4, 1)[index % 3],
            dtype=("float64", "bfloat16")[index % 2],
            seed=index,
        )
        for shared, sent in run_ranks(cp, both_ways, case):
            for name, tensor in shared[0].items():
                assert torch.equal(tensor, sent[0][name]), (name, case)
            assert shared[1] == sent[1]


def bytes_through_gloo(rank, case):
    """Sizes of everything that is handed to gloo, with their numbers, in forward and backward."""
    attend(rank, case)  # groups are made and connected
    sizes, batch = Counter(), dist.batch_isend_irecv

    def traced(ops):
        sizes.update(op.tensor.numel() * op.tensor.element_size() for op in ops)
        return batch(ops)

    def unused(*args, **kwargs):
        raise AssertionError("a collective of gloo")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", traced)
        patch.setattr(dist, "all_to_all_single", unused)
        patch.setattr("mindspeed_cp.comm.transport._all_gather", unused)
        attend(rank, case)
    return sizes


@pytest.mark.parametrize("algorithm", ["ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo", "kvallgather_cp_algo"])
def test_only_notices_go_through_gloo(algorithm):
    for shape in shapes(algorithm, 4):
        for sizes in run_ranks(4, bytes_through_gloo, Case(shape, seq_len=64, heads=8, kv_heads=8)):
            assert set(sizes) == {NOTICE}, (shape, sizes)


def small_messages(rank, case):
    config = ContextParallelConfig(**case.config)
    groups = ContextParallelGroups.build(config)
    large, small = (torch.empty(size, dtype=torch.uint8) for size in (1 << 14, (1 << 14) - 1))
    peer = 1 - rank
    answer = groups.host.carries(peer, large), groups.host.carries(peer, small), groups.host.carries(rank, large)
    groups.destroy()
    return answer


def test_small_messages_go_as_they_are():
    case = Case({"context_parallel_size": 2, "algorithm": "megatron_cp_algo"})
    assert run_ranks(2, small_messages, case) == [(True, False, False)] * 2


def with_a_stranger(rank, stranger):
    """peers, and ring attention as ever, when one rank cannot make memory that others see."""
    config = ContextParallelConfig(context_parallel_size=3, algorithm="megatron_cp_algo")
    with pytest.MonkeyPatch.context() as patch:
        if rank == stranger:
            patch.setattr(host_memory, "_create_file", lambda name: -1)
        groups = ContextParallelGroups.build(config, share_from=0)
    cases._setups[config.hierarchy, "stranger"] = groups
    case = Case({"context_parallel_size": 3, "algorithm": "megatron_cp_algo"}, seq_len=24, share_from="stranger")
    got, wanted = attend(rank, case), attend(rank, Case(**{**vars(case), "share_from": None}))
    del cases._setups[config.hierarchy, "stranger"]
    peers = sorted(groups.host.peers) if groups.host else None
    groups.destroy()
    return peers, all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("stranger", [0, 2])
def test_a_rank_that_cannot_be_reached_gets_its_messages_through_gloo(stranger):
    peers = {0: [None, [2], [1]], 2: [[1], [0], None]}[stranger]
    assert run_ranks(3, with_a_stranger, stranger) == [(mine, True) for mine in peers]


def exchanged(rank, sizes):
    """Messages of these sizes one after the other, between two ranks; True where each arrived as it was sent."""
    host = HostMemory.connect(dist.group.WORLD, 1)
    right = []
    for index, size in enumerate(sizes):
        sent = torch.arange(size, dtype=torch.float32) + 1000 * index + rank
        received = torch.empty(size)
        post(None, [(1 - rank, sent)], [(1 - rank, received)], "kv", host).wait()
        right.append(torch.equal(received, sent + 1 - 2 * rank))
    held = host.num_bytes
    host.close()
    return right, held


def test_segments_grow_with_the_messages_and_two_take_turns():
    sizes = [1, 1000, 10, 100_000, 100_000, 3]
    for right, held in run_ranks(2, exchanged, sizes):
        assert right == [True] * len(sizes)
        assert held == 2 * (HEADER_BYTES + 400_000)


def run_ahead(rank, number):
    """Rank 0 posts more messages than a stream has segments before rank 1 reads the first."""
    host = HostMemory.connect(dist.group.WORLD, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_memory, "PATIENCE", 0.05)
        if rank == 0:
            transfers = [post(None, [(1, torch.full((8,), float(index)))], [], "kv", host) for index in range(number)]
            dist.barrier()
            for transfer in transfers:
                transfer.wait()
            dist.barrier()
            return None
        received = [torch.empty(8) for _ in range(number)]
        transfers = [post(None, [], [(0, tensor)], "kv", host) for tensor in received]
        dist.barrier()
        for transfer in transfers:
            transfer.wait()
        dist.barrier()
        return [tensor.unique().tolist() for tensor in received]


def test_a_message_is_never_overwritten_before_it_is_read():
    assert run_ranks(2, run_ahead, 5, fresh=True)[1] == [[float(index)] for index in range(5)]


def leave_at_once(rank):
    """Rank 0 gives its memory back right after sending; rank 1 looks late."""
    host = HostMemory.connect(dist.group.WORLD, 1)
    if rank == 0:
        transfer = post(None, [(1, torch.full((1000,), 3.0))], [], "kv", host)
        host.close()
        transfer.wait()
        return None
    time.sleep(0.3)
    received = torch.empty(1000)
    post(None, [], [(0, received)], "kv", host).wait()
    return received.unique().tolist()


def test_a_rank_that_leaves_lets_the_others_read_what_it_sent_last():
    assert run_ranks(2, leave_at_once, fresh=True)[1] == [3.0]


def gathered_once(rank):
    """All ranks' tensors, and how much memory this rank used to give its own to all of them."""
    host = HostMemory.connect(dist.group.WORLD, 1)
    gathered = torch.empty(3 * 1000)
    all_gather(gathered, torch.full((1000,), float(rank)), None, "kv", host).wait()
    held = host.num_bytes
    host.close()
    return gathered.view(3, 1000).unique(dim=1).flatten().tolist(), held


def test_a_gathered_tensor_is_written_once_for_all_readers():
    assert run_ranks(3, gathered_once) == [([0.0, 1.0, 2.0], 2 * HEADER_BYTES + 4000)] * 3


def open_files(rank):
    """Open files before a group, with it, and after it was destroyed."""
    config = ContextParallelConfig(context_parallel_size=2, algorithm="megatron_cp_algo")
    warm = ContextParallelGroups.build(config, share_from=None)

    def count():
        return sum(
            os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:mindspeed_cp")
            for name in os.listdir("/proc/self/fd")
            if os.path.islink(f"/proc/self/fd/{name}")
        )

    before = count()
    groups = ContextParallelGroups.build(config, share_from=0)
    sent, received = torch.ones(100), torch.empty(100)
    post(groups.ring_group, [(1 - rank, sent)], [(1 - rank, received)], "kv", groups.host).wait()
    during = count()
    dist.barrier()
    groups.destroy()
    warm.destroy()
    return during > before, count() - before


def test_nothing_stays_open_after_the_groups():
    assert run_ranks(2, open_files) == [(True, 0)] * 2


def ulysses_module(rank):
    """The module's result and gradients with messages above the limit, through shared memory and through gloo."""
    results = []
    for limit in (None, 1):
        module = UlyssesContextAttention(torch.nn.functional.scaled_dot_product_attention, None, 1, 2)
        host = limit and HostMemory.connect(dist.group.WORLD, limit)
        ulysses_attention._memories[dist.group.WORLD] = Workspace(), host
        module = copy.deepcopy(module)
        generator = torch.Generator().manual_seed(rank)
        leaves = [torch.randn(2, 8, 32, 64, generator=generator).requires_grad_() for _ in range(3)]
        out = module(*leaves)
        out.backward(torch.ones_like(out))
        assert limit is None or host.num_bytes > 0
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    del ulysses_attention._memories[dist.group.WORLD]
    return [torch.equal(*pair) for pair in zip(*results)]


def test_the_module_uses_it_too():
    assert run_ranks(2, ulysses_module) == [[True] * 4] * 2


def disagreement(rank):
    """The error of a receiver that expects fewer bytes than were sent."""
    host = HostMemory.connect(dist.group.WORLD, 1)
    transfer = post(None, [(1 - rank, torch.ones(10 - rank))], [(1 - rank, torch.empty(10 - rank))], "kv", host)
    with pytest.raises(RuntimeError) as caught:
        transfer.wait()
    dist.barrier()
    return str(caught.value)


def test_another_length_than_expected_is_an_error_that_names_both():
    for rank, message in enumerate(run_ranks(2, disagreement, fresh=True)):
        assert f"rank {1 - rank} sent {4 * (10 - (1 - rank))} bytes where {4 * (10 - rank)} were expected" in message


def far_behind(rank, number):
    """Memory of a rank whose reader is behind by ``number`` messages, again and again: further segments are used
    again.
    """
    host = HostMemory.connect(dist.group.WORLD, 1)
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host_memory, "PATIENCE", 0.01)
            sends, receives = ([(1, torch.ones(8))], []) if rank == 0 else ([], [(0, torch.empty(8))])
            transfers = [post(None, sends, receives, "kv", host) for _ in range(number)]
            dist.barrier()
            for transfer in transfers:
                transfer.wait()
            dist.barrier()
    return host.num_bytes


def test_further_segments_are_used_again():
    assert run_ranks(2, far_behind, 5, fresh=True)[0] == 5 * (HEADER_BYTES + 32)

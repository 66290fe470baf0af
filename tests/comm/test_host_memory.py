"""Shared memory between ranks of one host: the same bits, the same counts, nothing overwritten, nothing left behind."""

import copy
import multiprocessing
import os
import time
from datetime import timedelta

import cases
import distributed
import pytest
import torch
import torch.distributed as dist
from cases import Case, attend
from distributed import run_ranks
from setups import ALGORITHM_AND_SIZE, shapes, variants

from mindspeed_cp import ContextParallelConfig, ContextParallelGroups, UlyssesContextAttention
from mindspeed_cp.comm import count_bytes, host_memory
from mindspeed_cp.comm import link as link_module
from mindspeed_cp.comm.host_memory import LINE, HostMemory
from mindspeed_cp.comm.host_memory import SMALLEST_MESSAGE as LIMIT
from mindspeed_cp.comm.link import Link
from mindspeed_cp.comm.workspace import Workspace

pytestmark = pytest.mark.cpu_only


def linked(group=None):
    """A Link over a group, None is the whole world, whose messages all go through shared memory."""
    group = dist.group.WORLD if group is None else group
    ranks = tuple(dist.get_process_group_ranks(group))
    return Link(group, dist.get_rank(group), ranks, carrier=HostMemory.connect(group, 1))


def one_way(link, rank, tensor):
    """Post a message from rank 0 to rank 1: what is sent, or where it is received."""
    return link.exchange([(1, [tensor])] if rank == 0 else [], [(0, [tensor])] if rank == 1 else [], "kv")


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


def without_gloo(rank, case):
    """Forward and backward where gloo carries nothing."""
    attend(rank, case)  # groups are made and connected

    def unused(*args, **kwargs):
        raise AssertionError("a message of gloo")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", unused)
        patch.setattr(dist, "all_to_all_single", unused)
        patch.setattr("mindspeed_cp.comm.link._all_gather", unused)
        attend(rank, case)


@pytest.mark.parametrize("algorithm", ["ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo", "kvallgather_cp_algo"])
def test_neither_messages_nor_notices_go_through_gloo(algorithm):
    for shape in shapes(algorithm, 4):
        run_ranks(4, without_gloo, Case(shape, seq_len=64, heads=8, kv_heads=8))


def small_messages(rank, case):
    config = ContextParallelConfig(**case.config)
    groups = ContextParallelGroups.build(config)
    host, device = groups.cp.carrier, torch.device("cpu")
    answer = [
        host.carries(*message)
        for message in ((1 - rank, device, LIMIT), (1 - rank, device, LIMIT - 1), (rank, device, LIMIT))
    ]
    groups.destroy()
    return answer


def test_small_messages_go_as_they_are():
    case = Case({"context_parallel_size": 2, "algorithm": "megatron_cp_algo"})
    assert run_ranks(2, small_messages, case) == [[True, False, False]] * 2


def with_a_stranger(rank, stranger):
    """peers, and ring attention as ever, when one rank cannot make memory that others see."""
    config = ContextParallelConfig(context_parallel_size=3, algorithm="megatron_cp_algo")
    with pytest.MonkeyPatch.context() as patch:
        if rank == stranger:
            patch.setattr(host_memory, "_create_file", lambda name: -1)
        groups = ContextParallelGroups.build(config, share_from=0)
    setup = config.hierarchy, config.layer_algorithms, config.p2p, "stranger"
    cases._setups[setup] = groups
    case = Case({"context_parallel_size": 3, "algorithm": "megatron_cp_algo"}, seq_len=24, share_from="stranger")
    got, wanted = attend(rank, case), attend(rank, Case(**{**vars(case), "share_from": None}))
    del cases._setups[setup]
    peers = sorted(groups.cp.carrier.peers) if groups.cp.carrier else None
    groups.destroy()
    return peers, all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("stranger", [0, 2])
def test_a_rank_that_cannot_be_reached_gets_its_messages_through_gloo(stranger):
    peers = {0: [None, [2], [1]], 2: [[1], [0], None]}[stranger]
    assert run_ranks(3, with_a_stranger, stranger) == [(mine, True) for mine in peers]


def exchanged(rank, sizes):
    """Messages of these sizes, whether each arrived as it was sent, and how much memory this rank used."""
    link = linked()
    right = list(swapped(rank, link, sizes))
    held = link.carrier.num_bytes
    link.carrier.close()
    return right, held


def test_messages_of_any_size_take_the_lowest_free_place():
    small, large = [1, 1000, 10], [100_000] * 4
    for right, held in run_ranks(2, exchanged, [*small, *large, 3]):
        assert right == [True] * 8
        # The one before may not have been read yet, and the small ones may have pushed the first large one back.
        assert held <= 2 * (4 * large[0] + 2 * LINE) + sum(4 * size + 2 * LINE for size in small)


def run_ahead(rank, number):
    """Rank 0 posts many messages before rank 1 reads the first; what it holds for them, then for as many again."""
    link, held = linked(), []
    for round_ in range(2):
        started = time.monotonic()
        tensors = [torch.full((8,), float(index + round_)) if rank == 0 else torch.empty(8) for index in range(number)]
        transfers = [one_way(link, rank, tensor) for tensor in tensors]
        posted = time.monotonic() - started
        dist.barrier()
        for transfer in transfers:
            transfer.wait()
        dist.barrier()
        held.append(link.carrier.num_bytes)
    return [tensor.unique().tolist() for tensor in tensors], held, posted


def test_a_message_is_never_overwritten_before_it_is_read_and_nobody_waits_for_that():
    (_, held, posted), (received, *_) = run_ranks(2, run_ahead, 5, fresh=True)
    assert received == [[float(index + 1)] for index in range(5)]
    assert held == [5 * 2 * LINE] * 2, "places that were read are used again"
    assert posted < 0.1


def send_and_destroy(rank, number):
    """Rank 0 sends, gives its memory back and destroys the group; only then rank 1 looks. How often that was right."""
    right = 0
    for index in range(number):
        group = dist.new_group([0, 1])
        link = linked(group)
        message = torch.full((1000,), float(index)) if rank == 0 else torch.empty(1000)
        transfer = one_way(link, rank, message)
        if rank == 0:
            transfer.wait()
            link.carrier.close()
            dist.destroy_process_group(group)
        dist.barrier()
        if rank == 1:
            transfer.wait()
            right += bool((message == index).all())
            link.carrier.close()
            dist.destroy_process_group(group)
    return right


def test_a_message_arrives_though_its_sender_destroys_the_group_at_once():
    assert run_ranks(2, send_and_destroy, 160, fresh=True)[1] == 160


def leave_by_os_exit(rank, path, sender_lives, sender_lives_until_closed):
    """A whole rank: rank 0 ends in the line after its send; rank 1 looks when rank 0 is gone, and exits with 0."""
    store = dist.FileStore(path, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    link = linked()
    if rank == 0:
        one_way(link, rank, torch.full((1000,), 3.0)).wait()
        os._exit(0)
    os.close(sender_lives_until_closed)
    received = torch.empty(1000)
    transfer = one_way(link, rank, received)
    assert os.read(sender_lives, 1) == b""
    transfer.wait()
    os._exit(0 if bool((received == 3).all()) else 1)


def leave_many_times(connection, folder, number):
    """Sends the exit codes of ``number`` pairs of such ranks, forked from here."""
    codes = []
    for index in range(number):
        ends, pids = os.pipe(), []
        for rank in range(2):
            pids.append(os.fork())
            if pids[-1] == 0:
                try:
                    leave_by_os_exit(rank, f"{folder}/{index}", *ends)
                finally:
                    os._exit(2)
        for end in ends:
            os.close(end)
        codes.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
    connection.send(codes)


def test_a_message_arrives_though_its_sender_ends_by_os_exit(tmp_path):
    ours, theirs = multiprocessing.Pipe()
    with distributed.forking_from(()):
        process = multiprocessing.get_context("forkserver").Process(
            target=leave_many_times, args=(theirs, str(tmp_path), 40), daemon=True
        )
        process.start()
    try:
        assert ours.poll(100) and ours.recv() == [[0, 0]] * 40
    finally:
        process.kill()
        process.join()


def swapped(rank, link, sizes):
    """Messages of so many float32 one after the other, between two ranks; True where each arrived as it was sent."""
    for index, size in enumerate(sizes):
        sent = torch.arange(size, dtype=torch.float32) + 1000 * index + rank
        received = torch.empty(size)
        link.exchange([(1 - rank, [sent])], [(1 - rank, [received])], "kv").wait()
        yield torch.equal(received, sent + 1 - 2 * rank)


def gathered_once(rank):
    """All ranks' tensors, and how much memory this rank used to give its own to all of them."""
    link = linked()
    gathered = link.gather(torch.full((1000,), float(rank)), [1000] * 3, "kv").wait()
    held = link.carrier.num_bytes
    link.carrier.close()
    return [shard.unique().tolist() for shard in gathered], held


def test_a_gathered_tensor_is_written_once_for_all_readers():
    assert run_ranks(3, gathered_once) == [([[0.0], [1.0], [2.0]], LINE + 4032)] * 3


def ulysses_module(rank):
    """The module's result and gradients with messages above the limit, through shared memory and through gloo."""
    results = []
    for limit in (None, 1):
        module = UlyssesContextAttention(torch.nn.functional.scaled_dot_product_attention, None, 1, 2)
        host = limit and HostMemory.connect(dist.group.WORLD, limit)
        link_module._memories[dist.group.WORLD] = Workspace(), host
        module = copy.deepcopy(module)
        generator = torch.Generator().manual_seed(rank)
        leaves = [torch.randn(2, 8, 32, 64, generator=generator).requires_grad_() for _ in range(3)]
        out = module(*leaves)
        out.backward(torch.ones_like(out))
        assert limit is None or host.num_bytes > 0
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    del link_module._memories[dist.group.WORLD]
    return [torch.equal(*pair) for pair in zip(*results)]


def test_the_module_uses_it_too():
    assert run_ranks(2, ulysses_module) == [[True] * 4] * 2


def disagreement(rank):
    """The error of a receiver that expects fewer bytes than were sent."""
    link = linked()
    transfer = link.exchange([(1 - rank, [torch.ones(10 - rank)])], [(1 - rank, [torch.empty(10 - rank)])], "kv")
    with pytest.raises(RuntimeError) as caught:
        transfer.wait()
    dist.barrier()
    return str(caught.value)


def test_another_length_than_expected_is_an_error_that_names_both():
    for rank, message in enumerate(run_ranks(2, disagreement, fresh=True)):
        assert f"rank {1 - rank} sent {4 * (10 - (1 - rank))} bytes where {4 * (10 - rank)} were expected" in message

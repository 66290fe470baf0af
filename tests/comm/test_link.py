"""Link: exchange, gather and all-to-all over one process group, each a Pending; one message for each peer."""

import weakref
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import Case, attend, expected, largest_errors, whole
from distributed import run_ranks

from mindspeed_cp import ContextParallelConfig, ContextParallelGroups
from mindspeed_cp.comm import count_bytes, groups
from mindspeed_cp.comm.host_memory import HostMemory
from mindspeed_cp.comm.link import Link, link_of
from mindspeed_cp.comm.messages import Message, Pending, copy_message
from mindspeed_cp.comm.posting import Posted, post_together, turn
from mindspeed_cp.comm.sequence_exchange import Part, SequenceExchange
from mindspeed_cp.comm.workspace import Workspace


def link(share_from):
    world = dist.group.WORLD
    carrier = None if share_from is None else HostMemory.connect(world, share_from)
    return Link(world, dist.get_rank(), tuple(range(dist.get_world_size())), carrier=carrier)


def test_a_pending_is_awaited_once_and_says_so():
    pending = Pending(lambda: 3).then(lambda number: number + 1)
    assert pending.wait() == 4
    with pytest.raises(RuntimeError, match="awaited before; keep what the first"):
        pending.wait()


def test_messages_whose_tensors_lie_end_to_end_in_memory_are_not_copied():
    rows = torch.arange(24.0).view(6, 2, 2)
    messages = [Message(((rows[start:stop],),), rows.dtype) for start, stop in ((0, 2), (2, 2), (2, 6))]
    assert Message.joined(messages).in_place.data_ptr() == rows.data_ptr()
    for other in ([rows[:2], rows[3:]], [rows[:, :1]], [rows[:2], torch.zeros(4, 2, 2)], [rows.double()]):
        assert Message.joined(Message(((tensor,),), rows.dtype) for tensor in other).in_place is None


def test_a_message_is_the_same_however_each_side_cuts_it():
    query, key = torch.randn(5, 2, 3, 4), torch.randn(5, 2, 1, 6)
    source = Message(((query, key),), torch.float32)
    flat = torch.empty(source.numel)
    source.write(flat)
    apart = torch.zeros_like(query), torch.zeros_like(key)
    Message(((apart[0][3:], apart[1][3:]), (apart[0][:3], apart[1][:3])), torch.float32).read(flat)
    assert torch.equal(apart[0].roll(-3, 0), query) and torch.equal(apart[1].roll(-3, 0), key)
    beside = torch.zeros(5, 2, 18)
    copy_message(source, Message(((beside[2:],), (beside[:2],)), torch.float32))
    assert torch.equal(beside.roll(-2, 0)[..., :12], query.flatten(2))
    copy_message(source, Message(((beside,),), torch.float32))
    assert torch.equal(beside[..., 12:], key.flatten(2))


def test_what_is_borrowed_is_nobody_elses_and_is_used_again():
    workspace, device = Workspace(), torch.device("cpu")
    first, second = (workspace.borrow(10, torch.float32, device) for _ in range(2))
    assert first.data_ptr() != second.data_ptr() and workspace.num_bytes == 80
    workspace.give_back(first)
    assert workspace.borrow(8, torch.float32, device).data_ptr() == first.data_ptr()
    workspace.give_back(second)
    assert workspace.borrow(20, torch.float32, device).numel() == 20
    assert workspace.num_bytes == 40 + 80, "what is too small makes room"


def test_what_one_work_waits_for_lives_until_then():
    tensors = [torch.zeros(4) for _ in range(3)]
    alive = [weakref.ref(tensor) for tensor in tensors]
    ops = [Posted(dist.isend, tensor, 1, 0) for tensor in tensors]
    over = Link(None, 0, (0, 1))
    with (
        mock.patch.object(dist, "P2POp", lambda *_: None),
        mock.patch.object(dist, "batch_isend_irecv", lambda calls: ["of the whole batch"]),
    ):
        works = post_together(over, ops, "dkv")
    del tensors, ops
    assert len(works) == 1 and all(tensor() is not None for tensor in alive)
    del works
    assert all(tensor() is None for tensor in alive)


def split_lists(rank, lengths, heads):
    """The split lists with which Ulysses' exchange calls the collective: there and back."""
    over, called, real = link(None), [], dist.all_to_all_single
    ends = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    exchange = SequenceExchange(over, tuple(((start, stop),) for start, stop in zip(ends, ends[1:])))
    starts = [sum(heads[:index]) for index in range(len(heads) + 1)]
    part = Part("q", sum(heads), 4, tuple(map(slice, starts, starts[1:])))

    def spy(received, send, *splits, **options):
        called.append([split for split in splits if split])
        return real(received, send, *splits, **options)

    mine = torch.randn(lengths[rank], 2, sum(heads), 4)
    with mock.patch.object(dist, "all_to_all_single", spy):
        gathered = exchange.scatter_heads_gather_sequence([part], [mine]).wait()
        (back,) = exchange.scatter_sequence_gather_heads([part], gathered, torch.float32).wait()
    assert torch.equal(mine, back)
    return called


@pytest.mark.parametrize(
    ("lengths", "heads", "is_equal"),
    [((3, 3), (2, 2), True), ((3, 2), (2, 2), False), ((3, 3), (2, 1), False), ((0, 3), (0, 2), False)],
)
def test_equal_messages_of_an_all_to_all_need_no_split_lists(lengths, heads, is_equal):
    for called in run_ranks(2, split_lists, lengths, heads):
        assert [not splits for splits in called] == [is_equal, is_equal]


def transfers(rank, share_from):
    """All three kinds of transfer between three ranks, uneven, empty and in pieces."""
    over, size = link(share_from), dist.get_world_size()
    after, before = (rank + 1) % size, (rank - 1) % size
    rows = torch.arange(10.0) + 100 * rank
    received = torch.zeros(10)
    pieces = [received[1:2], received[4:4], received[7:9]]
    over.exchange([(after, [rows[:1], rows[5:7]])], [(before, pieces)], "kv").wait()
    assert received.tolist() == [0, 100 * before, 0, 0, 0, 0, 0, *(100 * before + i for i in (5, 6)), 0]
    lengths = [3, 0, 2]
    shards = over.gather(torch.full((lengths[rank], 2), float(rank)), lengths, "kv").wait()
    assert [shard.tolist() for shard in shards] == [[[float(r)] * 2] * n for r, n in enumerate(lengths)]
    leaving = [Message(((torch.full((rank + peer, 1), 10.0 * rank + peer),),), torch.float32) for peer in range(size)]
    arrived = [torch.zeros(rank + peer, 1) for peer in range(size)]
    over.all_to_all(leaving, [Message(((tensor,),), torch.float32) for tensor in arrived], "q").wait()
    assert [tensor.flatten().tolist() for tensor in arrived] == [[10.0 * p + rank] * (rank + p) for p in range(size)]
    with pytest.raises(AssertionError, match="two messages for one rank"):
        over.exchange([(after, [rows]), (after, [rows])], [], "kv")


@pytest.mark.parametrize("share_from", [None, 0, 20])
def test_transfers_arrive_through_gloo_and_through_memory(share_from):
    run_ranks(3, transfers, share_from)


def stamped(rank, share_from, length):
    """What the check of an all-to-all is told, and whether messages arrive; ``length`` is rank 1's."""
    over, mine = link(share_from), (length if rank == 1 else 2, 7 + rank)
    told = []
    leaving = [Message(((torch.full((mine[0], 1), float(rank)),),), torch.float32) for _ in range(2)]
    arrived = [torch.zeros(2, 1) for _ in range(2)]
    arriving = [Message(((tensor,),), torch.float32) for tensor in arrived]

    def check(stamps):
        told.extend(stamps)
        if len({rows for rows, _ in stamps}) > 1:
            raise ValueError("they differ")

    pending = over.all_to_all(leaving, arriving, "q", mine, check)
    try:
        pending.wait()
        return told, [tensor.flatten().tolist() for tensor in arrived]
    except ValueError as error:
        return told, str(error)


@pytest.mark.parametrize("share_from", [None, 0])
@pytest.mark.parametrize("length", [2, 3, 0])
def test_ranks_tell_each_other_something_with_their_messages(share_from, length):
    wanted = [[0.0, 0.0], [1.0, 1.0]] if length == 2 else "they differ"
    assert run_ranks(2, stamped, share_from, length, fresh=True) == [([(2, 7), (length, 8)], wanted)] * 2


def messages_in_a_batch(rank, case):
    """Most messages of gloo for one peer in one direction of one batch, and the counts of messages of a pass."""
    attend(rank, case)
    most, batch = [0], dist.batch_isend_irecv

    def traced(ops):
        most.append(max(Counter((op.op.__name__, op.peer) for op in ops).values()))
        return batch(ops)

    with pytest.MonkeyPatch.context() as patch, count_bytes() as traffic:
        patch.setattr(dist, "batch_isend_irecv", traced)
        result = attend(rank, case)
    return result, max(most), dict(traffic.messages)


@pytest.mark.parametrize("share_from", [None, 0])
def test_the_rows_that_a_peer_needs_travel_in_one_message(share_from):
    case = Case(
        {"context_parallel_size": 3, "algorithm": "megatron_cp_algo", "kv_exchange": "direct"},
        seq_len=48,
        cu_seqlens=(0, 3, 12, 20, 27, 41, 48),
        share_from=share_from,
    )
    results = run_ranks(3, messages_in_a_batch, case)
    errors = largest_errors(whole(case, [result for result, *_ in results]), expected(case))
    assert max(errors.values()) < 1e-10
    for _, most, messages in results:
        assert most == (1 if share_from is None else 0)
        assert messages["kv"] <= 2 * 2 and messages["dkv"] <= 2, "one for each peer, forward and backward"


def scattered(rank, alltoall, unpack, share_from):
    """Heads to sequence and back for ranks that hold pieces of the sequence in any order."""
    rows = (((7, 9), (0, 3)), ((3, 5),), ((9, 10), (5, 7)))
    exchange = SequenceExchange(link(share_from), rows, alltoall, unpack)
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(10, 2, heads, 4, generator=generator) for heads in (7, 1))
    parts = [
        Part("q", 7, 4, (slice(0, 3), slice(3, 5), slice(5, 7))),
        Part("kv", 1, 4, (slice(0, 1), slice(0, 1), slice(0, 1))),
    ]
    held = torch.cat([torch.arange(start, stop) for start, stop in rows[rank]])
    arrived = exchange.scatter_heads_gather_sequence(parts, [query[held], key[held]]).wait()
    assert torch.equal(arrived[0], query[:, :, parts[0].shares[rank]]) and torch.equal(arrived[1], key)
    back = exchange.scatter_sequence_gather_heads(parts, arrived, torch.float32).wait()
    assert torch.equal(back[0], query[held]) and torch.equal(back[1], 3 * key[held])
    assert torch.equal(exchange.gather_sequence(key[held], "kv"), key)


@pytest.mark.parametrize("unpack", [None, "sequence", "heads"])
@pytest.mark.parametrize("alltoall, share_from", [(True, None), (True, 0), (False, None)])
def test_the_sequence_ascends_after_the_exchange_whatever_order_the_ranks_hold_it_in(alltoall, unpack, share_from):
    run_ranks(3, scattered, alltoall, unpack, share_from)


def numbered(rank):
    """Numbers of two links over one group that were made apart."""
    made = ContextParallelGroups.build(ContextParallelConfig(context_parallel_size=2), cp_group=dist.group.WORLD)
    found = [next(made.cp.numbers), next(link_of(dist.group.WORLD).numbers)]
    made.destroy()
    return found


@pytest.mark.cpu_only
def test_messages_of_all_links_over_a_group_have_numbers_of_their_own():
    for first, second in run_ranks(2, numbered):
        assert second == first + 1


def unfinished(size, messages, order):
    """How many messages (sender, receiver) never end, where every rank finishes its own one after the other in
    ``order`` and each needs both of its ends; and how many rounds the others take.
    """
    waiting = [sorted((m for m in messages if rank in m), key=order) for rank in range(size)]
    rounds = 0
    while True:
        ready = [m for m in messages if all(waiting[rank][:1] == [m] for rank in m)]
        if not ready:
            return sum(map(len, waiting)) // 2, rounds
        rounds += 1
        for message in ready:
            for rank in message:
                waiting[rank].pop(0)


@pytest.mark.parametrize("size", range(2, 14))
def test_messages_in_turn_never_wait_in_a_circle_and_a_ring_takes_two_rounds_or_three(size):
    def in_turn(message):
        return turn(*message, size)

    ring = [(rank, (rank + 1) % size) for rank in range(size)]
    everyone = [(a, b) for a in range(size) for b in range(size) if a != b]
    some = [(a, b) for a, b in everyone if (3 * a + 5 * b) % 7 < 3]
    assert unfinished(size, ring, in_turn) == (0, 2 + size % 2)
    for messages in (everyone, some):
        assert unfinished(size, messages, in_turn)[0] == 0
        assert len(set(map(in_turn, messages))) == len(messages)


def test_ranks_that_all_send_before_they_receive_wait_in_a_circle():
    ring = [(rank, (rank + 1) % 4) for rank in range(4)]
    waiting = [sorted((m for m in ring if rank in m), key=lambda m: m[0] != rank) for rank in range(4)]
    assert not [m for m in ring if all(waiting[rank][0] == m for rank in m)]


def attend_one_by_one(rank, case, forbidden):
    """The case's results where a batch would raise, and how many batches were posted."""
    batches = []

    def batch_isend_irecv(operations):
        batches.append(len(operations))
        assert not forbidden, "HCCL forbids batches here"
        return original(operations)

    original, dist.batch_isend_irecv = dist.batch_isend_irecv, batch_isend_irecv
    try:
        return attend(rank, case), len(batches)
    finally:
        dist.batch_isend_irecv = original


@pytest.mark.cpu_only
@pytest.mark.parametrize("cp", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    "more", [{}, {"kv_exchange": "direct"}, {"window_size": 2}, {"send_recv_overlap": True}], ids=str
)
def test_messages_one_by_one_give_the_same_bits_without_a_batch(cp, more):
    if "window_size" in more and cp not in (4, 8):
        pytest.skip("windows of two need an even ring of four or more")
    config = {"context_parallel_size": cp, "algorithm": "megatron_cp_algo", **more}
    sizes = dict(seq_len=29, heads=2, kv_heads=2, share_from=None)
    together, alone = (Case({**config, "p2p": p2p}, **sizes) for p2p in ("batch", "isend"))
    as_batch = run_ranks(cp, attend_one_by_one, together, False)
    for (got, none), (wanted, some) in zip(run_ranks(cp, attend_one_by_one, alone, True), as_batch):
        assert none == 0 < some and all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "p2p, virtual, backend, expected",
    [
        ("auto", False, "hccl", False),
        ("auto", True, "gloo", False),
        ("auto", True, "cpu:gloo,npu:hccl", True),
        ("isend", False, "gloo", True),
        ("batch", True, "nccl", False),
    ],
)
def test_hccl_gets_single_messages_beside_virtual_pipeline_stages(monkeypatch, p2p, virtual, backend, expected):
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    config = ContextParallelConfig(context_parallel_size=2, algorithm="megatron_cp_algo", p2p=p2p)
    assert groups._one_by_one(config, virtual) is expected


def test_batches_that_hccl_forbids_are_refused_with_a_way_out(monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda: "hccl")
    config = ContextParallelConfig(context_parallel_size=2, algorithm="megatron_cp_algo", p2p="batch")
    with pytest.raises(ValueError, match="--cp-p2p batch cannot work with virtual pipeline stages.*--cp-p2p isend"):
        groups._one_by_one(config, True)

"""MindSpeed's ringattn_context_parallel on SBH tensors, against dense attention in one process."""

import gc
import weakref
from itertools import pairwise
from types import SimpleNamespace

import pytest
import reference
import torch
import torch.distributed as dist
from distributed import run_ranks

from mindspeed_cp.comm import count_bytes
from mindspeed_cp.compat.ring import _Place, ringattn_context_parallel

HEADS, KV_HEADS, DK, DV, BATCH = 4, 2, 6, 4, 2


def _halves(length, rank, world):
    """Positions of both halves of a rank in a causal ring over ``length`` tokens, as MindSpeed cuts them."""
    chunks = torch.arange(length).chunk(2 * world)
    return torch.cat([chunks[rank], chunks[2 * world - 1 - rank]])


def _halves_of_documents(ends, rank, world):
    return torch.cat([start + _halves(stop - start, rank, world) for start, stop in pairwise(ends)])


def _para(causal, rank, world, **extra):
    return {
        "causal": causal,
        "cp_group": torch.distributed.group.WORLD,
        "cp_size": world,
        "rank": rank,
        "cp_global_ranks": list(range(world)),
        **extra,
    }


def _tensors(seq):
    generator = torch.Generator().manual_seed(11)
    return [
        torch.randn(seq, BATCH, heads, dim, dtype=torch.float64, generator=generator)
        for heads, dim in ((HEADS, DK), (KV_HEADS, DK), (KV_HEADS, DV), (HEADS, DV))
    ]


def _check(rank, seq, positions, para, allowed, call=None, **kwargs):
    """positions: this rank's, one row for all of the batch."""
    tensors = _tensors(seq)
    expected = reference.attention_with_gradients(*tensors, allowed)
    local = [tensor[positions].flatten(2).clone().requires_grad_() for tensor in tensors[:3]]
    with count_bytes() as forward:
        out = ringattn_context_parallel(*local, HEADS, para, **kwargs)
    with count_bytes() as backward:
        out.backward(tensors[3][positions].flatten(2))
    torch.testing.assert_close(out, expected["out"][positions].flatten(2), rtol=0, atol=1e-12)
    for tensor, name in zip(local, ("dq", "dk", "dv"), strict=True):
        torch.testing.assert_close(tensor.grad, expected[name][positions].flatten(2), rtol=0, atol=1e-12)
    return forward, backward


def _plain(rank):
    world = torch.distributed.get_world_size()
    seq = 4 * world * 2
    rows = lambda *tail: reference.allowed_pairs(seq, **dict(tail))  # noqa: E731
    zigzag, contiguous = _halves(seq, rank, world), torch.arange(seq).chunk(world)[rank]
    compressed = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    _check(rank, seq, zigzag, _para(True, rank, world), rows(("causal", True)))
    _check(
        rank,
        seq,
        zigzag,
        _para(True, rank, world),
        rows(("causal", True)),
        softmax_scale=DK**-0.5,
        attn_mask=compressed,
    )
    _check(rank, seq, contiguous, _para(False, rank, world), rows())
    mask = torch.rand(seq, seq, generator=torch.Generator().manual_seed(5)) < 0.3
    _check(rank, seq, contiguous, _para(False, rank, world), rows(("attention_mask", mask)), attn_mask=mask)
    blocks = [block.to(torch.uint8) for block in mask[contiguous].chunk(world, dim=1)]
    _check(rank, seq, contiguous, _para(False, rank, world), rows(("attention_mask", mask)), attn_mask=blocks)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_causal_full_and_masked_attention_match_dense(world):
    run_ranks(world, _plain)


def _windows(rank):
    world, seq = 4, 16
    allowed = reference.allowed_pairs(seq, causal=True)
    second = torch.distributed.new_group(list(range(world)))
    inner = [rank // 2 * 2, rank // 2 * 2 + 1]
    window = {"cp_inner_ranks": inner, "cp_outer_ranks": [rank % 2, rank % 2 + 2]}
    shard = seq // world * BATCH * KV_HEADS * (DK + DV) * 8
    assert _Place.of(_para(True, rank, world, **window)).groups.hierarchy == (1, 2, 2)
    for extra in (window, {**window, "cp_group_for_send_recv_overlap": second}, {"cp_inner_ranks": list(range(4))}):
        for policy, fetched in ((None, 3), ("half", None), ("full", 0)):
            para = _para(True, rank, world, cache_policy=policy, **extra)
            forward, backward = _check(rank, seq, _halves(seq, rank, world), para, allowed)
            assert forward["kv"] + forward["kv.value"] == 3 * shard
            assert fetched is None or backward["kv"] == fetched * shard
    return torch.distributed.destroy_process_group(second)


def test_double_ring_overlap_and_cache_policies_match_dense():
    run_ranks(4, _windows)


def _uneven(rank):
    world = torch.distributed.get_world_size()
    for lengths in ((7, 6, 6), (5, 5, 4), (1, 1, 0)):
        seq = sum(lengths)
        sizes = [length - length // 2 for length in lengths] + [length // 2 for length in reversed(lengths)]
        chunks = torch.arange(seq).split(sizes)
        _check(
            rank,
            seq,
            torch.cat([chunks[rank], chunks[2 * world - 1 - rank]]),
            _para(True, rank, world),
            reference.allowed_pairs(seq, causal=True),
            shapes=list(lengths),
        )
    for lengths in ((2, 7, 1), (0, 3, 5)):
        seq = sum(lengths)
        _check(
            rank,
            seq,
            torch.arange(seq).split(lengths)[rank],
            _para(False, rank, world),
            reference.allowed_pairs(seq),
            shapes=list(lengths),
        )


def _uneven_by_name(rank):
    """The same lengths as a dict, by place in the ring and by global rank."""
    group, ranks, lengths = dist.new_group([1, 2]), [1, 2], (5, 2)
    if rank == 0:
        return
    place = ranks.index(rank)
    para = {"causal": False, "cp_group": group, "cp_size": 2, "rank": place, "cp_global_ranks": ranks}
    for names in (range(2), ranks):
        shapes = dict(reversed(list(zip(names, lengths))))
        _check(place, 7, torch.arange(7).split(lengths)[place], para, reference.allowed_pairs(7), shapes=shapes)
    query = torch.zeros(lengths[place], 1, HEADS * 4)
    with pytest.raises(ValueError, match="or a dict by place in the ring, else by global rank"):
        ringattn_context_parallel(query, query, query, HEADS, para, shapes={0: 5, 2: 2})


def test_shapes_may_be_a_dict():
    run_ranks(3, _uneven_by_name)


def test_shapes_give_every_rank_its_own_length():
    run_ranks(3, _uneven)


def _packed(rank):
    world, seq = 2, 24
    documents = (0, 4, 12, 24)
    allowed = reference.allowed_pairs(seq, causal=True, cu_seqlens=documents)
    para, ends = _para(True, rank, world), torch.tensor(documents, dtype=torch.int32)
    params = lambda cu_seqlens: SimpleNamespace(cu_seqlens_q=cu_seqlens)  # noqa: E731
    # Boundaries of the whole sequence, which is zigzag as a whole.
    _check(rank, seq, _halves(seq, rank, world), para, allowed, packed_seq_params=params(ends))
    # MindSpeed: boundaries that count this rank's tokens over the batch; every document is zigzag.
    mine = _halves_of_documents(documents, rank, world)
    local = [end // world + row * seq // world for row in range(BATCH) for end in documents[1:]]
    _check(rank, seq, mine, para, allowed, packed_seq_params=params(torch.tensor(local)))
    # Boundaries with padding count all ranks' tokens.
    padded = SimpleNamespace(cu_seqlens_q=None, cu_seqlens_q_padded=torch.tensor([0] + [end * world for end in local]))
    _check(rank, seq, mine, para, allowed, packed_seq_params=padded)
    # MindSpeed's "general": contiguous, causal within documents.
    over_batch = [end + row * seq for row in range(BATCH) for end in documents[1:]]
    _check(
        rank,
        seq,
        torch.arange(seq).chunk(world)[rank],
        _para(False, rank, world),
        allowed,
        packed_seq_params=params(torch.tensor(over_batch)),
    )


@pytest.mark.filterwarnings("ignore::mindspeed_cp.settings.notices.ContextParallelWarning")
def test_packed_documents_match_dense_in_every_convention_of_boundaries():
    run_ranks(2, _packed)


def _rows_of_their_own(rank):
    """Batch rows with different documents, and tensors without a batch."""
    world, seq = 2, 16
    rows = [(0, 4, 16), (0, 8, 12, 16)]
    ids = torch.stack([reference.document_ids(row, seq) for row in rows])
    allowed = reference.allowed_pairs(seq, causal=True) & (ids[:, :, None] == ids[:, None, :])
    tensors = _tensors(seq)
    expected = reference.attention_with_gradients(*tensors, allowed)
    mine = [_halves_of_documents(row, rank, world) for row in rows]
    ends = torch.tensor([end // world + index * seq // world for index, row in enumerate(rows) for end in row[1:]])
    params = SimpleNamespace(cu_seqlens_q=ends)

    def take(tensor):
        return torch.stack([tensor[mine[index], index] for index in range(BATCH)], dim=1)

    def tokens(tensor):  # (tokens, heads, dim), one row of the batch after the other
        return take(tensor).transpose(0, 1).flatten(0, 1)

    for view in (lambda tensor: take(tensor).flatten(2), tokens):
        local = [view(tensor).clone().requires_grad_() for tensor in tensors[:3]]
        out = ringattn_context_parallel(*local, HEADS, _para(True, rank, world), packed_seq_params=params)
        torch.testing.assert_close(out, view(expected["out"]), rtol=0, atol=1e-12)
        out.backward(view(tensors[3]))
        for tensor, name in zip(local, ("dq", "dk", "dv"), strict=True):
            torch.testing.assert_close(tensor.grad, view(expected[name]), rtol=0, atol=1e-12)


def test_batch_rows_may_have_documents_of_their_own():
    run_ranks(2, _rows_of_their_own)


def _messages(rank):
    tensors = [tensor.flatten(2) for tensor in _tensors(4)[:3]]
    good = _para(True, rank, 2)
    for para, kwargs, words in (
        ({**good, "pse": torch.zeros(1)}, {}, "rotary"),
        ({key: value for key, value in good.items() if key != "rank"}, {}, "has no rank"),
        ({**good, "cp_global_ranks": [1, 0]}, {}, "in ring order"),
        ({**good, "cp_size": 3}, {}, "cp_size 3"),
        (good, {"shapes": [4, 5, 6]}, "each of the 2 ranks"),
        (good, {"attn_mask": torch.zeros(3, 3, dtype=torch.bool)}, r"\(8, 8\)"),
        (good, {"attn_mask": [torch.zeros(3, 3, dtype=torch.bool)] * 2}, "one per rank"),
        (good, {"packed_seq_params": SimpleNamespace(cu_seqlens_q=torch.tensor([3, 5]))}, "ends with 5"),
        (
            good,
            {
                "packed_seq_params": SimpleNamespace(cu_seqlens_q=torch.tensor([0, 8])),
                "attn_mask": torch.zeros(8, 8, dtype=torch.bool),
            },
            "leave one out",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            ringattn_context_parallel(*tensors, HEADS, para, **kwargs)
    with pytest.raises(ValueError, match="n = 5 heads"):
        ringattn_context_parallel(*tensors, 5, good)


def test_what_cannot_be_computed_raises_with_a_way_out():
    run_ranks(2, _messages)


def _group_goes(rank):
    """Whether a group's buffers are gone with it, though nobody collects garbage."""
    group = dist.new_group([0, 1])
    para = {"causal": True, "cp_group": group, "cp_size": 2, "rank": rank, "cp_global_ranks": [0, 1]}
    query = torch.randn(4, 1, 8, dtype=torch.float64)
    ringattn_context_parallel(query, query, query, 2, para)
    found = weakref.ref(group)
    dist.barrier()
    dist.destroy_process_group(group)
    gc.disable()
    try:
        del group, para
        return found() is None
    finally:
        gc.enable()


def test_a_group_that_was_used_once_is_not_kept():
    assert run_ranks(2, _group_goes) == [True] * 2

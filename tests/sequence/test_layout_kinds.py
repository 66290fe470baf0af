"""Layouts as values: document zigzag, layouts that somebody else made, and what tells a batch's names apart."""

import itertools
import random

import numpy as np
import pytest
import torch
from distributed import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_cp import ContextParallelConfig, ContextParallelGroups, SequenceLayout, gather_sequence, shard_batch
from mindspeed_cp.attention.ring_plan import RingPlan
from mindspeed_cp.compat.ring_layout import document_layout, row_layout
from mindspeed_cp.sequence.balance import balanced_rings, imbalance
from mindspeed_cp.sequence.blocks import plan_blocks
from mindspeed_cp.sequence.runs import split_sizes
from mindspeed_cp.sequence.slice_mask import document_mask

RING = "megatron_cp_algo"


def config(cp, algorithm=RING, **changes):
    return ContextParallelConfig(context_parallel_size=cp, algorithm=algorithm, **changes)


def megatrons_document_zigzag(cu_seqlens, cp, rank):
    """Positions as Megatron, TransformerEngine and verl cut packed documents, written as they write it."""
    held = []
    for start, stop in zip(cu_seqlens, cu_seqlens[1:]):
        chunk = (stop - start) // (2 * cp)
        held += range(start + rank * chunk, start + (rank + 1) * chunk)
        held += range(stop - (rank + 1) * chunk, stop - rank * chunk)
    return held


@pytest.mark.parametrize("algorithm", [RING, "ulysses_cp_algo", "hybrid_cp_algo", "kvallgather_cp_algo"])
def test_document_zigzag_is_the_split_of_packed_batches(algorithm):
    cp, documents = 4, [0, 8, 8, 32, 40]
    degree = 2 if algorithm == "hybrid_cp_algo" else None
    layout = SequenceLayout.build(
        config(cp, algorithm, ulysses_degree=degree, batch_layout="document_zigzag"), 40, torch.tensor(documents)
    )
    assert layout.kind == "document_zigzag"
    for rank in range(cp):
        assert layout.positions(rank).tolist() == megatrons_document_zigzag(documents, cp, rank)


@pytest.mark.parametrize("algorithm, degree", [("ulysses_cp_algo", None), ("hybrid_cp_algo", 2), (RING, None)])
def test_zigzag_on_request_is_megatrons_whatever_the_algorithm(algorithm, degree):
    layout = SequenceLayout.build(config(4, algorithm, ulysses_degree=degree, batch_layout="zigzag"), 16)
    assert [layout.positions(rank).tolist() for rank in range(4)] == [
        [0, 1, 14, 15],
        [2, 3, 12, 13],
        [4, 5, 10, 11],
        [6, 7, 8, 9],
    ]


def test_document_that_cannot_be_cut_equally_is_an_error_with_a_way_out():
    with pytest.raises(ValueError, match=r"document 1 has 6 tokens.*multiple of 4.*--cp-batch-layout zigzag"):
        SequenceLayout.build(config(2, batch_layout="document_zigzag"), 14, (0, 8, 14))


@pytest.mark.parametrize(
    "cu_seqlens, words",
    [
        ((0, 8), "ends with 8 and must end with the sequence length 16"),
        ((4, 16), "must start with 0"),
        ((0, 12, 8, 16), "must not descend, and entry 2 is 8 after 12"),
        ((0, 24), "ends with 24"),
    ],
)
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "document_zigzag", "balanced", "auto"])
def test_boundaries_that_do_not_fit_the_length_are_an_error_whatever_the_kind(kind, cu_seqlens, words):
    for algorithm in ("megatron_cp_algo", "ulysses_cp_algo"):
        with pytest.raises(ValueError, match=words):
            SequenceLayout.build(config(2, algorithm, batch_layout=kind), 16, cu_seqlens)


PACKED = {
    "one long and many short": (0, 3, 60, *range(2100, 4096, 31), 4096),
    "pareto": (0, 1400, 1410, 1500, 1502, 2900, 3000, 3005, 4096),
    "an odd total": (0, 700, 2000, 2001, 3001, 4099),
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("cp, degree", [(2, None), (3, None), (4, None), (8, None), (8, 2)])
def test_balanced_layout_gives_every_ring_rank_equal_tokens_and_equal_area(name, cp, degree):
    """Invariant 7c, with areas counted pair by pair from the plan."""
    documents = PACKED[name]
    algorithm = "hybrid_cp_algo" if degree else RING
    layout = SequenceLayout.build(
        config(cp, algorithm, ulysses_degree=degree, batch_layout="balanced"), documents[-1], documents
    )
    lengths = [layout.ring_length(rank) for rank in range(layout.ring_size)]
    assert layout.kind == "balanced" and max(lengths) - min(lengths) <= 1
    mask = document_mask(None, 0, documents)
    areas = [
        sum(
            block.area
            for source in range(layout.ring_size)
            for block in plan_blocks(layout.ring_runs(rank), layout.ring_runs(source), mask)
        )
        for rank in range(layout.ring_size)
    ]
    assert sum(areas) == sum(n * (n + 1) // 2 for n in map(int.__sub__, documents[1:], documents))
    assert max(areas) * len(areas) / sum(areas) <= 1.05
    together = torch.cat([layout.positions(rank) for rank in range(cp)])
    assert torch.equal(together.sort().values, torch.arange(documents[-1]))


LENGTHS = {
    "short": lambda draw: draw.randint(64, 512),
    "lognormal": lambda draw: int(draw.lognormvariate(6.5, 1.3)),
    "pareto": lambda draw: int(100 * draw.paretovariate(0.9)),
    "one long and many short": lambda draw: draw.randint(64, 256),
}


def drawn_documents(name, seq_len, seed):
    """cu_seqlens of a row filled with documents of this distribution, in random order."""
    draw = random.Random(seed)
    lengths = [seq_len // 2] if name == "one long and many short" else []
    while sum(lengths) < seq_len:
        lengths.append(max(1, LENGTHS[name](draw)))
    draw.shuffle(lengths)
    return (0, *(end for end in itertools.accumulate(lengths) if end < seq_len), seq_len)


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(st.sampled_from(list(LENGTHS)), st.integers(4000, 9000), st.integers(0, 1000), st.integers(2, 16), st.booleans())
def test_documents_of_any_distribution_are_balanced_and_only_rows_that_some_query_sees_travel(
    name, seq_len, seed, cp, causal
):
    documents = drawn_documents(name, seq_len, seed)
    mask_type = "causal" if causal else "full"
    layout = SequenceLayout.build(
        config(cp, batch_layout="balanced", attention_mask_type=mask_type), seq_len, documents
    )
    lengths = [layout.ring_length(rank) for rank in range(cp)]
    assert max(lengths) - min(lengths) <= 1
    plan = RingPlan(layout, (document_mask(None, 0 if causal else None, documents),), False, exact=True)
    areas = [plan.area(rank, 1) for rank in range(cp)]
    assert max(areas) * cp <= 1.10 * sum(areas)
    document = np.repeat(np.arange(len(documents) - 1), np.diff(documents))
    held = [layout.positions(rank).numpy() for rank in range(cp)]
    for reader in range(cp):
        last = np.full(len(documents) - 1, -1)  # of each document, the last position that the reader holds
        np.maximum.at(last, document[held[reader]], held[reader])
        for source in range(cp):
            seen = last[document[held[source]]] >= (held[source] if causal else 0)
            rows = [row for start, stop in plan.rows_needed(reader, source) for row in range(start, stop)]
            assert rows == np.flatnonzero(seen).tolist()


def test_auto_leaves_the_zigzag_only_when_documents_make_it_uneven():
    uneven, even = PACKED["one long and many short"], (0, *range(64, 4097, 64))
    auto = config(4)
    assert SequenceLayout.build(auto, 4096).kind == "zigzag"
    assert SequenceLayout.build(auto, 4096, even).kind == "zigzag"
    assert SequenceLayout.build(auto, 4096, uneven).kind == "balanced"
    assert SequenceLayout.build(config(4, "ulysses_cp_algo"), 4096, uneven).kind == "contiguous"
    assert SequenceLayout.build(config(4, attention_mask_type="full"), 4096, uneven).kind == "contiguous"


def test_balanced_without_documents_is_the_zigzag():
    assert SequenceLayout.build(config(4, batch_layout="balanced"), 37) == SequenceLayout.build(config(4), 37)


OTHERS = ([(6, 8), (0, 2)], [], [(2, 6), (8, 9)])


def test_layout_of_somebody_else_keeps_its_order():
    layout = SequenceLayout.from_runs(config(3), OTHERS)
    assert [layout.positions(rank).tolist() for rank in range(3)] == [[6, 7, 0, 1], [], [2, 3, 4, 5, 8]]
    assert (layout.seq_len, layout.kind, layout.is_even) == (9, "runs", False)
    whole = torch.arange(9) * 10
    shards = [layout.shard(whole, rank) for rank in range(3)]
    assert shards[0].tolist() == [60, 70, 0, 10]
    assert torch.equal(layout.unshard(shards), whole)


@pytest.mark.parametrize(
    "orders", [row_layout((3, 2), True, 2), document_layout((0, 2, 6), 2)], ids=["rows", "documents"]
)
def test_mindspeeds_orders_are_layouts_like_any_other(orders):
    assert type(orders) is SequenceLayout
    whole = torch.arange(orders.seq_len)
    assert torch.equal(orders.unshard([orders.shard(whole, rank) for rank in range(orders.cp_size)]), whole)


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ([[(0, 4)], [(4, 8)]], "holds 2 lists and --context-parallel-size is 3"),
        ([[(0, 4)], [(3, 8)], []], r"exactly once, and after 4 comes \(3, 8\)"),
        ([[(0, 4)], [(5, 8)], []], r"exactly once, and after 4 comes \(5, 8\)"),
        ([[(1, 4)], [(4, 8)], []], "exactly once"),
        ([[], [], []], "no position at all"),
    ],
)
def test_runs_that_are_no_partition_are_an_error(runs, says):
    with pytest.raises(ValueError, match=says):
        SequenceLayout.from_runs(config(3), runs)


def test_rows_say_where_each_ulysses_rank_lies_in_what_they_hold_together():
    runs = ([(6, 8), (0, 2)], [(2, 4)], [(4, 6)], [(8, 12)])
    layout = SequenceLayout.from_runs(config(4, "hybrid_cp_algo", ulysses_degree=2), runs)
    assert layout.ring_runs(0) == ((0, 4), (6, 8))
    assert layout.ulysses_rows(0) == (((4, 6), (0, 2)), ((2, 4),))
    assert layout.ulysses_rows(1) == (((0, 2),), ((2, 6),))


def test_layouts_are_equal_by_what_the_ranks_hold():
    built = SequenceLayout.build(config(2), 8)
    same = SequenceLayout.from_runs(config(2), [[(0, 2), (6, 8)], [(2, 6)]])
    assert built == same and hash(built) == hash(same)
    assert built != SequenceLayout.build(config(2), 10)


def test_batch_is_split_by_name_and_never_by_size():
    layout = SequenceLayout.build(config(2), 8)
    batch = {
        "tokens": torch.arange(16).view(2, 8),
        "loss_mask": torch.ones(2, 8),
        "labels": None,
        "attention_mask": torch.ones(2, 1, 8, 8, dtype=torch.bool),
        "cu_seqlens": torch.arange(8)[None],
        "max_seqlen": torch.tensor([8]),
    }
    local = shard_batch(batch, layout=layout, cp_rank=1)
    assert local["tokens"].tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]] and local["loss_mask"].shape == (2, 4)
    for name in ("labels", "attention_mask", "cu_seqlens", "max_seqlen"):
        assert local[name] is batch[name]
    assert batch["tokens"].shape == (2, 8)


def test_unknown_name_that_may_be_a_sequence_is_an_error():
    layout = SequenceLayout.build(config(2), 8)
    batch = {"tokens": torch.zeros(1, 8), "advantages": torch.zeros(1, 8)}
    with pytest.raises(ValueError, match=r"advantages .*sequences=\('advantages',\)"):
        shard_batch(batch, layout=layout, cp_rank=0)
    assert shard_batch(batch, layout=layout, cp_rank=0, sequences=["advantages"])["advantages"].shape == (1, 4)
    with pytest.raises(ValueError, match="labels .*8 tokens"):
        shard_batch({"tokens": torch.zeros(1, 8), "labels": torch.zeros(1, 7)}, layout=layout, cp_rank=0)


def gathered(rank):
    """(what is gathered, gradient of this rank's part) of a layout with an empty rank and tokens out of order."""
    ring = config(3)
    layout = SequenceLayout.from_runs(ring, OTHERS)
    groups = ContextParallelGroups.build(ring)
    whole = torch.arange(18.0, dtype=torch.float64).view(2, 9)
    part = layout.shard(whole, rank, 1).clone().requires_grad_()
    out = gather_sequence(part, groups=groups, layout=layout, dim=1)
    (out * whole).sum().backward()
    groups.destroy()
    return out.detach(), part.grad, layout.shard(whole, rank, 1)


def test_whole_sequence_comes_back_in_order_with_each_ranks_own_gradient():
    for out, grad, expected in run_ranks(3, gathered):
        assert torch.equal(out, torch.arange(18.0, dtype=torch.float64).view(2, 9))
        assert torch.equal(grad, expected)


def test_sizes_differ_by_at_most_one():
    assert split_sizes(7, 3) == [3, 2, 2] and split_sizes(2, 3) == [1, 1, 0]


@pytest.mark.parametrize("causal", [True, False])
def test_areas_of_sequences_beyond_32_bits_do_not_overflow(causal):
    seq_len = 3 << 31
    zigzag = SequenceLayout.build(config(4, batch_layout="zigzag"), seq_len)
    rings = [zigzag.ring_runs(rank) for rank in range(4)]
    whole, cut = (
        document_mask(None, 0 if causal else None, ends) for ends in ((0, seq_len), (0, seq_len // 3, seq_len))
    )
    assert imbalance(rings, whole) == pytest.approx(1, rel=1e-6)
    contiguous = [((rank * seq_len // 4, (rank + 1) * seq_len // 4),) for rank in range(4)]
    assert imbalance(contiguous, whole) == pytest.approx(7 / 4 if causal else 1, rel=1e-6)
    balanced = balanced_rings((0, seq_len // 3, seq_len), 4, causal)
    assert imbalance(balanced, cut) <= 1.05

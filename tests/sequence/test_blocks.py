"""The block plan against the definition of the mask, pair by pair."""

import random
from bisect import bisect_right
from itertools import accumulate
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import allowed_pairs, document_ids, sliced_pairs
from slice_cases import MAGI_ATTENTION_AREAS, drawn_slices

from mindspeed_cp import ContextParallelConfig, SequenceLayout
from mindspeed_cp.attention.ring_plan import sharing_slices
from mindspeed_cp.sequence.blocks import BAND_TILE, Block, needed_rows, plan_blocks
from mindspeed_cp.sequence.slice_mask import SliceMask, document_mask, slices_mask

thorough = settings(max_examples=400, derandomize=True, deadline=None, database=None)


SIZE = 80


class Seen(NamedTuple):
    """What queries may see, for the plan and by definition.

    Args:
        documents: (SIZE,) number of the document of each position, or None where nothing is said about NaN.
    """

    mask: SliceMask
    pairs: torch.Tensor
    documents: torch.Tensor | None = None


def seen_within(left, right, cu=None, size=SIZE):
    documents = torch.zeros(size, dtype=torch.long) if cu is None else document_ids(cu, size)
    return Seen(document_mask(left, right, cu), allowed_pairs(size, window=(left, right), cu_seqlens=cu)[0], documents)


def seen_in(slices, window=(None, None), cu=None):
    left, right = window
    mask = slices_mask(slices, SIZE)
    mask = (mask if cu is None else mask.within(cu)).in_window(left, right)
    return Seen(mask, allowed_pairs(SIZE, window=window, cu_seqlens=cu, slices=slices)[0])


def drawn(block, shape):
    """How often the block computes each (query row, key row) pair."""
    count = torch.zeros(shape, dtype=torch.int)
    target = count[block.query_rows, block.key_rows]
    for q, k in block.pieces():
        offset = torch.arange(k.stop - k.start)[None] - torch.arange(q.stop - q.start)[:, None]
        low, high = (-(10**9) if block.lower is None else block.lower), (10**9 if block.upper is None else block.upper)
        target[q, k] += ((offset >= low) & (offset <= high)).int()
    return count


@st.composite
def runs(draw):
    """Ascending disjoint runs, touching ones joined, at most four, below 80."""
    edges = sorted(draw(st.lists(st.integers(0, 79), max_size=8, unique=True)))
    return tuple(zip(edges[::2], edges[1::2]))


LIMITS = st.one_of(st.none(), st.integers(0, 12), st.integers(13, 90))


@st.composite
def boundaries(draw):
    ends = draw(
        st.one_of(
            st.none(),
            st.lists(st.integers(0, 80), max_size=7),
            st.lists(st.integers(1, 3), max_size=40).map(lambda lengths: [*accumulate(lengths)][:40]),  # short ones
        )
    )
    return None if ends is None else (0, *sorted(end for end in ends if end <= SIZE), SIZE)


def some_slices():
    return st.randoms(use_true_random=False).map(lambda rng: drawn_slices(rng, SIZE))


@st.composite
def masks(draw):
    if draw(st.booleans()):
        return seen_within(draw(LIMITS), draw(LIMITS), draw(boundaries()))
    window = draw(st.one_of(st.just((None, None)), st.tuples(LIMITS, LIMITS)))
    return seen_in(draw(some_slices()), window, draw(st.one_of(st.none(), boundaries())))


def positions(some_runs):
    return torch.tensor([p for start, stop in some_runs for p in range(start, stop)], dtype=torch.long)


def check_plan(query_runs, key_runs, seen, native_bands):
    """The plan covers each visible pair once, no hidden one; every block is of a shape that kernels have, and each of
    its pieces lies in one document.
    """
    queries, keys = positions(query_runs), positions(key_runs)
    want = seen.pairs[queries][:, keys]
    total = torch.zeros(want.shape, dtype=torch.int)
    for block in plan_blocks(query_runs, key_runs, seen.mask, native_bands):
        for q, k in block.pieces() if seen.documents is not None else ():
            # A kernel multiplies what a limit hides by 0, and NaN times 0 is NaN.
            together = torch.cat([queries[block.query_rows][q], keys[block.key_rows][k]])
            assert len(seen.documents[together].unique()) == 1, f"a piece of {block} spans documents"
        count = drawn(block, want.shape)
        assert block.area == int(count.sum()), f"area of {block}"
        assert count.any(0)[block.key_rows].all() and count.any(1)[block.query_rows].all(), f"unseen rows in {block}"
        if block.is_causal:
            assert all(q.stop - q.start == k.stop - k.start for q, k in block.pieces()), f"not square: {block}"
        if not (block.is_full or block.is_causal):
            assert block.num_pieces == 1
            if not native_bands:
                assert block.query_rows.stop - block.query_rows.start <= BAND_TILE
        total += count
    assert torch.equal(total, want.int())


@thorough
@given(runs(), runs(), masks(), st.booleans())
def test_blocks_cover_every_visible_pair_exactly_once(query_runs, key_runs, seen, native_bands):
    check_plan(query_runs, key_runs, seen, native_bands)


@thorough
@given(st.integers(1, 8), st.integers(1, 80), masks(), st.sampled_from(["causal", "full"]), st.booleans())
def test_blocks_of_a_ring_cover_every_visible_pair_exactly_once(cp, seq_len, seen, mask_type, native_bands):
    layout = SequenceLayout.build(
        ContextParallelConfig(context_parallel_size=cp, algorithm="megatron_cp_algo", attention_mask_type=mask_type),
        seq_len,
    )
    for rank in range(cp):
        for source in range(cp):
            check_plan(layout.runs(rank), layout.runs(source), seen, native_bands)


@settings(thorough, max_examples=150)
@given(st.integers(1, 5), runs(), runs(), masks())
def test_bands_longer_than_a_tile_are_cut_into_tiles(tile, query_runs, key_runs, seen):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mindspeed_cp.sequence.blocks.BAND_TILE", tile)
        check_plan(query_runs, key_runs, seen, False)
        for block in plan_blocks(query_runs, key_runs, seen.mask, False):
            if not (block.is_full or block.is_causal):
                assert block.query_rows.stop - block.query_rows.start <= tile


@thorough
@given(runs(), runs(), masks())
def test_needed_rows_are_exactly_the_keys_that_somebody_sees(query_runs, key_runs, seen):
    want = seen.pairs[positions(query_runs)][:, positions(key_runs)].any(0)
    rows = needed_rows(query_runs, key_runs, seen.mask)
    got = torch.zeros_like(want)
    for start, stop in rows:
        assert start < stop
        got[start:stop] = True
    assert torch.equal(got, want)
    assert all(a[1] < b[0] for a, b in zip(rows, rows[1:])), "touching spans should be one message"


@settings(thorough, max_examples=300)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(-9, 9)),
    st.one_of(st.none(), st.integers(-9, 9)),
)
def test_area_is_the_number_of_pairs_for_any_rectangle_and_limits(rows, cols, lower, upper):
    if lower is not None and upper is not None and lower > upper:
        lower, upper = upper, lower
    block = Block((0, rows), (0, cols), lower, upper)
    assert block.area == int(drawn(block, (rows, cols)).sum())


@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("cp", range(2, 9))
def test_zigzag_causal_work_is_equal_on_all_ranks(cp, chunk):
    layout = SequenceLayout.build(
        ContextParallelConfig(context_parallel_size=cp, algorithm="megatron_cp_algo"), 2 * cp * chunk
    )
    work = [
        sum(
            block.area
            for source in range(cp)
            for block in plan_blocks(layout.runs(rank), layout.runs(source), document_mask(None, 0))
        )
        for rank in range(cp)
    ]
    assert len(set(work)) == 1, work
    assert sum(work) == layout.seq_len * (layout.seq_len + 1) // 2


@pytest.mark.parametrize("cp", range(2, 9))
def test_zigzag_causal_needs_at_most_one_rectangle_against_another_rank(cp):
    """The half-rectangle trick: one kernel call per step, all keys or the first half, all queries or the second
    half.
    """
    layout = SequenceLayout.build(ContextParallelConfig(context_parallel_size=cp, algorithm="megatron_cp_algo"), 8 * cp)
    for rank in range(cp):
        for source in set(range(cp)) - {rank}:
            (block,) = plan_blocks(layout.runs(rank), layout.runs(source), document_mask(None, 0))
            assert block.is_full
            assert block.area == 32
            assert (block.query_rows, block.key_rows) == (
                (slice(0, 8), slice(0, 4)) if source < rank else (slice(4, 8), slice(0, 8))
            )


def test_documents_of_one_shape_become_one_packed_block():
    (block,) = plan_blocks(((0, 12),), ((0, 12),), document_mask(None, 0, (0, 4, 4, 9, 12)))
    assert block.num_pieces == 3 and block.is_causal


def test_documents_held_by_another_rank_alone_yield_no_block():
    assert plan_blocks(((0, 8),), ((8, 16),), document_mask(None, None, (0, 8, 16))) == ()


def test_the_plan_of_a_long_window_costs_rectangles_not_pairs():
    """A million tokens: only the number of tiles counts, nothing of size S x S exists."""
    blocks = plan_blocks(((0, 1 << 20),), ((0, 1 << 20),), document_mask(4095, 0), True)
    assert len(blocks) <= 3
    assert sum(block.area for block in blocks) == (1 << 20) * 4096 - 4096 * 4095 // 2


def test_ranks_that_share_a_document_are_found():
    """Against the definition, with uneven and empty ranks, documents of no tokens and documents cut anywhere."""
    rng = random.Random(0)

    def drawn_cuts(length, count):
        return sorted([0, length, *(rng.randint(0, length) for _ in range(rng.randint(0, count)))])

    for _ in range(300):
        length, num_ranks = rng.randint(1, 40), rng.randint(1, 6)
        runs, documents = [[] for _ in range(num_ranks)], tuple(drawn_cuts(length, 6))
        for start, stop in zip((cuts := sorted(set(drawn_cuts(length, 8)))), cuts[1:]):
            rng.choice(runs).append((start, stop))
        held = [
            {bisect_right(documents, position) for start, stop in own for position in range(start, stop)}
            for own in runs
        ]
        found = sharing_slices([tuple(own) for own in runs], document_mask(cu_seqlens=tuple(documents)))
        assert found.tolist() == [[bool(mine & others) for others in held] for mine in held], (runs, documents)


@settings(thorough, max_examples=100)
@given(some_slices(), st.integers(1, 5), st.randoms())
def test_ranks_whose_queries_see_keys_of_another_are_found(slices, num_ranks, rng):
    runs, owner = [[] for _ in range(num_ranks)], torch.empty(SIZE, dtype=torch.long)
    cuts = sorted({0, SIZE, *(rng.randint(0, SIZE) for _ in range(8))})
    for start, stop in zip(cuts, cuts[1:]):
        owner[start:stop] = rank = rng.randrange(num_ranks)
        runs[rank].append((start, stop))
    found = torch.from_numpy(sharing_slices([tuple(own) for own in runs], slices_mask(slices, SIZE)))
    pairs, related = sliced_pairs(slices, SIZE).nonzero(), torch.zeros(num_ranks, num_ranks, dtype=torch.bool)
    related[owner[pairs[:, 0]], owner[pairs[:, 1]]] = True
    assert not (related & ~found).any(), "a rank would compute nothing of keys that its queries see"
    in_one_slice = torch.zeros_like(related)
    for (q_start, q_stop), (k_start, k_stop), _ in slices:
        in_one_slice[owner[q_start:q_stop][:, None], owner[k_start:k_stop][None]] = True
    assert not (found & ~in_one_slice).any(), "a plan is made for ranks that no slice brings together"


@pytest.mark.parametrize("slices, chunk, areas", MAGI_ATTENTION_AREAS)
def test_the_areas_of_chunks_are_those_that_magi_attention_publishes(slices, chunk, areas):
    size = chunk * len(areas)
    found = [
        sum(block.area for block in plan_blocks(((start, start + chunk),), ((0, size),), slices_mask(slices, size)))
        for start in range(0, size, chunk)
    ]
    assert tuple(found) == areas


def test_a_prefix_that_every_branch_sees_is_one_rectangle_and_its_branches_one_packed_block():
    branches = [(10 * n, 10 * n + 10) for n in range(1, 8)]
    slices = [((0, 10), (0, 10), "causal")]
    for branch in branches:
        slices += [(branch, (0, 10), "full"), (branch, branch, "causal")]
    packed, prefix = plan_blocks(((0, SIZE),), ((0, SIZE),), slices_mask(slices, SIZE))
    assert packed.is_causal and packed.num_pieces == 8
    assert prefix.is_full and (prefix.query_rows, prefix.key_rows) == (slice(10, 80), slice(0, 10))

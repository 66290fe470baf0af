"""Which tokens a rank holds: every property of SequenceLayout that the rest relies on."""

import pytest
import torch

from mindspeed_cp import ContextParallelConfig, SequenceLayout
from mindspeed_cp.settings.algorithms import ALGORITHMS

LENGTHS = [1, 2, 3, 5, 7, 8, 13, 16, 31, 64, 97, 8190]


def configs(cp):
    """Every algorithm, degree and mask type that exists for this size."""
    for algorithm in ALGORITHMS:
        degrees = [d for d in range(2, cp) if cp % d == 0] if algorithm == "hybrid_cp_algo" else [None]
        for degree in degrees:
            for mask_type in ("causal", "full"):
                yield ContextParallelConfig(
                    context_parallel_size=cp, algorithm=algorithm, ulysses_degree=degree, attention_mask_type=mask_type
                )


def name(config):
    degree = f"-u{config.ulysses_degree}" if config.ulysses_degree else ""
    return f"cp{config.context_parallel_size}-{config.algorithm}{degree}-{config.attention_mask_type}"


ALL = [config for cp in range(1, 9) for config in configs(cp)]
every_config = pytest.mark.parametrize("config", ALL, ids=name)


def positions(config, seq_len):
    layout = SequenceLayout.build(config, seq_len)
    return [layout.positions(rank) for rank in range(config.context_parallel_size)]


def split(length, parts):
    """Sizes that differ by at most one, larger ones first, written differently from the code under test."""
    return [(length + parts - 1 - part) // parts for part in range(parts)]


@every_config
def test_positions_of_all_ranks_are_a_permutation(config):
    for seq_len in LENGTHS[:-1]:
        together = torch.cat(positions(config, seq_len))
        assert together.dtype == torch.long
        assert torch.equal(together.sort().values, torch.arange(seq_len)), seq_len


@every_config
def test_positions_of_a_rank_ascend_and_match_runs_and_length(config):
    for seq_len in LENGTHS:
        layout = SequenceLayout.build(config, seq_len)
        for rank in range(config.context_parallel_size):
            own = layout.positions(rank)
            assert bool((own.diff() > 0).all())
            assert len(own) == layout.length(rank)
            runs = layout.runs(rank)
            assert own.tolist() == [p for start, stop in runs for p in range(start, stop)]
            assert all(start < stop for start, stop in runs), "an empty run"
            assert all(left[1] < right[0] for left, right in zip(runs, runs[1:])), "two runs touch"


@pytest.mark.parametrize("cp", range(1, 9))
def test_contiguous_lengths_differ_by_at_most_one_and_extra_tokens_go_first(cp):
    for seq_len in LENGTHS:
        for config in (c for c in configs(cp) if c.layout_kind == "contiguous" and c.algorithm != "hybrid_cp_algo"):
            pieces = positions(config, seq_len)
            assert [len(piece) for piece in pieces] == split(seq_len, cp)
            assert torch.equal(torch.cat(pieces), torch.arange(seq_len))


@pytest.mark.parametrize("cp", range(2, 9))
@pytest.mark.parametrize("algorithm", ["megatron_cp_algo", "kvallgather_cp_algo"])
def test_zigzag_gives_rank_r_the_chunks_r_and_its_mirror(algorithm, cp):
    config = ContextParallelConfig(context_parallel_size=cp, algorithm=algorithm)
    for seq_len in LENGTHS:
        chunks = torch.arange(seq_len).split(split(seq_len, 2 * cp))
        for rank, own in enumerate(positions(config, seq_len)):
            assert torch.equal(own, torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]])), (seq_len, rank)


@pytest.mark.parametrize("cp", range(2, 9))
def test_zigzag_lengths_differ_by_at_most_two(cp):
    """Two chunks whose sizes each differ by at most one."""
    for seq_len in LENGTHS:
        sizes = [
            len(p)
            for p in positions(ContextParallelConfig(context_parallel_size=cp, algorithm="megatron_cp_algo"), seq_len)
        ]
        assert max(sizes) - min(sizes) <= (2 if seq_len % (2 * cp) else 0)


@pytest.mark.parametrize("cp, degree", [(4, 2), (6, 2), (6, 3), (8, 2), (8, 4)])
@pytest.mark.parametrize("mask_type", ["causal", "full"])
def test_hybrid_is_the_ring_layout_cut_contiguously_over_the_ulysses_ranks(cp, degree, mask_type):
    hybrid = ContextParallelConfig(
        context_parallel_size=cp, algorithm="hybrid_cp_algo", ulysses_degree=degree, attention_mask_type=mask_type
    )
    ring = ContextParallelConfig(
        context_parallel_size=cp // degree, algorithm="megatron_cp_algo", attention_mask_type=mask_type
    )
    for seq_len in LENGTHS:
        own = positions(hybrid, seq_len)
        for ring_rank, shared in enumerate(positions(ring, seq_len)):
            pieces = shared.split(split(len(shared), degree))
            for ulysses_rank in range(degree):
                assert torch.equal(own[ring_rank * degree + ulysses_rank], pieces[ulysses_rank]), (seq_len, ring_rank)


@every_config
def test_the_window_does_not_change_the_layout(config):
    ring = config.ring_size
    for window in (w for w in range(2, ring) if ring % w == 0 and ALGORITHMS[config.algorithm].takes_window):
        double = ContextParallelConfig(
            context_parallel_size=config.context_parallel_size,
            algorithm=config.algorithm,
            ulysses_degree=config.ulysses_degree,
            window_size=window,
            attention_mask_type=config.attention_mask_type,
        )
        for ours, plain in zip(positions(double, 37), positions(config, 37)):
            assert torch.equal(ours, plain)


@every_config
def test_shard_takes_the_positions_and_unshard_undoes_it_on_any_dimension(config):
    for seq_len in (1, 5, 16, 31):
        layout = SequenceLayout.build(config, seq_len)
        for dim in (0, 1, 2, -1):
            shape = [2, 3, 4]
            shape[dim] = seq_len
            tensor = torch.arange(shape[0] * shape[1] * shape[2]).view(shape)
            shards = [layout.shard(tensor, rank, dim) for rank in range(config.context_parallel_size)]
            for rank, shard in enumerate(shards):
                assert torch.equal(shard, tensor.index_select(dim, layout.positions(rank)))
            assert torch.equal(layout.unshard(shards, dim), tensor)


def test_one_rank_holds_everything():
    layout = SequenceLayout.build(ContextParallelConfig(), 5)
    assert layout.positions(0).tolist() == [0, 1, 2, 3, 4]


def test_the_documented_picture_of_two_ranks_and_eight_tokens():
    zigzag = positions(ContextParallelConfig(context_parallel_size=2, algorithm="megatron_cp_algo"), 8)
    contiguous = positions(ContextParallelConfig(context_parallel_size=2), 8)
    assert [p.tolist() for p in zigzag] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert [p.tolist() for p in contiguous] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("seq_len", [0, -3, 2.0, "8", None])
def test_a_length_that_is_no_positive_whole_number_is_an_error(seq_len):
    with pytest.raises(ValueError, match=r"at least 1"):
        SequenceLayout.build(ContextParallelConfig(), seq_len)


@pytest.mark.parametrize("rank", [-1, 4, 100])
def test_a_rank_outside_the_group_is_an_error(rank):
    layout = SequenceLayout.build(ContextParallelConfig(context_parallel_size=4), 8)
    with pytest.raises(ValueError, match=rf"cp_rank {rank} .*0 to 3"):
        layout.positions(rank)


def test_sharding_a_tensor_of_another_length_is_an_error():
    layout = SequenceLayout.build(ContextParallelConfig(context_parallel_size=2), 8)
    with pytest.raises(ValueError, match="6 entries.*8 tokens"):
        layout.shard(torch.zeros(6, 2), 0)


def test_unsharding_too_few_or_wrong_shards_is_an_error():
    layout = SequenceLayout.build(ContextParallelConfig(context_parallel_size=2), 8)
    with pytest.raises(ValueError, match="all 2 ranks.*got 1"):
        layout.unshard([torch.zeros(4)])
    with pytest.raises(ValueError, match="shard 1 has 3 tokens"):
        layout.unshard([torch.zeros(4), torch.zeros(3)])

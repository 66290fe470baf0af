"""Packed rows for a training loop: every document in its turn, as many rows in each step, the same wherever it runs."""

import itertools
import random

import pytest
import torch

from mindspeed_cp.megatron.packing import PackedSampler, pack_samples

LENGTHS = [random.Random(seed).randint(0, 40) for seed in range(60)]


def sampler(**changes):
    return PackedSampler(**{"lengths": LENGTHS, "ranks": 2, "tokens": 20, "rows": 4} | changes)


def steps(made, count, rows=4):
    walk = iter(made)
    return [[next(walk) for _ in range(rows)] for _ in range(count)]


@pytest.mark.parametrize("changes", [{}, {"rows": 1}, {"rows": 7}, {"order": random.Random(1).sample(range(60), 60)}])
def test_steps_take_the_documents_in_their_order_and_fill_the_rows(changes):
    rows = changes.get("rows", 4)
    taken = []
    for step in steps(sampler(**changes), 12, rows):
        for row in step:
            assert 0 < sum(LENGTHS[place] for place in row) <= 40
        taken.append([place for row in step for place in row])
    order = [place for place in changes.get("order", range(60)) if LENGTHS[place]]
    cycled = itertools.cycle(order)
    for step in taken:
        assert sorted(step) == sorted(next(cycled) for _ in step)
    filled = sum(LENGTHS[place] for step in taken for place in step) / (12 * rows * 40)
    assert filled > 0.7, "rows are not left half empty"


def test_a_run_goes_on_where_it_ended_and_ranks_share_the_rows():
    whole = steps(sampler(), 6)
    assert steps(sampler(first_step=4), 2) == whole[4:]
    halves = [steps(sampler(data_parallel_rank=rank, data_parallel_size=2), 6, 2) for rank in range(2)]
    assert [[one[0], other[0], one[1], other[1]] for one, other in zip(*halves)] == whole


def test_a_step_of_long_documents_still_has_all_its_rows():
    made = PackedSampler([40, 1, 1, 40, 1, 40], ranks=2, tokens=20, rows=3)
    for step in steps(made, 5, 3):
        assert all(row and sum([40, 1, 1, 40, 1, 40][place] for place in row) <= 40 for row in step)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"lengths": [41], "rows": 1}, "document 0 has 41 tokens"),
        ({"lengths": [3, 0, 3], "rows": 3}, "2 documents cannot fill the 3 rows of a step.*--global-batch-size 2"),
        ({"data_parallel_size": 3}, "4 rows of a step must be divisible by the 3 data-parallel ranks; use 6"),
    ],
)
def test_what_cannot_be_sampled_is_an_error_with_a_way_out(changes, says):
    with pytest.raises(ValueError, match=says):
        sampler(**changes)


def test_a_row_holds_its_documents_end_to_end():
    samples = [{"tokens": torch.arange(n), "labels": torch.arange(n) + 1, "loss_mask": torch.ones(n)} for n in (3, 2)]
    row = pack_samples(samples)
    assert row["tokens"].tolist() == row["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert row["labels"].tolist() == [[1, 2, 3, 1, 2]] and row["loss_mask"].shape == (1, 5)
    assert row["cu_seqlens"].tolist() == [0, 3, 5] and row["cu_seqlens"].dtype == torch.int32 and row["max_seqlen"] == 3


def test_a_loader_of_torch_takes_both():
    documents = [{"tokens": torch.full((n,), n)} for n in LENGTHS]
    loader = torch.utils.data.DataLoader(documents, batch_sampler=sampler(), collate_fn=pack_samples)
    for row, places in zip(loader, next(iter(steps(sampler(), 1)))):
        assert row["tokens"][0].tolist() == [LENGTHS[place] for place in places for _ in range(LENGTHS[place])]


def test_samples_that_differ_in_what_they_hold_are_an_error():
    with pytest.raises(ValueError, match="sample 1 must hold tokens, labels of 3 tokens each"):
        pack_samples([{"tokens": torch.ones(2), "labels": torch.ones(2)}, {"tokens": torch.ones(3)}])

"""pack_tree: what it packs, and that training on the tree is training on the sequences."""

import random
from functools import partial

import pytest
import torch
from distributed import run_ranks
from tree_runs import as_a_tree, drawn_sequences, separate

from mindspeed_cp import ContextParallelConfig, SequenceLayout, pack_tree
from mindspeed_cp.sequence.slice_mask import slices_mask

ROLLOUTS = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7], [1, 2, 8, 9]]


def test_every_shared_prefix_is_packed_once_and_positions_count_in_the_sequences():
    tree = pack_tree(ROLLOUTS)
    assert tree.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 4, 4, 5, 2, 3]
    # Where branches part a row has several labels.
    assert list(zip(tree.rows.tolist(), tree.labels.tolist(), tree.weights.tolist())) == [
        (0, 2, 3), (1, 3, 2), (1, 8, 1), (2, 4, 2), (3, 5, 1), (3, 6, 1), (5, 7, 1), (7, 9, 1)
    ]  # fmt: skip
    assert [part.tolist() for part in tree.per_sequence(tree.labels)] == [sequence[1:] for sequence in ROLLOUTS]


def test_with_one_label_per_row_each_branch_repeats_the_token_before_it():
    tree = pack_tree(ROLLOUTS, one_label_per_row=True)
    assert tree.tokens.tolist() == [1, 2, 3, 4, 5, 4, 6, 7, 2, 8, 9]
    batch = tree.batch(multiple_of=8, padding=99)
    assert batch["tokens"].shape == (1, 16) and batch["tokens"][0, 11:].eq(99).all()
    assert batch["loss_mask"].tolist() == [[3, 2, 2, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0]]
    assert batch["labels"][0, :4].tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="token 1 .*one_label_per_row=True"):
        pack_tree(ROLLOUTS).batch()


@pytest.mark.parametrize("one_label_per_row", [False, True])
def test_every_token_sees_its_own_sequence_up_to_itself(one_label_per_row):
    """By definition, for drawn sequences: the tokens that a row's slices show are a beginning of a sequence, in order,
    and each sequence's labels come from rows that see just what is before them.
    """
    for seed in range(40):
        sequences = drawn_sequences(seed)
        tree = pack_tree(sequences, one_label_per_row=one_label_per_row)
        slices = slices_mask(tree.attention_slices, len(tree)).slices
        seen = [[] for _ in range(len(tree))]
        for q_start, q_stop, k_start, k_stop, _, upper in zip(*(column.tolist() for column in slices)):
            for row in range(q_start, q_stop):
                seen[row] += range(k_start, min(k_stop, row + upper + 1))
        for row, keys in enumerate(seen):
            assert tree.position_ids[sorted(keys)].tolist() == list(range(int(tree.position_ids[row]) + 1))
        for sequence, places in zip(sequences, tree.places):
            for length, place in enumerate(places.tolist(), start=1):
                assert tree.tokens[sorted(seen[tree.rows[place]])].tolist() == sequence[:length]
                assert int(tree.labels[place]) == sequence[length]
        distinct = {tuple(sequence[:n]) for sequence in sequences for n in range(1, len(sequence) + 1)}
        assert one_label_per_row or len(tree) == len(distinct), "a prefix is packed once"
        assert not one_label_per_row or len(set(tree.rows.tolist())) == len(tree.rows)
        assert int(tree.weights.sum()) == sum(len(sequence) - 1 for sequence in sequences)


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_loss_and_gradients_of_a_tree_are_those_of_its_sequences(cp):
    rng = random.Random(cp)
    for seed, one_label_per_row in ((cp, False), (cp + 10, True)):
        sequences = [each for each in drawn_sequences(seed) if len(each) > 1]  # a mean over no token is no number
        weights = [torch.tensor([rng.random() for _ in each], dtype=torch.float64) for each in sequences]
        advantages = [rng.uniform(-1, 1) for _ in sequences]
        want = separate(sequences, weights, advantages)
        config = {"context_parallel_size": cp, "algorithm": "megatron_cp_algo", "kv_exchange": "direct"}
        for got in run_ranks(cp, as_a_tree, config, sequences, weights, advantages, one_label_per_row):
            assert got[:2] == pytest.approx(want[:2], abs=1e-10)
            check = partial(torch.testing.assert_close, atol=1e-10, rtol=0)
            check(got[2:], want[2:])


def test_a_tree_of_prompts_without_anything_in_common_is_packed_documents():
    tree = pack_tree([torch.tensor([4, 5]), torch.tensor([6]), torch.tensor([4, 5])])
    assert tree.tokens.tolist() == [4, 5, 6] and tree.weights.tolist() == [2]
    config = ContextParallelConfig(context_parallel_size=3, algorithm="megatron_cp_algo")
    layout = SequenceLayout.build(config, 3)
    held = [tree.held(layout, rank) for rank in range(3)]
    assert [part.labels.tolist() for part in held].count([5]) == 1
    padded = SequenceLayout.build(config, 8)
    tree = pack_tree(ROLLOUTS[:2])
    held = [tree.held(padded, rank) for rank in range(3)]
    assert sorted(label for part in held for label in part.labels.tolist()) == sorted(tree.labels.tolist())
    for rank, part in enumerate(held):
        assert padded.positions(rank)[part.rows].tolist() == part.layout.shard(tree.rows, rank).tolist()
    alone = pack_tree([[7]])
    assert len(alone.rows) == 0 and alone.per_sequence(alone.weights)[0].shape == (0,)
    assert alone.batch()["loss_mask"].tolist() == [[0]]


@pytest.mark.parametrize(
    "sequences, weights, says",
    [
        ([], None, "no sequences"),
        ([[1], []], None, "sequence 1 .*at least one"),
        ([torch.ones(2, 2, dtype=torch.long)], None, r"shape \(2, 2\)"),
        ([[1.5]], None, "whole number"),
        ([[1, 2]], [[1.0]], "sequence 0 .*2 tokens"),
        ([[1, 2]], [[1.0, 1.0]] * 2, "2 sequences, and there are 1"),
    ],
)
def test_what_is_no_tree_is_refused(sequences, weights, says):
    with pytest.raises(ValueError, match=says):
        pack_tree(sequences, weights=weights)

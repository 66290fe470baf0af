"""The balanced layout of slices: areas by definition, equal tokens, equal work."""

import random

import numpy as np
import pytest
from reference import allowed_pairs
from slice_cases import NAMED, drawn_slices

from mindspeed_cp import ContextParallelConfig, SequenceLayout, pack_tree
from mindspeed_cp.attention.ring_plan import ring_plan
from mindspeed_cp.sequence.balance import area_before, imbalance
from mindspeed_cp.sequence.slice_mask import document_mask, slices_mask

SIZE = 70


def test_the_area_before_a_position_is_what_the_definition_counts():
    rng = random.Random(0)
    for _ in range(200):
        slices, window = drawn_slices(rng, SIZE), (rng.choice((None, 0, 3, 20)), rng.choice((None, 0, 5)))
        mask, pairs = slices_mask(slices, SIZE).in_window(*window), allowed_pairs(SIZE, slices=slices, window=window)[0]
        positions = np.array(sorted(rng.randint(0, SIZE) for _ in range(rng.randint(1, 12))))
        assert area_before(mask, positions).tolist() == [int(pairs[:position].sum()) for position in positions]


def of(batch_layout, seq_len, slices, cp=4, **settings):
    config = ContextParallelConfig(
        context_parallel_size=cp, algorithm="megatron_cp_algo", batch_layout=batch_layout, **settings
    )
    return SequenceLayout.build(config, seq_len, attention_slices=slices)


def ratio(layout, slices):
    """Largest area of a rank over the mean, by the blocks that it computes."""
    plan = ring_plan(layout, (slices_mask(slices, layout.seq_len),), True)
    areas = [plan.area(rank, 1) for rank in range(layout.cp_size)]
    assert imbalance(layout.all_runs, plan.masks[0]) == pytest.approx(max(areas) / np.mean(areas))
    return max(areas) / np.mean(areas)


def rollouts(prompt=2000, answers=(500, 900, 1500, 300, 700, 1200)):
    sequences = [[*range(prompt), *[prompt + number] * length] for number, length in enumerate(answers)]
    return pack_tree(sequences)


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_every_rank_has_equal_tokens_and_about_equal_areas(cp):
    tree = rollouts()
    video = [((start, start + 100), (0, start + 100), "full") for start in range(0, 6400, 100)]
    prefix = [((0, 3000), (0, 3000), "full"), ((3000, 8001), (0, 8001), "causal")]
    for seq_len, slices in ((len(tree), tree.attention_slices), (6400, video), (8001, prefix)):
        layout = of("balanced", seq_len, slices, cp)
        lengths = [layout.length(rank) for rank in range(cp)]
        assert max(lengths) - min(lengths) <= 1 and sum(lengths) == seq_len
        assert ratio(layout, slices) <= 1.05


def test_auto_leaves_the_zigzag_where_slices_load_it_unevenly():
    causal, tree = [((0, 800), (0, 800), "causal")], rollouts()
    assert of("auto", 800, causal) == of("zigzag", 800, causal)
    half = [((0, 400), (0, 400), "full"), ((400, 800), (400, 800), "causal")]
    assert ratio(of("zigzag", 800, half), half) > 1.1 > 1.05 >= ratio(of("auto", 800, half), half)
    assert of("auto", len(tree), tree.attention_slices).kind in ("zigzag", "balanced")


def test_slices_of_few_tokens_and_masks_that_show_nothing_have_a_layout():
    for slices in ((), NAMED["windows"], (((0, 1), (39, 40), "full"),)):
        for cp in (1, 3, 8):
            layout = of("balanced", 40, slices, cp)
            assert sorted(int(p) for rank in range(cp) for p in layout.positions(rank)) == list(range(40))
    assert area_before(document_mask(right=0, cu_seqlens=(0, 4, 9)), np.array([0, 4, 9])).tolist() == [0, 10, 25]

"""Batches with slices through Megatron's own models: prefixes, images, slices of any kind, and trees of rollouts."""

import pytest
from distributed import run_ranks
from slice_runs import RINGS, compare
from trainer_runs import IMPORTED

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]
BATCHES = ("prefix lengths", "prefix lengths, window", "attention slices", "images", "images in documents", "tree")


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(2, compare, timeout=300, fresh=True, imported=IMPORTED)


@pytest.mark.parametrize("setup", ["alone", *RINGS])
@pytest.mark.parametrize("batch", BATCHES)
def test_losses_and_gradients_are_those_of_megatrons_dense_masks_and_of_separate_sequences(ranks, setup, batch):
    if batch not in ranks[0][setup]:
        pytest.skip("the local attention of this version has no windows")
    differences = [rank[setup][batch] for rank in ranks]
    assert all(difference < 1e-5 for difference in differences), differences


@pytest.mark.parametrize("setup", RINGS)
def test_a_dense_mask_that_is_slices_is_computed_as_such(ranks, setup):
    assert all(rank[setup]["dense prefix"] < 1e-5 for rank in ranks)


@pytest.mark.parametrize("setup", RINGS)
def test_the_block_before_the_first_batch_says_that_its_masks_are_slices(ranks, setup):
    assert all("documents and masks as slices (1, 2 here)" in rank[setup]["told"] for rank in ranks)


@pytest.mark.parametrize("setup", RINGS)
def test_what_contradicts_slices_is_refused_with_a_way_out(ranks, setup):
    ways_out = (
        "pass None as the model's attention_mask",
        "--no-create-attention-mask-in-dataloader",
        "attention_slices and prefix_lengths both",
        "longer than its document",
        "--micro-batch-size 1",
        "state().running(record)",
        "use full attention",
        "leave out --mtp-num-layers",
    )
    for rank in ranks:
        for way_out, message in zip(ways_out, rank[setup]["said"], strict=True):
            assert way_out in message, (way_out, message)

"""Batches with slices through Megatron's own models: prefixes, images, slices of any kind, and trees of rollouts."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distributed import run_ranks
from slice_runs import RINGS, compare
from trainer_runs import IMPORTED

from mindspeed_cp.megatron import batches
from mindspeed_cp.megatron.records import BatchRecords, MicroBatch
from mindspeed_cp.megatron.slices import check_layers, slices_of_batch
from mindspeed_cp.sequence.layout import SequenceLayout

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]
BATCHES = (
    "prefix lengths",
    "prefix lengths, window",
    "attention slices",
    "attention slices, packed",
    "documents by hand",
    "images",
    "images in documents",
    "tree",
)


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
        "pass the sequences one by one",
        "leave attention_slices, prefix_lengths and image_token_id out",
        "state().running(record)",
    )
    for rank in ranks:
        for way_out, message in zip(ways_out, rank[setup]["said"], strict=True):
            assert way_out in message, (way_out, message)


@pytest.mark.parametrize(
    "lengths",
    [
        torch.tensor([2, 0]),
        np.array([2, 0]),
        [np.int64(2), torch.tensor(0)],
        [[2], np.array([0])],
        np.array([[2], [0]]),
    ],
)
def test_prefix_lengths_may_be_numbers_of_any_library(lengths):
    expected = slices_of_batch({"prefix_lengths": [2, 0]}, None, 2, 8, None)
    found = slices_of_batch({"prefix_lengths": lengths}, None, 2, 8, None)
    assert found == expected
    assert all(type(end) is int for row in found[0] for *ranges, _ in row for run in ranges for end in run)


@pytest.mark.parametrize("lengths", [2, [2.0, 0.0], torch.tensor([2.0, 0.0]), [None, 2], "ab"])
def test_prefix_lengths_that_are_no_numbers_are_refused(lengths):
    with pytest.raises(ValueError, match="prefix_lengths .* a whole number for each row"):
        slices_of_batch({"prefix_lengths": lengths}, None, 2, 8, None)


@pytest.mark.parametrize("ids", [[[0, 1]], torch.tensor([[0.0, 1.0]])])
def test_rotary_position_ids_that_are_no_tensor_of_whole_numbers_are_refused(ids):
    with pytest.raises(ValueError, match="rotary_position_ids are .* whole numbers"):
        slices_of_batch({"attention_slices": [], "rotary_position_ids": ids}, None, 1, 2, None)


def record(places=None, end=4):
    layout = SequenceLayout((((0, 8),),))
    return MicroBatch(layout, slices=((((0, end), (0, end), "causal"),),), places=places)


@pytest.mark.parametrize(
    "variant, places, says",
    [
        ("dsa", None, "sparse attention .*leave attention_slices"),
        ("gated_delta_net", (((0, 4), (2, 6)),), "layers with a state go from row to row"),
        ("gated_delta_net", None, None),
        (None, (((0, 4), (2, 6)),), None),
    ],
)
def test_layers_that_cannot_follow_slices_are_refused(variant, places, says):
    """Sparse attention would ignore them, and a state would go from one branch of a tree into the next."""
    config = SimpleNamespace(experimental_attention_variant=variant)
    model = SimpleNamespace(config=config, modules=lambda: [])
    if says is None:
        return check_layers(model, record(places))
    with pytest.raises(ValueError, match=says):
        check_layers(model, record(places))


def test_a_copy_of_the_tokens_of_two_batches_with_other_slices_leads_to_neither():
    """Without context parallelism too: an answer of one prompt with two prefixes, whose tokens were cloned."""
    records, batches = BatchRecords(), [torch.arange(8)[None] for _ in range(3)]
    for tokens, end in zip(batches[:2], (4, 4)):
        records.remember([tokens], record(end=end), [tokens])
    assert records.copied_from(batches[0].clone()) == record(end=4)
    records.remember([batches[2]], record(end=5), [batches[2]])
    with pytest.raises(ValueError, match="split differently"):
        records.copied_from(batches[0].clone())
    assert records.find([batches[0]]) == record(end=4) and records.find([batches[2]]) == record(end=5)


def test_packed_parameters_in_a_pipeline_do_not_lose_slices(monkeypatch):
    """Stages in the middle have no batch, and packed_seq_params say documents alone."""
    adaptor, model = SimpleNamespace(sliced=True), SimpleNamespace(pre_process=True)
    monkeypatch.setattr(batches, "pipeline_of", lambda model: [0, 1])
    with pytest.raises(ValueError, match="pipeline stages.*leave packed_seq_params out"):
        batches._check_packed_slices(adaptor, model, record(), False)
    monkeypatch.setattr(batches, "pipeline_of", lambda model: [0])
    batches._check_packed_slices(adaptor, model, record(), False)


def test_slices_with_numbers_of_numpy_go_over_to_later_stages():
    """As JSON, which knows no numbers of numpy."""
    ends = np.arange(5)
    slices, _ = slices_of_batch({"attention_slices": [((ends[0], ends[4]), (0, ends[4]), "causal")]}, None, 1, 8, None)
    assert json.dumps(slices) == '[[[[0, 4], [0, 4], "causal"]]]'

"""Pipelines of the planner: interleaved parts, stages that differ, and what each of them holds."""

import dataclasses

import pytest
from test_planner_training import TINY, UNIT, long_work, one

from mindspeed_cp.planner.models import MODELS
from mindspeed_cp.planner.report import megatron_flags
from mindspeed_cp.planner.split import Split, Work, splits
from mindspeed_cp.planner.training import attention, planned


def test_tables_of_words_and_positions_belong_to_their_stages():
    untied = Work(dataclasses.replace(TINY, tied=False, learned_positions=True), 1024, 8)
    layers, words, positions = 2 * TINY.dense_layer.total, TINY.vocab * TINY.hidden, 1024 * TINY.hidden
    first, alone = one(Split(1, 2, 1, 1), work=untied).memory, one(Split(1, 1, 1, 1), work=untied).memory
    assert first.weights == 2 * (layers + words + positions)
    assert alone.weights == 2 * (2 * layers + 2 * words + positions)
    # What tensor parallelism shares out and what every rank has; the gradients of tables travel too.
    shared = one(Split(2, 1, 1, 2), work=untied)
    assert shared.memory.weights == alone.weights // 2 + positions + TINY.num_layers * 2 * TINY.hidden
    assert shared.step.data == 0  # hidden behind the first micro batch
    slow = dataclasses.replace(UNIT, intra_bandwidth=1e5)
    candidate = attention(untied, Split(2, 1, 1, 2), slow).candidates[0]
    found = planned(untied, Split(2, 1, 1, 2), candidate, "none", slow).step
    moved = shared.memory.weights / 2 * 6 / 2 / 1e5
    assert found.data == pytest.approx(moved - found.compute / 4)  # of four micro batches


def test_a_short_last_stage_has_the_output_and_the_others_do_not():
    five = Work(dataclasses.replace(TINY, num_layers=5), 1024, 8)
    uneven, even = one(Split(1, 2, 1, 1, last_layers=2), work=five).step, one(Split(1, 2, 1, 1)).step
    output = 6 * 1024 * TINY.vocab * TINY.hidden / 1e9
    layer = (even.compute / 8 - output) / 2
    assert uneven.compute / 8 == pytest.approx(max(3 * layer, 2 * layer + output))


def test_stages_wait_for_the_pipeline_to_fill():
    two = one(Split(1, 2, 1, 1)).step
    assert two.bubble == pytest.approx((two.compute + two.context + two.tensor + two.pipeline) / 8)
    assert two.pipeline == pytest.approx(8 * 2 * 1024 * TINY.hidden * 2 / 1e9)


def test_an_interleaved_pipeline_waits_less_and_holds_more():
    long = Work(dataclasses.replace(TINY, num_layers=8), 1024, 8)
    plain, parts = (one(Split(1, 2, 1, 1, vpp=vpp), work=long) for vpp in (1, 4))
    busy = plain.step.compute + plain.step.tensor
    assert plain.step.bubble == pytest.approx((busy + plain.step.pipeline) / 8)
    assert parts.step.bubble == pytest.approx((busy + parts.step.pipeline) / 8 / 4)
    assert parts.step.pipeline == pytest.approx(4 * plain.step.pipeline)
    # Of four parts the first stage has 2 (2 - 1) + (4 - 1) 2 + 1 = 9 in flight: 9 / 4 micro batches in place of 2.
    assert parts.memory.activations == pytest.approx(plain.memory.activations * 9 / 8)


def test_a_pipeline_is_interleaved_where_megatron_can_do_it():
    long = dataclasses.replace(TINY, num_layers=8)
    found = {split.vpp for split in splits(Work(long, 1024, 8), 2, UNIT, {"tp": 1, "pp": 2}, {})}
    assert found == {1, 2, 4}
    # Three micro batches are no whole number of groups of two.
    assert {split.vpp for split in splits(Work(long, 1024, 3), 2, UNIT, {"tp": 1, "pp": 2}, {})} == {1}
    # 126 layers with embedding and output are 128: Llama 3 405B on 16 stages.
    work = Work(MODELS["llama3.1-405b"], 8192, 16)
    sizes = {(split.vpp, split.ends, split.last_layers) for split in splits(work, 128, UNIT, {"tp": 8, "pp": 16}, {})}
    assert (8, True, 0) in sizes and (1, False, 6) in sizes
    model = MODELS["llama3.1-405b"]
    layers = [sum(model.stage(number, 16, True)) for number in range(16)]
    assert layers == [7, *[8] * 14, 7]
    plan = planned(
        long_work(),
        Split(1, 2, 1, 1, vpp=2),
        attention(long_work(), Split(1, 2, 1, 1), UNIT).candidates[0],
        "none",
        UNIT,
    )
    assert "--num-virtual-stages-per-pipeline-rank 2 " in megatron_flags(plan)

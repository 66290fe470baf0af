"""Masks that are sets of slices: every kind and combination beside dense attention, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import Case, attend_many, check_cases, setup_of
from distributed import run_ranks
from pairs import drawn
from setups import degree_of, for_every_algorithm, setups
from setups import drawn as drawn_setups
from slice_cases import IMAGES, MAGI_ATTENTION, NAMED, PREFIX, TREE, WINDOWS
from test_attention_dropout import check_gradients, dropout_case

from mindspeed_cp import SequenceLayout, context_parallel_attention

KINDS = tuple(NAMED)
LAYOUTS = ("auto", "contiguous", "zigzag", "balanced")
MASK_TYPES = ("causal", "full", "general")


@for_every_algorithm
def test_the_masks_of_today_equal_dense_attention(algorithm, cp):
    """What the mask type says does not matter: the slices are the batch's."""
    check_cases(
        [
            Case(
                {**setup, "attention_mask_type": mask_type},
                seq_len=40,
                heads=2 * degree_of(setup),
                kv_heads=degree_of(setup),
                slices=NAMED[kind],
            )
            for setup, kind, mask_type in drawn_setups(algorithm, cp, KINDS, MASK_TYPES)
        ]
    )


@pytest.mark.parametrize("name", MAGI_ATTENTION)
def test_the_configurations_that_magi_attention_tests_equal_dense_attention(name):
    seq_len, slices = MAGI_ATTENTION[name]
    base = {"context_parallel_size": 4, "algorithm": "megatron_cp_algo"}
    configs = base, {**base, "kv_exchange": "mesh"}, {"context_parallel_size": 4}
    check_cases([Case(config, seq_len=seq_len, heads=4, kv_heads=2, slices=slices) for config in configs])


def test_every_layout_takes_slices():
    cases = []
    for layout, kind in drawn(LAYOUTS, KINDS):
        config = {"context_parallel_size": 3, "algorithm": "megatron_cp_algo", "kv_exchange": "direct"}
        cases.append(Case({**config, "batch_layout": layout}, seq_len=40, slices=NAMED[kind]))
    anybody = (((25, 40), (0, 3)), (), ((3, 25),))
    check_cases([*cases, replace(cases[0], runs=anybody)])


def test_every_row_of_a_batch_may_have_slices_of_its_own():
    base = {"context_parallel_size": 2, "algorithm": "megatron_cp_algo", "kv_exchange": "direct"}
    rows = (PREFIX, TREE, TREE, ())
    cases = [Case(base, seq_len=40, batch=4, slices=rows), Case(base, seq_len=40, batch=2, slices=(WINDOWS, IMAGES))]
    documents = ((0, 7, 40), (0, 40))
    check_cases([*cases, replace(cases[1], cu_seqlens=documents), replace(cases[1], dense="batch", window=(9, 3))])


@pytest.mark.parametrize("algorithm", ["megatron_cp_algo", "ulysses_cp_algo"])
@pytest.mark.cpu_only
def test_dropout_of_slices_differentiates_the_mask_that_it_drew(algorithm):
    for setup in setups(algorithm, 2):
        check_gradients(dropout_case(setup, seq_len=40, slices=TREE))


@pytest.mark.parametrize("cp", [1, 3])
def test_tokens_that_no_slice_names_give_zeros_and_reach_nobody(cp):
    """NaN in them changes nothing: they are in no block."""
    outside = (((0, 9), (3, 9), "inverse"), ((20, 33), (12, 25), "causal"))  # 9 to 12 and 33 on are nowhere
    case = Case(
        {"context_parallel_size": cp, "algorithm": "megatron_cp_algo"}, seq_len=40, slices=outside, dtype="float64"
    )
    layout, nowhere = case.layout(), torch.tensor([*range(9, 12), *range(33, 40)])
    for results in (run_ranks(cp, attend_many, [case]), run_ranks(cp, attend_poisoned, case, nowhere)):
        for rank, (result,) in enumerate(results):
            positions = layout.positions(rank)
            for name, rows in result.items():
                assert rows.isfinite().all(), name
                assert not rows[torch.isin(positions, nowhere)].any(), name
    check_cases([case, replace(case, slices=(((4, 9), (3, 12), "full"),)), replace(case, slices=())])


def attend_poisoned(rank, case, nowhere):
    class Poisoned(Case):
        def inputs(self):
            tensors = super().inputs()
            for name in ("query", "key", "value"):
                tensors[name][nowhere] = torch.nan
            return tensors

    return attend_many(rank, [Poisoned(**case.__dict__)])


def alone(slices, seq_len=8):
    config, groups = setup_of({"context_parallel_size": 1})
    rows = torch.ones(seq_len, 1, 1, 4)
    layout = SequenceLayout.build(config, seq_len)
    return context_parallel_attention(
        rows, rows, rows, config=config, groups=groups, layout=layout, attention_slices=slices
    )


@pytest.mark.parametrize(
    "slices, says",
    [
        ([((0, 4), (0, 4), "full"), ((2, 6), (3, 8), "full")], ("slices 0", "1", "overlap", "cut")),
        (
            [((0, 8), (0, 8), "causal"), ((0, 1), (1, 8), "full"), ((4, 8), (4, 5), "inverse")],
            ("0", "and 2", "overlap"),
        ),
        ([((0, 4), (0, 9), "full")], ("sequence of 8 tokens",)),
        ([((4, 0), (0, 4), "full")], ("ascend",)),
        ([((0, 4), (0, 4), "bicausal")], ("full, causal, inverse, band",)),
        ([((0, 4), (0, 4.0), "full")], ("whole numbers",)),
        ([((0, 4), (0, 4))], ("kind",)),
        ([((0, 4), (0, 4), 1)], ("slices 0 is", "full, causal, inverse, band")),
        ([(np.array([0, 4]), (0, 4), "full")], ("must be a list", "not arrays")),
        ([None], ("holds None", "must be a list")),
        (((0, 4), (0, 4), "full"), ("holds 'full'", "must be a list")),
        ([[((0, 4), (0, 4), "full")]] * 2, ("2 lists", "1 rows")),
        ("causal", ("must be a list",)),
    ],
)
def test_slices_that_cannot_be_are_refused(slices, says):
    with pytest.raises(ValueError, match="attention_slices") as refused:
        alone(slices)
    assert all(part in str(refused.value) for part in says), refused.value


def test_slices_that_touch_or_interlock_do_not_overlap():
    """Two triangles of one square, whose diagonals lie side by side, are the square."""
    triangles = (((0, 40), (0, 40), "causal"), ((0, 39), (1, 40), "inverse"), ((3, 3), (0, 8), "full"))
    check_cases([Case({"context_parallel_size": 2, "algorithm": "megatron_cp_algo"}, seq_len=40, slices=triangles)])


def test_slices_are_numbers_alone_at_any_length():
    """A million tokens whose slices see 160 keys each: nothing of a pair's size is made, and few blocks."""
    from mindspeed_cp.sequence.blocks import plan_blocks
    from mindspeed_cp.sequence.slice_mask import slices_mask

    size = 1 << 20
    slices = [
        ((0, size), (0, 64), "full"),
        *(((n, n + 64), (n, n + 160), "band") for n in range(64, size - 160, 1 << 12)),
    ]
    mask = slices_mask(slices, size)
    blocks = plan_blocks(((0, size),), ((0, size),), mask, True)
    assert len(blocks) == len(slices)
    assert sum(block.area for block in blocks) == 64 * size + (len(slices) - 1) * 64 * 97

"""What comes around the front door is exact or refused: batches that others split, groups that others made, other
entries of a model, document ends beside the batch, several models.
"""

import closed_groups
import closed_runs
import pytest
from distributed import run_ranks
from megatron_version import MINOR
from model_cases import has
from trainer_runs import IMPORTED

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]
EXACT = 1e-5
REFUSED = {
    "nobody": ["every context-parallel rank was given the same 24 position ids", "get_batch_on_this_cp_rank"],
    "overlap": ["position 8 is held by context-parallel ranks 0 and 1", "shard_batch"],
    "no ids": ["brings no position ids", "nobody declared it", "--cp-batch-layout zigzag or contiguous"],
    "a model of one rank": ["context_parallel_size 1", "split over 2 ranks", "pass it whole batches"],
    "not the end": ["set_actual_seq_len got ends up to 5", "24 tokens"],
    "another size": ["context_parallel_size 2", "has 1 ranks", "same size"],
    "uneven rows": ["of 24 tokens", "next pipeline stage expects 12", "variable_seq_lengths=True"],
    "labels of other documents": ["labels of this pipeline stage", "(0, 5, 24)", "same cu_seqlens on every stage"],
    "of one of two batches": ["set_actual_seq_len was called after this batch was split", "before each batch is split"],
    "equal batches": ["batches of 24 and 24 tokens", "pass the tensors of one batch"],
    "no group": ["context_parallel_size 2", "no context-parallel group", "initialize_model_parallel"],
}


def check(ranks):
    """Every difference is one of rounding, and every refusal says what it must."""
    wrong = []
    for rank, found in enumerate(ranks):
        for case, result in found.items():
            says = REFUSED.get(case[-1] if isinstance(case, tuple) else case)
            if says is None and not (isinstance(result, float) and result < EXACT):
                wrong.append((rank, case, result))
            elif says is not None and not all(part in str(result) for part in says):
                wrong.append((rank, case, result))
    assert not wrong, "\n".join(map(str, wrong))


def test_whole_rows_that_others_cut_are_exact_by_their_position_ids_or_refused():
    ranks = run_ranks(2, closed_runs.foreign, timeout=200, fresh=True, imported=IMPORTED)
    assert len(ranks[0]) == 26
    check(ranks)


def test_padding_is_recognised_in_every_way_of_counting_it():
    check(run_ranks(2, closed_runs.padded, timeout=200, fresh=True, imported=IMPORTED))


def test_copies_of_a_batch_are_known_by_what_all_ranks_hold():
    check(run_ranks(2, closed_runs.beginnings, timeout=60, fresh=True, imported=IMPORTED))


def test_document_ends_beside_a_batch_are_taken_in_every_order_and_unit():
    check(run_ranks(2, closed_runs.handed_over, timeout=200, fresh=True, imported=IMPORTED))


def test_every_entry_of_a_model_and_every_recomputation_sees_its_own_batch():
    check(run_ranks(2, closed_runs.doors, timeout=200, fresh=True, imported=IMPORTED))


def test_groups_that_were_there_before_the_import_or_are_of_another_size():
    check(run_ranks(2, closed_groups.others, timeout=200, fresh=True, imported=IMPORTED))


@pytest.mark.skipif(MINOR < (0, 16), reason="models take a ProcessGroupCollection of any groups from 0.16 on")
def test_models_over_groups_that_nobody_registered():
    check(run_ranks(4, closed_groups.collections, timeout=200, fresh=True, imported=IMPORTED))


@pytest.mark.skipif(not has("megatron.core.models.common.model_chunk_schedule_plan"), reason="no plans before 0.14")
def test_a_plan_of_a_forward_pass_keeps_the_documents_of_its_batch():
    check(run_ranks(2, closed_runs.plans, timeout=200, fresh=True, imported=IMPORTED))


def test_two_models_in_one_pipeline_keep_their_own_documents():
    ranks = run_ranks(4, closed_runs.two_models, timeout=200, fresh=True, imported=IMPORTED)
    assert sum(map(len, ranks)) == 10
    check(ranks)

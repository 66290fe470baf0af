"""The planner counts of linear and sparse attention what a run sends."""

import pytest
import torch
from delta_runs import WIDTH, Case, run
from distributed import run_ranks

from mindspeed_cp import ContextParallelConfig
from mindspeed_cp.linear.gated_delta import DeltaHeads
from mindspeed_cp.planner.other_layers import LinearLayer
from mindspeed_cp.planner.trace import Problem, trace

CASES = {
    "heads": Case(3, "heads", 37, layout="zigzag", batch=2, cheap=True),
    "heads, packed, a decay for each channel": Case(2, "heads", 24, keys=4, decays=3, documents=(0, 5, 6, 24)),
    "state": Case(4, "state", 40, batch=2, cheap=True),
    "state, rows move": Case(3, "state", 36, layout="zigzag", cheap=True, gate=True),
    "state, packed": Case(4, "state", 37, documents=(0, 1, 9, 12, 30, 37)),
}


def predicted(case, rank):
    """[bytes by purpose, forward and backward] of a rank, whose rows move between the projections as in the run."""
    config = ContextParallelConfig(
        context_parallel_size=case.cp, algorithm="megatron_cp_algo", batch_layout=case.layout, linear_exchange=case.way
    )
    heads = DeltaHeads(case.keys, case.values, case.key_dim, case.value_dim, case.decays)
    layer = LinearLayer(heads, WIDTH, hidden=64)
    documents = case.documents
    problem = Problem(case.seq_len, 1, 1, 1, 1, case.batch, torch.float64, documents, stride=2, layer=layer)
    return [
        {purpose: sent for purpose, sent in each.traffic.bytes.items() if sent} for each in trace(config, problem, rank)
    ]


@pytest.mark.parametrize("name", CASES)
def test_bytes_of_layers_with_a_state_are_those_of_a_run(name):
    case = CASES[name]
    for rank, (*_, sent) in enumerate(run_ranks(case.cp, run, case)):
        assert predicted(case, rank) == sent

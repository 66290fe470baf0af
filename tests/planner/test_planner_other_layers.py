"""The planner counts of linear and sparse attention what a run sends."""

from dataclasses import replace

import pytest
import torch
from delta_runs import WIDTH, Case, run
from distributed import run_ranks
from linear_models import sparse_bytes
from megatron_version import MINOR
from trainer_runs import IMPORTED

from mindspeed_cp import ContextParallelConfig, TrainingSetup
from mindspeed_cp.linear.gated_delta import DeltaHeads
from mindspeed_cp.planner.cluster import CLUSTERS
from mindspeed_cp.planner.fitting import is_next
from mindspeed_cp.planner.models import MODELS
from mindspeed_cp.planner.other_layers import LinearLayer, SparseLayer
from mindspeed_cp.planner.search import search
from mindspeed_cp.planner.split import Split, Work
from mindspeed_cp.planner.timing import Candidate, Timing, timed
from mindspeed_cp.planner.trace import Problem, trace
from mindspeed_cp.planner.training import problem_of
from mindspeed_cp.settings.algorithms import ALGORITHMS

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


def test_a_mean_layer_takes_the_faster_way_of_its_layers_with_a_state():
    """Where a long sequence's heads travel slowly, states do not; one head for eight ranks leaves states alone."""
    problem = problem_of(Work(MODELS["qwen3-next-80b-a3b"], 1 << 17, 8), Split(1, 1, 8, 1, 8, 1))
    config, slow = ContextParallelConfig(context_parallel_size=8), replace(CLUSTERS["h100"], intra_bandwidth=1e9)
    (layer, share), whole = problem.linear, replace(problem, linear=None)
    assert share == 0.75 and timed(config, whole, slow).config.linear_exchange == "heads"
    found = timed(config, problem, slow)
    ways = [
        timed(replace(config, linear_exchange=way), replace(whole, layer=layer), slow) for way in ("heads", "state")
    ]
    assert ways[1].seconds < ways[0].seconds and found.config.linear_exchange == "state"
    alone = timed(config, whole, slow)
    assert found.seconds == pytest.approx(0.25 * alone.seconds + 0.75 * ways[1].seconds)
    assert found.intra_bytes == round(0.25 * alone.intra_bytes + 0.75 * ways[1].intra_bytes)
    one_head = replace(problem, linear=(replace(layer, heads=replace(layer.heads, keys=1, values=1)), share))
    assert timed(config, one_head, CLUSTERS["h100"]).config.linear_exchange == "state"


def test_sparse_attention_is_planned_with_the_one_exchange_that_it_has():
    work, split = Work(MODELS["deepseek-v3.2"], 1 << 14, 8), Split(8, 1, 8, 1, 8, 1)
    problem = problem_of(work, split)
    found = search(8, problem, TrainingSetup(num_attention_heads=128), CLUSTERS["h100"])
    (only,) = found.candidates
    assert only.config.algorithm == "kvallgather_cp_algo" and set(found.excluded) == set(ALGORITHMS) - {
        "kvallgather_cp_algo"
    }
    assert only.intra_bytes + only.inter_bytes == 2 * 7 * (1 << 14) // 8 * (64 + 512 + 128) * 2  # forward and backward
    longer = timed(only.config, replace(problem, seq_len=1 << 15), CLUSTERS["h100"])
    assert 2 < longer.compute / only.compute < 3.5  # the indexer's part is quadratic, the chosen keys' linear


@pytest.mark.megatron
@pytest.mark.skipif(MINOR < (0, 19), reason="sparse attention with context parallelism comes with 0.19")
def test_bytes_of_sparse_attention_are_those_of_a_run():
    for rank, sent in enumerate(run_ranks(2, sparse_bytes, 31, timeout=200, fresh=True, imported=IMPORTED)):
        config = ContextParallelConfig(context_parallel_size=2, algorithm="kvallgather_cp_algo")
        layer = SparseLayer(4, rope=4, latent=16, index_heads=2, index_dim=8, topk=6)
        problem = Problem(31, 4, 4, 12, 6, batch=2, dtype=torch.float32, layer=layer)
        forward, backward = trace(config, problem, rank)
        assert sent == [{"kv": 2 * forward.traffic.bytes["kv"]}, {"dkv": 2 * backward.traffic.bytes["dkv"]}]  # layers


def test_a_setting_completed_by_states_leads_to_those_that_its_family_has():
    config = ContextParallelConfig(context_parallel_size=8)
    waits = Timing(1.0, 0.5, 0.5)
    found = Candidate(replace(config, linear_exchange="state"), waits, waits, 0, 0)
    assert is_next(found, replace(config, ulysses_chunks=2), config)
    assert not is_next(found, config, config)

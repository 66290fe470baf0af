"""The planner: predicted bytes are counted bytes, exclusions are config.py's, rankings have their reasons."""

import dataclasses
import json

import pytest
from cases import DTYPES, Case
from measured import drop_zero, traffic
from setups import SOME_SIZES, drawn
from slice_cases import TREE

from mindspeed_cp import ContextParallelConfig, cli
from mindspeed_cp.plan import main
from mindspeed_cp.planner.cluster import CLUSTERS, Cluster
from mindspeed_cp.planner.events import Compute, Post, Wait
from mindspeed_cp.planner.models import MODELS
from mindspeed_cp.planner.search import hiding_tokens, variants
from mindspeed_cp.planner.split import Split, Work
from mindspeed_cp.planner.timing import timeline
from mindspeed_cp.planner.trace import Problem, shorter_side, trace
from mindspeed_cp.planner.training import attention
from mindspeed_cp.sequence.blocks import Block

MASKS = {
    "causal": {},
    "full": {"mask_type": "full"},
    "packed": {"cu_seqlens": (0, 11, 13, 40, 48)},
    "window": {"window": (5, 0)},
    "tree": {"slices": TREE},
}


def predicted(case, rank):
    problem = Problem(
        case.seq_len, case.heads, case.kv_heads, case.dk, case.dv, case.batch, DTYPES[case.dtype], case.cu_seqlens,
        case.window, attention_slices=case.slices,
    )  # fmt: skip
    passes = trace(ContextParallelConfig(**case.config), problem, rank)
    for each in passes:
        assert sum(each.sent.values()) == each.traffic.total_bytes, "bytes by peer and by purpose"
    return tuple(drop_zero(counter) for each in passes for counter in (each.traffic.bytes, each.traffic.messages))


@pytest.mark.parametrize("algorithm, cp", [param for param in SOME_SIZES if param.values[1] in (2, 3, 4)])
def test_predicted_bytes_and_messages_are_the_counted_ones(algorithm, cp):
    for setup, mask, policy, kv_heads in drawn(algorithm, cp, tuple(MASKS), (None, "half", "full"), (1, 2, 8)):
        options = dict(MASKS[mask])
        mask_type = options.pop("mask_type", "causal")
        config = {**setup, "kv_cache_policy": policy, "attention_mask_type": mask_type}
        case = Case(config, seq_len=48, batch=2, heads=8, kv_heads=kv_heads, dk=6, dv=4, dtype="float32", **options)
        assert traffic(case) == [predicted(case, rank) for rank in range(cp)], case


def test_a_rank_of_hundreds_is_predicted_without_processes():
    config = ContextParallelConfig(
        context_parallel_size=256, algorithm="kvallgather_cp_algo", attention_mask_type="full"
    )
    forward, _ = trace(config, Problem(8192, 8, 2, 4, 4), 5)
    assert forward.traffic["kv"] == 255 * 32 * 2 * 8 * 2
    assert len(forward.sent) == 255


SLOW = Cluster(
    2, flops=1e3, intra_bandwidth=100, inter_bandwidth=10, latency=1, compute_efficiency=1, link_efficiency=1,
    attention_efficiency=1,
)  # fmt: skip


@pytest.mark.parametrize("peer, exposed", [(1, 1 + 50 / 100 - 1), (2, 1 + 50 / 10 - 1)])
def test_what_computation_does_not_cover_of_a_transfer_is_exposed(peer, exposed):
    timing = timeline([Post(0, {peer: 50}, {peer: 40}), Compute(1000), Wait(0)], SLOW, rank=0)
    assert (timing.compute, timing.exposed) == (1, exposed)


MESH = dataclasses.replace(SLOW, devices_per_node=4, links=3)


def test_a_mesh_carries_transfers_to_several_peers_at_once_and_a_switch_shares_its_port():
    ends = {1: 50, 2: 50, 3: 50}
    everybody = [Post(0, ends, ends), Wait(0)]
    switch = dataclasses.replace(MESH, links=1)
    assert timeline(everybody, MESH, rank=0).exposed == 1 + 50 / 100
    assert timeline(everybody, switch, rank=0).exposed == 1 + 150 / 100
    # One transfer has one link, whatever else the device has.
    one = [Post(0, {1: 150}, {3: 150}), Wait(0)]
    assert timeline(one, MESH, rank=0).exposed == timeline(one, switch, rank=0).exposed == 1 + 150 / 100
    # What goes to one peer queues at its link.
    two = [Post(0, {1: 50}, {3: 50}), Post(1, {1: 50}, {3: 50}), Wait(0), Wait(1)]
    assert timeline(two, MESH, rank=0).exposed == 2 * (1 + 50 / 100)


def test_devices_that_share_an_adapter_share_its_rate():
    shared = dataclasses.replace(SLOW, devices_per_adapter=2)
    assert (SLOW.bandwidth(True), shared.bandwidth(True), shared.bandwidth(False)) == (10, 5, 100)
    assert MESH.bandwidth(False, 3) == 3 * MESH.bandwidth(False) and SLOW.bandwidth(False, 3) == SLOW.bandwidth(False)


def test_a_ring_step_on_a_910b_has_one_of_seven_links():
    cluster = CLUSTERS["ascend-910b"]
    size = int(28e9)
    ring, everybody = [Post(0, {1: size}, {7: size}), Wait(0)], dict.fromkeys(range(1, 8), size // 7)
    alone = timeline(ring, cluster, rank=0).exposed
    assert alone == pytest.approx(1 / 0.8, rel=1e-3)
    assert timeline([Post(0, everybody, everybody), Wait(0)], cluster, rank=0).exposed == pytest.approx(
        alone / 7, rel=1e-3
    )
    # So Ulysses, whose all-to-all uses them all, comes before a ring within a node.
    work = Work(MODELS["llama2-7b"], 32768, 8)
    found = attention(work, Split(1, 1, 8, 1), cluster).candidates
    assert found[0].config.algorithm == "ulysses_cp_algo"


def test_efficiency_is_a_curve_over_the_shape_of_a_block():
    cluster = CLUSTERS["h100"]
    rates = [1 / cluster.attention_seconds(1, tokens, 128) for tokens in (256, 1024, 8192, 1 << 20)]
    assert rates == sorted(rates) and rates[0] < 0.4 * rates[-1]
    assert rates[-1] == pytest.approx(cluster.attention_rate, rel=1e-3)
    assert cluster.attention_seconds(1, 8192, 64) > cluster.attention_seconds(1, 8192, 128)
    assert cluster.product_seconds(1, 512, 8192) > 1.2 * cluster.product_seconds(1, 8192, 8192)
    # A rectangle is as slow as its shorter side, pieces as slow as one by one.
    for pieces in (((0, 64), (0, 512)), ((0, 64, 320, 328), (0, 64, 320, 328))):
        block = Block(*pieces)
        seconds = sum(
            cluster.attention_seconds(rows * cols, min(rows, cols), 128)
            for rows, cols in ((q.stop - q.start, k.stop - k.start) for q, k in block.pieces())
        )
        whole = sum((q.stop - q.start) * (k.stop - k.start) for q, k in block.pieces())
        assert cluster.attention_seconds(whole, shorter_side(block), 128) == pytest.approx(seconds)


def plan(capsys, *arguments):
    status = main([*map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


# Pins of what the model of the cluster says today, no evidence that it is right:
# (arguments, first, whether its transfers hide behind computation).
GOLDEN = {
    "one node, too few tokens for a ring": (
        ("--model", "llama2-7b", "--cp", 8, "--seq-length", 2048, "--cluster", "a100"),
        "Ulysses, ",
        False,
    ),
    "more ranks than heads": (
        ("--model", "llama2-70b", "--tp", 8, "--cp", 16, "--seq-length", 1 << 20, "--cluster", "ascend-910b"),
        "Hybrid (ulysses 2, ring 8), ",
        True,
    ),
    "a slow network": (
        ("--model", "llama2-7b", "--cp", 16, "--seq-length", 65536, "--cluster", "h100", "--inter-bandwidth", 2e9),
        "Ulysses, cp=16, contiguous, causal, 2 groups of heads",  # crosses once, while the other heads are computed
        False,
    ),
}


@pytest.mark.parametrize("arguments, winner, hides", GOLDEN.values(), ids=GOLDEN)
def test_the_ranking_and_its_reason(arguments, winner, hides, capsys):
    status, found = plan(capsys, *arguments)
    rows = found["candidates"]
    assert status == 0 and rows[0]["setting"].startswith(winner), [row["setting"] for row in rows[:4]]
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert ("hidden behind" if hides else "are not hidden") in rows[0]["reason"]
    limits = found["ring_hides_from_tokens"]
    local = arguments[arguments.index("--seq-length") + 1] / arguments[arguments.index("--cp") + 1]
    spans = max(arguments[arguments.index("--cp") + 1] * (8 if "--tp" in arguments else 1) // 8, 1) > 1
    assert (local > limits["inter" if spans else "intra"]) == hides


def test_an_excluded_algorithm_has_the_rule_of_the_configuration(capsys):
    _, found = plan(capsys, *GOLDEN["more ranks than heads"][0])
    assert list(found["excluded"]) == ["ulysses_cp_algo"]
    assert found["excluded"]["ulysses_cp_algo"].startswith("--num-attention-heads 64 must be divisible by")


def test_the_seeds_condition_is_ours_for_full_attention_with_two_bytes_and_as_many_kv_heads():
    cluster = CLUSTERS["ascend-910b"]
    least = hiding_tokens(Problem(1, 32, 32, 128, 128), cluster, inter=True, causal=False)
    assert least == pytest.approx(cluster.attention_rate / cluster.bandwidth(True))


def test_wrong_flags_are_named(capsys):
    common = ["--cp", "2", "--seq-length", "64", "--cluster", "a100"]
    for flag, value in (("--model", "llama9"), ("--hf-config", "missing.json")):
        assert main([flag, value, *common]) == 2
        assert f"{flag} {value}" in capsys.readouterr().err
    assert main(["--model", "llama2-7b", *common, "--link-efficiency", "1.5"]) == 2
    assert "--link-efficiency 1.5" in capsys.readouterr().err


def test_the_console_script_knows_its_commands(capsys):
    assert cli.main(["--help"]) == 0 and "plan" in capsys.readouterr().out
    assert cli.main(["nothing"]) == 2 and "choose one of" in capsys.readouterr().err


def test_every_algorithm_is_tried():
    from mindspeed_cp.settings.algorithms import ALGORITHMS

    assert {name for name, _ in variants(7)} == set(ALGORITHMS)

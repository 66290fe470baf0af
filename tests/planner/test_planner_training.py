"""The planner of whole trainings: what fits, how its parts add up, and what the launch scripts take of it."""

import dataclasses
import json
from math import inf
from pathlib import Path

import pytest

from mindspeed_cp import ContextParallelConfig
from mindspeed_cp.plan import main
from mindspeed_cp.planner import fitting
from mindspeed_cp.planner.cluster import CLUSTERS, Cluster
from mindspeed_cp.planner.documents import boundaries
from mindspeed_cp.planner.fitting import Search, by_split, plans
from mindspeed_cp.planner.models import MODELS, ModelShape
from mindspeed_cp.planner.report import NONE, training_seconds
from mindspeed_cp.planner.search import variants
from mindspeed_cp.planner.split import Split, Work, splits
from mindspeed_cp.planner.stages import RECOMPUTES
from mindspeed_cp.planner.timing import timed, timeline, traced_ranks
from mindspeed_cp.planner.trace import Problem, trace
from mindspeed_cp.planner.training import attention, is_tight, planned, problem_of, utilization
from mindspeed_cp.settings.fields import KV_CACHE_POLICIES

ROOT = Path(__file__).resolve().parents[2]
TINY = ModelShape(4, 8, 8, 16, 16, 128, 512, 1000, gated=False, tied=True)
WORK = Work(TINY, 1024, 8)
UNIT = Cluster(
    4, flops=1e9, intra_bandwidth=1e9, inter_bandwidth=1e8, latency=0, compute_efficiency=1, link_efficiency=1,
    attention_efficiency=1,
)  # fmt: skip


def every_plan(work, devices, cluster, fixed):
    """Every way to train, with every setting and KV cache policy that the search of one layer has."""
    for split in splits(work, devices, cluster, fixed, {}):
        policies = KV_CACHE_POLICIES if split.cp > 1 else (None,)
        for candidate in attention(work, split, cluster, policies).candidates[: None if split.cp > 1 else 1]:
            for recompute in RECOMPUTES if split.cp > 1 else RECOMPUTES[:2]:
                yield planned(work, split, candidate, recompute, cluster)


def one(split, recompute="none", work=WORK):
    return planned(work, split, attention(work, split, UNIT).candidates[0], recompute, UNIT)


def test_memory_is_shared_out_by_every_kind_of_parallelism():
    alone, parameters = one(Split(1, 1, 1, 1)).memory, TINY.parameters - TINY.hidden  # the last norm is left out
    assert (alone.weights, alone.gradients, alone.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)
    norms = TINY.num_layers * 2 * TINY.hidden  # every tensor-parallel rank has them
    assert one(Split(2, 1, 1, 1)).memory.weights == alone.weights // 2 + norms
    assert one(Split(1, 1, 2, 1)).memory.optimizer == one(Split(1, 1, 1, 2)).memory.optimizer == alone.optimizer // 2
    assert one(Split(1, 1, 2, 1)).memory.activations == alone.activations // 2
    assert one(Split(1, 1, 2, 1)).memory.logits == alone.logits // 2
    # The first of two stages holds half the layers for two micro batches.
    assert one(Split(1, 2, 1, 1)).memory.activations == alone.activations
    assert one(Split(1, 2, 1, 1)).memory.logits == 0


def test_recomputation_trades_memory_for_time_and_kept_attention_lies_between():
    none, full, kept = (one(Split(1, 1, 2, 1), recompute) for recompute in RECOMPUTES)
    assert full.memory.total < kept.memory.total < none.memory.total
    assert none.step.compute < kept.step.compute < full.step.compute
    assert none.step.context == kept.step.context <= full.step.context
    layer = attention(WORK, Split(1, 1, 2, 1), UNIT).candidates[0]
    again = 8 * TINY.num_layers * layer.forward.compute  # of 8 micro batches
    assert full.step.compute - kept.step.compute == pytest.approx(again)


def test_a_step_on_one_device_is_its_flops():
    tokens, attention_area = 1024, 1024 * 1025 // 2
    layers = TINY.num_layers * (6 * tokens * TINY.dense_layer.total + 7 * 2 * attention_area * 8 * 16)
    flops = 8 * (layers + 6 * tokens * TINY.vocab * TINY.hidden)
    step = one(Split(1, 1, 1, 1)).step
    assert step.seconds == step.compute == pytest.approx(flops / 1e9)


def test_the_logits_of_the_last_stage_count_where_it_is_the_fuller():
    many = Work(dataclasses.replace(TINY, vocab=100_000), 1024, 8)
    memory = one(Split(1, 2, 1, 1), work=many).memory
    assert memory.logits == 1024 * 100_000 * 6
    assert memory.activations == one(Split(1, 1, 1, 1), work=many).memory.activations // 2


def test_attention_is_kept_with_context_parallelism_alone():
    some = splits(WORK, 2, UNIT, {"tp": 1, "pp": 1}, {})
    tried = {(option.split.cp, option.recompute) for option in Search(WORK, 1e12, UNIT).bounds(some)}
    assert tried == {(cp, recompute) for cp in (1, 2) for recompute in RECOMPUTES} - {(1, "full, attention kept")}


def test_a_size_that_does_not_divide_the_devices_is_named():
    with pytest.raises(ValueError, match="--devices 8 cannot be split .*--tp 3 must divide them"):
        plans(WORK, 8, 1e12, UNIT, {"tp": 3})


@pytest.mark.parametrize(
    "changes, seq_length, what, rule",
    [
        ({"ffn": 510}, 1024, "tp 4", "an MLP of width 510 must be divisible by it"),
        ({}, 1022, "tp 4 with some cp", "--seq-length 1022 must be divisible by --context-parallel-size 1 x"),
    ],
)
def test_a_rule_of_tensor_parallelism_is_an_exclusion(changes, seq_length, what, rule):
    excluded = {}
    work = Work(dataclasses.replace(TINY, **changes), seq_length, 8)
    assert {split.tp for split in splits(work, 4, UNIT, {"pp": 1}, excluded)} == {1, 2}
    assert excluded[what].startswith(rule)


@pytest.mark.parametrize("name", ["flops", "intra_bandwidth", "latency"])
def test_rates_are_finite(name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} inf must be .* finite"):
        dataclasses.replace(UNIT, **{name: float("inf")})


def test_all_that_is_found_fits_and_the_fastest_comes_first():
    limit = one(Split(1, 1, 1, 8)).memory.total
    found, excluded = plans(WORK, 8, limit, UNIT, {})
    assert max(plan.memory.total for plan in found) <= limit
    tight = [is_tight(plan, limit) for plan in found]
    assert tight == sorted(tight) and set(tight) == {False, True}, "those that leave a tenth free come first"
    for some in (found[: tight.index(True)], found[tight.index(True) :]):
        assert [plan.step.seconds for plan in some] == sorted(plan.step.seconds for plan in some)
    assert all(plan.split.tp * plan.split.pp * plan.split.cp * plan.split.dp == 8 for plan in found)
    assert "leave the node of 4" in excluded["tp 8"] and "4 layers" in excluded["pp 8"]


def test_too_few_tokens_for_a_rank_are_searched_where_they_are_asked_for():
    _, excluded = plans(WORK, 8, 1e12, UNIT, {"tp": 1, "pp": 1})
    assert excluded["cp 8"].startswith("a rank would have fewer than 256 tokens") and "cp 4" not in excluded
    found, excluded = plans(WORK, 8, 1e12, UNIT, {"tp": 1, "pp": 1, "cp": 8})
    assert {plan.split.cp for plan in found} == {8} and "cp 8" not in excluded


def test_what_fits_nowhere_says_how_much_is_missing():
    found, excluded = plans(WORK, 2, 1e6, UNIT, {"tp": 1})
    assert found == [] and "the least that is needed is 0.0 GB" in excluded["everything"]
    with pytest.raises(ValueError, match="--devices 3 cannot be split .*dp 3: --global-batch 8 is not a multiple of"):
        plans(WORK, 3, 1e12, UNIT, {"tp": 1, "pp": 1, "cp": 1})


# Pins of what the model of the cluster says today, no evidence that it is right.
GOLDEN = {
    "ascend-910b": ("llama2-7b", 32768, {"tp": 2, "pp": 1}, "Ulysses"),
    "a100": ("llama2-7b", 2048, {"tp": 1, "pp": 1}, "Ulysses"),
    "h100": ("qwen-14b", 131072, {"tp": 8, "pp": 1}, "Ring"),
}


@pytest.mark.parametrize("cluster", GOLDEN)
def test_the_fastest_of_a_cluster_and_its_reason(cluster, capsys):
    model, seq_length, fixed, algorithm = GOLDEN[cluster]
    sizes = [word for name, size in fixed.items() for word in (f"--{name}", str(size))]
    arguments = ["--model", model, "--devices", "16", "--cp", "4" if fixed["tp"] < 8 else "2", *sizes]
    assert main([*arguments, "--seq-length", str(seq_length), "--cluster", cluster, "--memory", "80e9", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["plans"][0]
    assert best["setting"].startswith(algorithm) and best["recompute"] in RECOMPUTES
    assert best["memory_bytes"]["total"] <= 80e9 and best["tokens_per_second"] > 0
    assert "hidden behind" in best["reason"] or "are not hidden" in best["reason"]
    assert "--context-parallel-size" in best["flags"]


def test_the_shell_gets_variables_of_the_launch_scripts(capsys):
    arguments = ["--model", "gpt3-125m", "--devices", "2", "--cp", "2", "--seq-length", "4096", "--cluster", "a100"]
    assert main([*arguments, "--shell"]) == 0
    lines = dict(line.split("=") for line in capsys.readouterr().out.splitlines())
    assert lines["CP"] == "2" and lines["TP"] == lines["PP"] == "1" and lines["CP_ALGO"].endswith("_cp_algo")


def test_wrong_combinations_of_flags_are_named(capsys):
    common = ["--model", "llama2-7b", "--seq-length", "64", "--cluster", "a100"]
    for more, words in (([], "--cp is not given"), (["--cp", "2", "--pp", "2"], "give --devices")):
        assert main([*common, *more]) == 2 and words in capsys.readouterr().err
    assert main([*common, "--devices", "0"]) == 2 and "--devices 0" in capsys.readouterr().err


def test_parameters_of_named_models_fit_their_devices():
    """LLaMA2 7B: 6.7e9 parameters of 18 bytes each need two devices of 64 GB at least."""
    split = Split(1, 1, 1, 1)
    work = Work(MODELS["llama2-7b"], 4096, 1)
    cluster = CLUSTERS["ascend-910b"]
    memory = planned(work, split, attention(work, split, cluster).candidates[0], "full", cluster).memory
    assert 121e9 < memory.weights + memory.gradients + memory.optimizer < 122e9


def test_a_policy_spends_memory_on_time_where_there_is_memory():
    """The network is slow; backward then waits for every key and value that was not kept."""
    slow = dataclasses.replace(UNIT, flops=1e13)
    work = Work(dataclasses.replace(TINY, num_kv_heads=1), 4096, 8)
    fixed = {"tp": 1, "pp": 1, "cp": 8}
    rich = plans(work, 8, 1e12, slow, fixed, most=1)[0][0]
    assert rich.attention.config.kv_cache_policy == "full"
    config = dataclasses.replace(rich.attention.config, kv_cache_policy=None)
    without = planned(work, rich.split, timed(config, problem_of(work, rich.split), slow), "full", slow)
    poor = plans(work, 8, without.memory.total, slow, fixed, most=1)[0][0]
    assert poor.memory.total < rich.memory.total and poor.attention.config.kv_cache_policy != "full"
    assert poor.step.context > rich.step.context


@pytest.mark.parametrize(
    ("documents", "links"),
    [
        (None, UNIT),
        (None, dataclasses.replace(UNIT, links=3, inter_bandwidth=3e7)),
        (boundaries("uniform:100,400", 1024), UNIT),
    ],
    ids=["one", "mesh", "packed"],
)
def test_no_plan_is_missed_by_tracing_only_what_may_be_the_fastest(documents, links):
    work = Work(TINY, 1024, 8, documents=documents)
    fixed, limit = {"tp": 1, "pp": 1}, one(Split(1, 1, 1, 8)).memory.total
    found, _ = plans(work, 8, limit, links, fixed, most=5)
    best: dict[tuple, float] = {}
    for plan in every_plan(work, 8, links, fixed):
        if plan.memory.total <= limit:
            kind = plan.split, is_tight(plan, limit)
            best[kind] = min(plan.step.seconds, best.get(kind, inf))
    # What is slower than a plan of its split that leaves memory free is not a plan of its own.
    kinds = {kind for kind in best if not kind[1] or best[kind] < best.get((kind[0], False), inf)}
    assert {(plan.split, is_tight(plan, limit)) for plan in found} == kinds and len(kinds) >= 3
    for plan in found:  # a hundredth of attention's time may still wait
        assert plan.step.seconds <= best[plan.split, is_tight(plan, limit)] * 1.01


def test_of_each_split_the_fastest_is_listed_and_of_a_single_split_its_settings():
    found, _ = plans(WORK, 8, 1e12, UNIT, {"tp": 1})
    kinds = [by_split(plan.split, plan.recompute, None) for plan in found]
    assert len(set(kinds)) == len(kinds) > 3
    some, _ = plans(WORK, 8, 1e12, UNIT, {"tp": 1, "pp": 1, "cp": 8})
    assert len({plan.split for plan in some}) == 1
    settings = [(plan.recompute, plan.attention.config.hierarchy) for plan in some]
    assert len(set(settings)) == len(settings) > 5


def test_groups_of_heads_double_as_long_as_that_is_faster():
    work, fixed = Work(MODELS["llama2-7b"], 131072, 32), {"tp": 1, "pp": 2, "cp": 8}
    for share, groups in ((4, 1), (1, 2), (1 / 4, 4)):  # of the links' rate
        cluster = dataclasses.replace(CLUSTERS["ascend-910b"], intra_bandwidth=share * 28e9)
        best = plans(work, 16, 80e9, cluster, fixed, most=1)[0][0].attention.config
        assert (best.algorithm, best.ulysses_chunks) == ("ulysses_cp_algo", groups)


def test_documents_are_planned_with_the_layout_that_megatron_can_cut():
    documents = boundaries("pareto:20,0.9", 1024)
    fixed = {"tp": 1, "pp": 1, "cp": 8}
    packed = Work(TINY, 1024, 8, documents=documents)
    assert "--cp-batch-layout balanced" not in plans(packed, 8, 1e12, UNIT, fixed, most=1)[1]
    tried = attention(packed, Split(1, 1, 8, 1), UNIT).candidates
    assert any(candidate.config.batch_layout == "balanced" for candidate in tried)
    # Where links are fast, Ulysses is ahead: its ranks compute exactly alike, and those of the balanced layout up to
    # 1.05 of the mean.
    slow = dataclasses.replace(UNIT, inter_bandwidth=2e7)
    best, whole = (plans(work, 8, 1e12, slow, fixed, most=1)[0][0] for work in (packed, WORK))
    assert best.step.seconds < whole.step.seconds and best.attention.config.kv_exchange == "direct"
    rows = boundaries("pareto:20,0.9", 1024, rows=2)
    for work, fixed in (
        (Work(TINY, 1024, 8, 2, documents=rows), {"tp": 1, "pp": 1, "cp": 4}),
        (Work(TINY, 1024, 8, documents=documents), {"tp": 1, "pp": 2, "cp": 4}),
    ):
        found, excluded = plans(work, 8, 1e12, UNIT, fixed)
        assert "use --micro-batch 1 and --pp 1" in excluded["--cp-batch-layout balanced"]
        assert found and all(plan.attention.config.batch_layout == "auto" for plan in found)


@pytest.mark.parametrize("source", ["lognormal:4,1.3", "pareto:20,0.9", "uniform:10,900"])
def test_the_ranks_that_are_traced_hold_the_slowest(source):
    documents = boundaries(source, 2048)
    for setting in ({}, {"kv_exchange": "direct"}, {"kv_exchange": "direct", "batch_layout": "balanced"}):
        config = ContextParallelConfig(context_parallel_size=16, algorithm="megatron_cp_algo", **setting)
        problem = Problem(2048, 8, 8, 16, 16, cu_seqlens=documents)
        some = traced_ranks(config, problem, UNIT)
        assert len(some) <= 8

        def seconds(rank, config=config, problem=problem):
            passes = trace(config, problem, rank)
            return sum(timeline(each.events, UNIT, rank).seconds for each in passes)

        assert max(map(seconds, some)) >= 0.97 * max(map(seconds, range(16)))


def test_a_line_of_the_picture_ends_where_nothing_fits():
    limit = one(Split(1, 1, 8, 1)).memory.total
    every = training_seconds(WORK, 8, 1e12, UNIT, {"tp": 1})
    some = training_seconds(WORK, 8, limit, UNIT, {"tp": 1})
    assert NONE in every and NONE not in some and set(some) < set(every)
    assert {"Ring", "Ulysses", "Hybrid", "KV all-gather"} <= set(every)
    assert min(every.values()) == plans(WORK, 8, 1e12, UNIT, {"tp": 1}, most=1)[0][0].step.seconds


def long_work():
    return Work(dataclasses.replace(TINY, num_layers=8), 1024, 8)


def test_the_launch_scripts_never_get_a_plan_that_fills_the_memory(capsys):
    arguments = ["--model", "gpt3-125m", "--devices", "2", "--cp", "2", "--tp", "1", "--pp", "1", "--seq-length", "4k"]
    arguments += ["--cluster", "a100", "--json"]
    assert main(arguments) == 0
    needed = min(plan["memory_bytes"]["total"] for plan in json.loads(capsys.readouterr().out)["plans"])
    enough, little = (f"{needed / share:.0f}" for share in (0.89, 0.95))
    assert main([*arguments[:-1], "--memory", enough, "--shell"]) == 0 and "CP=2" in capsys.readouterr().out
    assert main([*arguments[:-1], "--memory", little, "--shell"]) == 1
    assert "nothing leaves a tenth of the memory free" in capsys.readouterr().err
    assert main([*arguments[:-1], "--memory", little]) == 0
    assert "; above 90% of the device's, which may not suffice" in capsys.readouterr().out


def test_memory_is_that_of_the_cluster_unless_it_is_given(capsys):
    arguments = ["--model", "gpt3-125m", "--devices", "1", "--seq-length", "512", "--json"]
    for cluster, memory in (("h100", 80e9), ("ascend-910b", 64e9)):
        assert main([*arguments, "--cluster", cluster]) == 0
        assert json.loads(capsys.readouterr().out)["cluster"]["memory"] == memory


def test_dominated_splits_are_cut_before_they_are_traced(monkeypatch):
    searched, traced = set(), []
    settings, timed_before = Search._settings, fitting.timed
    monkeypatch.setattr(Search, "_settings", lambda self, option: searched.add(option.split) or settings(self, option))
    monkeypatch.setattr(fitting, "timed", lambda *given: traced.append(given[0]) or timed_before(*given))
    work = Work(dataclasses.replace(TINY, num_layers=8, vocab=1 << 14), 4096, 64)
    found, _ = plans(work, 64, 1e12, UNIT, {}, most=3)
    every = list(splits(work, 64, UNIT, {}, {}))
    assert found and len(searched) < len(every) / 3
    # None of those that were cut is faster: their bound is above what was found.
    worst = max(plan.step.seconds for plan in found)
    for option in Search(work, 1e12, UNIT).bounds(split for split in every if split not in searched):
        assert option.step.seconds >= worst * (1 - 1e-9)
    # Nor is every setting of those that were not.
    assert len(set(traced)) < len(list(variants(max(split.cp for split in searched)))) / 3


def test_a_model_with_windows_computes_them_in_their_share_of_the_layers():
    windowed = dataclasses.replace(TINY, window=64, windowed_share=0.75)
    whole, mixed = (
        attention(Work(model, 1024, 8), Split(1, 1, 1, 1), UNIT).candidates[0].compute for model in (TINY, windowed)
    )
    seen = 64 * 1024 - 64 * 63 // 2
    assert mixed == pytest.approx(whole * (0.25 + 0.75 * seen / (1024 * 1025 / 2)))


def test_utilization_is_what_training_needs_over_what_the_devices_could_do():
    plan = one(Split(1, 1, 1, 1))
    products, pairs = 6 * 1024 * TINY.parameters, TINY.num_layers * 1024 * 1025 // 2 * 8 * 16
    # The backward pass computes the scores again, which no figure of a model counts.
    assert utilization(WORK, plan, UNIT) == pytest.approx((products + 12 * pairs) / (products + 14 * pairs), rel=1e-3)
    every = utilization(WORK, plan, UNIT, causal=False)
    assert every == pytest.approx((products + 24 * pairs) / (products + 14 * pairs), rel=2e-3)
    again = one(Split(1, 1, 1, 1), "full")
    assert utilization(WORK, again, UNIT) < 0.8 * utilization(WORK, plan, UNIT)

"""Experts and latent attention in whole trainings: memory counts what is held, time what a token visits."""

import dataclasses
import json

import pytest
from distributed import run_ranks
from planner_runs import all_held_by_megatron
from test_planner_training import TINY, UNIT, one

from mindspeed_cp.plan import main
from mindspeed_cp.planner import stages as layers
from mindspeed_cp.planner.events import Product
from mindspeed_cp.planner.memory import most_bytes
from mindspeed_cp.planner.models import MODELS, Experts, Latent
from mindspeed_cp.planner.report import megatron_flags
from mindspeed_cp.planner.split import Split, Work, sizes, splits
from mindspeed_cp.planner.trace import trace
from mindspeed_cp.planner.training import attention, planned, problem_of
from mindspeed_cp.settings.config import ContextParallelConfig

EXPERTS = Experts(8, 2, 64, 32, (False, True, True, True))
MOE = dataclasses.replace(TINY, experts=EXPERTS, gated=True)
WORK = Work(MOE, 1024, 8)
ALONE = Split(1, 1, 1, 1, 1, 1)


def memory(split):
    return one(split, work=WORK).memory


def test_memory_counts_every_expert_and_time_those_that_a_token_visits():
    alone, held = one(ALONE, work=WORK), MOE.parameters - MOE.hidden
    assert (alone.memory.weights, alone.memory.optimizer) == (2 * held, 12 * held)
    tokens, area = 1024, 1024 * 1025 // 2
    visited = MOE.dense_layer.total + 3 * MOE.expert_layer.active
    flops = 8 * (6 * tokens * (visited + MOE.vocab * MOE.hidden) + 4 * 7 * 2 * area * 8 * 16)
    assert alone.step.seconds == alone.step.compute == pytest.approx(flops / 1e9)
    assert MOE.expert_layer.visited * 4 == MOE.expert_layer.routed


def test_experts_are_shared_out_by_expert_parallelism_alone():
    routed, shared = 3 * MOE.expert_layer.routed, memory(Split(1, 1, 1, 4, 1, 1))
    parted = memory(Split(1, 1, 1, 4, 4, 1))
    assert shared.weights - parted.weights == 2 * (routed - routed // 4)
    # Expert data parallelism shares the states of an expert: every rank holds a fourth of all of them either way.
    assert shared.optimizer == parted.optimizer
    assert Split(2, 1, 2, 2, 4, 1).edp == 2 and Split(2, 2, 2, 2, 2, 2).edp == 2
    within = memory(Split(2, 1, 1, 2, 2, 2)).weights
    assert (
        within
        == memory(Split(2, 1, 1, 2, 4, 1)).weights
        == memory(Split(2, 1, 1, 2, 1, 1)).weights - 2 * (routed - routed // 4)
    )


def test_tokens_travel_to_their_experts_within_and_between_nodes():
    row = 1024 * MOE.hidden * 2  # bytes of a micro batch
    near = layers.forward(WORK, Split(1, 1, 1, 8, 4, 1), UNIT, True)
    assert near.expert == pytest.approx(2 * 2 * row * 3 / 4 / 1e9) and near.tensor == 0
    far = layers.forward(WORK, Split(1, 1, 1, 8, 8, 1), UNIT, True)
    assert far.expert == pytest.approx(2 * 2 * row * 4 / 8 / 1e8)
    assert layers.forward(WORK, Split(1, 1, 1, 8, 8, 1), UNIT, False).expert == 0
    # Attention, the shared experts, and what two ranks of one expert gather of each other's tokens.
    both = layers.forward(WORK, Split(2, 1, 1, 4, 4, 2), UNIT, True)
    assert both.tensor == pytest.approx((4 * row / 2 + 2 * 2 * row / 2) / 1e9)
    assert one(Split(1, 1, 1, 8, 4, 1), work=WORK).step.expert == pytest.approx(3 * 2 * near.expert)


def test_the_fullest_and_slowest_stage_is_found_where_dense_layers_come_first():
    wide = dataclasses.replace(MOE, experts=dataclasses.replace(EXPERTS, ffn=512))
    split, few = Split(1, 2, 1, 1, 1, 1), Work(wide, 64, 8)
    found, first = one(split, work=few), dataclasses.replace(wide.experts, layers=(False, True) * 2)
    # Tied: both stages hold the table. The first has one layer with experts, the second two.
    assert found.memory.weights == 2 * (2 * wide.expert_layer.total + wide.vocab * wide.hidden)
    even = one(split, work=dataclasses.replace(few, model=dataclasses.replace(wide, experts=first)))
    assert found.step.compute > even.step.compute


def test_the_launch_scripts_get_equal_stages_alone(capsys):
    sizes = ["--devices", "2", "--pp", "2", "--seq-length", "1024", "--memory", "1e12", "--cluster", "a100", "--shell"]
    odd = "--num-layers 3 --hidden-size 64 --num-attention-heads 4 --vocab-size 128"
    assert main([*sizes, "--", *odd.split()]) == 1
    assert "nothing fits: in equal stages" in capsys.readouterr().err
    for line, what in ((["--model", "mixtral-8x7b"], "experts"), (["--model", "gpt3-125m", *DOCUMENTS], "--documents")):
        assert main([*sizes, *line]) == 2 and f"--shell has no variables for {what}" in capsys.readouterr().err


def test_the_last_stage_may_be_shorter_as_61_layers_need_it():
    model = MODELS["deepseek-v3"]
    assert [model.stage(number, 16) for number in (0, 1, 14, 15)] == [(3, 1), (0, 4), (0, 4), (0, 1)]
    assert sum(sum(model.stage(number, 16)) for number in range(16)) == 61
    cluster, excluded = dataclasses.replace(UNIT, devices_per_node=8), {}
    found = list(splits(Work(model, 4096, 64), 64, cluster, {"tp": 1, "cp": 1, "ep": 2}, excluded))
    assert {split.pp: split.last_layers for split in found} == {1: 0, 2: 30, 4: 13, 8: 5, 16: 1}
    assert "61 layers" in excluded["pp 32"] and sizes(found[-1]).endswith("etp 1, last layers 1")
    plan = planned(WORK, Split(1, 2, 1, 1, 1, 1, 1), attention(WORK, ALONE, UNIT).candidates[0], "none", UNIT)
    assert "--decoder-last-pipeline-num-layers 1 " in megatron_flags(plan) + " "


DOCUMENTS = ["--documents", "uniform:9,99"]
RULES = [
    ({"ep": 3}, "ep 3", "8 experts must be divisible by it"),
    ({"ep": 8}, "ep 8 x etp 1", "4 devices of a stage must be divisible by it"),
    ({"tp": 4, "etp": 4}, "etp 4", "experts of width 66 must be divisible by it"),
]


@pytest.mark.parametrize("fixed, what, rule", RULES, ids=[what for _, what, _ in RULES])
def test_a_rule_of_megatron_for_experts_is_an_exclusion(fixed, what, rule):
    model = dataclasses.replace(MOE, experts=dataclasses.replace(EXPERTS, ffn=66))
    excluded = {}
    with pytest.raises(ValueError, match=rule):
        list(splits(Work(model, 1024, 8), 4, UNIT, {"pp": 1, **fixed}, excluded))
    assert excluded[what] == rule


def test_experts_with_biases_are_not_split_and_dense_models_have_none():
    biased = Work(dataclasses.replace(MOE, experts=dataclasses.replace(EXPERTS, bias=True)), 1024, 8)
    excluded = {}
    assert {split.etp for split in splits(biased, 4, UNIT, {"tp": 2}, excluded)} == {1}
    assert "--disable-bias-linear" in excluded["etp 2"]
    assert {split.etp for split in splits(WORK, 4, UNIT, {"tp": 2}, {})} == {1, 2}
    with pytest.raises(ValueError, match="ep 2: the model has no experts"):
        list(splits(Work(TINY, 1024, 8), 4, UNIT, {"ep": 2}, {}))


def test_latent_attention_is_what_the_engine_sees():
    work = Work(MODELS["deepseek-v3"], 4096, 8)
    problem = problem_of(work, Split(8, 1, 2, 1, 1, 1))
    assert (problem.heads, problem.kv_heads, problem.dk, problem.dv) == (16, 16, 192, 128)
    model = MODELS["deepseek-v3"]
    whole, alone = (layers.held(work, Split(tp, 1, 2, 1, 1, 1), False).parameters for tp in (8, 1))
    down = model.hidden * (1536 + 512 + 64) + 1536 + 512 + 2 * model.hidden  # every tensor-parallel rank has them
    assert whole - down == (alone - down) // 8


def test_latent_attention_gathers_its_low_ranks():
    split, row = Split(2, 1, 1, 4, 1, 1), 1024 * 2 / 2 / 1e9  # what a rank sends of one column, in seconds
    for q_rank, gathered in ((16, 16 + 24 + 4), (0, MOE.hidden + 24 + 4)):
        model = dataclasses.replace(TINY, latent=Latent(q_rank, 24, 4))
        dense = layers.forward(Work(model, 1024, 8), split, UNIT, False)
        assert dense.tensor == pytest.approx((gathered + 3 * TINY.hidden) * row)


def planned_json(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def exchanged(plan):
    return plan["step_seconds"]["tensor"] + plan["step_seconds"]["expert"]


# Pins of what the model of the cluster says today, no evidence that it is right.
def test_mixtral_has_an_expert_on_each_device_of_a_node(capsys):
    sizes = ["--tp", "2", "--pp", "2", "--cp", "4", "--seq-length", "32768", "--memory", "80e9"]
    arguments = ["--model", "mixtral-8x7b", "--devices", "32", *sizes, "--cluster", "h100"]
    found = planned_json(capsys, *arguments)
    best = found["plans"][0]
    sizes = {"tp": 2, "pp": 2, "cp": 4, "dp": 2, "ep": 8, "etp": 1, "last_layers": 0}
    assert sizes.items() <= best["split"].items() and best["setting"].startswith("Ulysses")
    flags = "--expert-model-parallel-size 8 --expert-tensor-parallel-size 1 --moe-token-dispatcher-type alltoall "
    assert flags in best["flags"]
    # Sharing an expert between the ranks of tp gathers every token twice; ep 8 x etp 2 leaves the node too.
    others = [planned_json(capsys, *arguments, "--ep", ep, "--etp", "2")["plans"][0] for ep in ("4", "8")]
    assert [(plan["split"]["ep"], plan["split"]["etp"]) for plan in others] == [(4, 2), (8, 2)]
    assert exchanged(best) < exchanged(others[0]) < exchanged(others[1])
    assert found["excluded"]["ep 16"] == "8 experts must be divisible by it"
    assert found["parameters"] == {"total": 46702792704, "active": 12879925248}


def test_deepseek_keeps_its_tokens_within_a_node_and_hides_the_ring_behind_latent_attention(capsys):
    sizes = ["--tp", "1", "--pp", "1", "--cp", "8", "--seq-length", "65536"]
    arguments = ["--model", "deepseek-v2-lite", "--devices", "16", *sizes, "--cluster", "ascend-910b"]
    every, others = (planned_json(capsys, *arguments, *ep)["plans"] for ep in ([], ["--ep", "16"]))
    best, far = every[0], others[0]
    # On a mesh the all-to-all has all links.
    assert (best["split"]["ep"], best["setting"][:8]) == (8, "Ulysses,")
    assert far["step_seconds"]["expert"] > 2 * best["step_seconds"]["expert"]
    assert far["memory_bytes"]["weights"] < best["memory_bytes"]["weights"]
    ring = 7 * 8192 * (512 + 64) * 2 * 3
    setting = "Ring, cp=8, zigzag, causal, direct exchange, MLA sends latents"
    layer = planned_json(capsys, "--model", "deepseek-v2-lite", *sizes[4:], "--cluster", "ascend-910b")["candidates"]
    direct = next(row for row in layer if row["setting"] == setting)
    assert f"sends {ring * 5 / 6 / 1e6:,.0f} MB within" in direct["reason"]  # of the busiest rank


def test_latent_attention_is_counted_by_what_travels_and_what_is_repeated():
    problem = problem_of(Work(MODELS["deepseek-v3"], 64, 8), Split(8, 1, 4, 1, 1, 1))
    products, local = 2 * 512 * 16 * (128 + 128), 16  # FLOPs of a token's up-projection
    sizes = {"megatron_cp_algo": 3 * 576, "ulysses_cp_algo": 3 * 576, "kvallgather_cp_algo": 3 * 576}
    # Beyond the layer's own projection: of others' rows forward; backward of all again, and twice of others'.
    repeated = {"megatron_cp_algo": (3, 4 + 2 * 3), "ulysses_cp_algo": (0, 1), "kvallgather_cp_algo": (3, 4 + 2 * 3)}
    for algorithm, elements in sizes.items():
        how = dict(context_parallel_size=4, algorithm=algorithm, attention_mask_type="full")
        config = ContextParallelConfig(**how, mla_exchange="latent")
        for rank in range(4):
            passes = trace(config, problem, rank)
            assert passes[0].traffic["kv"] == local * elements * 2
            assert passes[1].traffic["dkv"] == local * elements * 2
            flops = [sum(e.flops for e in each.events if isinstance(e, Product)) for each in passes]
            assert flops == [times * local * products for times in repeated[algorithm]], algorithm
        heads = trace(ContextParallelConfig(**how, mla_exchange="heads"), problem, 0)
        assert not [event for each in heads for event in each.events if isinstance(event, Product)]
        ulysses = algorithm == "ulysses_cp_algo"
        assert heads[0].traffic["kv"] == 3 * local * 16 * (192 + 128) * 2 // (4 if ulysses else 1)
    kept = {
        form: most_bytes(ContextParallelConfig(**how, mla_exchange=form), problem).saved for form in ("latent", "heads")
    }
    assert kept["heads"] - kept["latent"] == local * (16 * (192 + 128) - 576) * 2


GATED = {"moe_shared_expert_intermediate_size": 24, "moe_layer_freq": [0, 1], "num_moe_experts": 8}
COMMON = {"moe_ffn_hidden_size": 16, "moe_router_topk": 2, "ffn_hidden_size": 64}
LATENT = {
    "multi_latent_attention": True, "q_lora_rank": 16, "kv_lora_rank": 24, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6, "rope_type": "rope", "qk_layernorm": True,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_ranks_of_megatrons_own_models_hold_what_is_predicted():
    experts = Experts(8, 2, 16, 24, (False, True))
    grouped = dataclasses.replace(
        TINY, num_layers=2, num_heads=4, num_kv_heads=2, dk=8, dv=8, hidden=32, ffn=64, experts=experts, gated=True
    )
    latent = dataclasses.replace(grouped, num_kv_heads=4, dk=12, dv=6, latent=Latent(16, 24, 4))
    grouping = {"num_query_groups": 2}
    runs = [(grouped, grouping, 2, 2, 1), (grouped, grouping, 2, 1, 2), (latent, LATENT, 1, 2, 1)]
    asked, predicted = [], []
    for model, settings, tp, ep, etp in runs:
        split, work = Split(tp, 1, 1, 2 // tp, ep, etp), Work(model, 64, 8)
        kinds = [layers.held(work, split, kind) for kind in (False, True)]
        predicted.append((sum(kind.parameters for kind in kinds), sum(kind.routed for kind in kinds)))
        asked.append((COMMON | GATED | settings, model.latent is not None, tp, ep, etp))
    imported = ("megatron.core.models.gpt.gpt_layer_specs",)
    assert run_ranks(2, all_held_by_megatron, asked, fresh=True, imported=imported) == [predicted] * 2

"""The planner takes Megatron's own flags, or a launch command, for a model and the sizes of its training."""

import dataclasses
import shlex

import pytest

from mindspeed_cp.plan import main
from mindspeed_cp.planner import given, megatron_flags
from mindspeed_cp.planner.models import MODELS

LLAMA = "--swiglu --untie-embeddings-and-output-weights --disable-bias-linear --position-embedding-type rope --lr 1e-4"
FLAGS = {
    "llama2-70b": f"--num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64 {LLAMA} "
    "--group-query-attention --num-query-groups 8 --vocab-size=32000",
    "gpt3-175b": "--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --vocab-size 50257",
    "mixtral-8x7b": f"--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 {LLAMA} "
    "--group-query-attention --num-query-groups 8 --vocab-size 32000 --num-experts 8",
    "qwen3-30b-a3b": f"--num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 32 {LLAMA} "
    "--group-query-attention --num-query-groups 4 --kv-channels 128 --vocab-size 151936 --num-experts 128 "
    "--moe-router-topk 8 --moe-ffn-hidden-size 768",
    "deepseek-v3": f"--num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128 {LLAMA} "
    "--vocab-size 129280 --multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --num-experts 256 "
    "--moe-router-topk 8 --moe-ffn-hidden-size 2048 --moe-shared-expert-intermediate-size 2048 "
    "--moe-layer-freq ([0]*3+[1]*58)",
    "qwen3-next-80b-a3b": f"--num-layers 48 --hidden-size 2048 --ffn-hidden-size 5120 --num-attention-heads 16 {LLAMA} "
    "--group-query-attention --num-query-groups 2 --kv-channels 256 --vocab-size 151936 --attention-output-gate "
    "--experimental-attention-variant gated_delta_net --linear-attention-freq 4 --num-experts 512 "
    "--moe-router-topk 10 --moe-ffn-hidden-size 512 --moe-shared-expert-intermediate-size 512",
}
FLAGS["deepseek-v3.2"] = (
    f"{FLAGS['deepseek-v3']} --experimental-attention-variant dsa --dsa-indexer-n-heads 64 --dsa-indexer-head-dim 128 "
    "--dsa-indexer-topk 2048"
)
ROPE = ("--position-embedding-type", "rope")
SMALL = "--num-layers 4 --hidden-size 1024 --num-attention-heads 16 --vocab-size 1000".split()


@pytest.mark.parametrize("name", FLAGS)
def test_megatrons_flags_describe_the_named_model(name):
    assert megatron_flags.read(FLAGS[name].split()).model() == MODELS[name]


def test_defaults_are_megatrons():
    model = megatron_flags.read(SMALL).model()
    assert (model.ffn, model.dk, model.num_kv_heads, model.gated, model.tied) == (4096, 64, 16, False, True)
    assert megatron_flags.read([*SMALL, "--swiglu"]).model().ffn == 2688  # two thirds of 4096, in steps of 64
    assert megatron_flags.read([*SMALL, "--num-query-groups", "2"]).model().num_kv_heads == 16  # without its switch
    assert model.learned_positions and not megatron_flags.read([*SMALL, *ROPE]).model().learned_positions
    latent = megatron_flags.read([*SMALL, "--multi-latent-attention", "--num-query-groups", "2"]).model()
    assert (latent.dk, latent.dv, latent.num_kv_heads, latent.latent.q_rank, latent.latent.kv_rank) == (
        192, 128, 16, 0, 32,
    )  # fmt: skip
    experts = megatron_flags.read([*SMALL, "--num-experts", "8"]).model().experts
    assert (experts.topk, experts.ffn, experts.shared_ffn, experts.bias) == (2, 4096, 0, True)


@pytest.mark.parametrize(
    "text, layers",
    [("1", "1111"), ("2", "1010"), ("([0]+[1]*3)", "0111"), ("'([0]*1+[1]*1)*2'", "0101"), ("[1, 0, 0, 1]", "1001")],
)
def test_a_pattern_of_layers_is_megatrons(text, layers):
    assert megatron_flags.layer_pattern(text, 4) == tuple(digit == "1" for digit in layers)


@pytest.mark.parametrize("text", ["0", "[1]*3", "[2]*4", "__import__('os')", "[1]*9**9", "[1]*99999999", "[", ""])
def test_a_wrong_pattern_is_named(text):
    with pytest.raises(ValueError, match="--moe-layer-freq "):
        megatron_flags.layer_pattern(text, 4)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--num-layers 4", "--hidden-size, --num-attention-heads, --vocab-size not given"),
        ([*SMALL, "--mtp-num-layers", "1"], "--mtp-num-layers is not known to the planner"),
        ([*SMALL, "--experimental-attention-variant", "mine"], "variant mine is not known to the planner"),
        ([*SMALL, "--experimental-attention-variant", "gated_delta_net"], "needs --linear-attention-freq"),
        ([*SMALL, "--experimental-attention-variant", "dsa"], "needs --multi-latent-attention, --dsa-indexer-n-heads"),
        ([*SMALL, "--hidden-size", "1000"], "--hidden-size 1000 must be divisible by --num-attention-heads 16"),
        ([*SMALL, "--ffn-hidden-size", "0"], "--ffn-hidden-size 0 must be at least 1"),
        ([*SMALL, "--num-layers", "four"], "--num-layers"),
        ([*SMALL, "--num-experts", "2", "--moe-router-topk", "4"], "--moe-router-topk: 4 experts"),
    ],
)
def test_what_does_not_describe_a_model_is_named(flags, words):
    with pytest.raises(ValueError, match=words):
        megatron_flags.read(flags.split() if isinstance(flags, str) else flags).model()


SIZES = "--seq-length 8192 --micro-batch-size 2 --global-batch-size 16 --tensor-model-parallel-size 2 " + (
    "--context-parallel-size 4 --expert-model-parallel-size 8 --cp-attention-mask-type full"
)


def test_sizes_of_the_line_stay_unless_the_planners_flags_say_otherwise():
    found = given.read(["--cp", "2", "--devices", "8", "--", *SMALL, *SIZES.split()])
    assert (found.seq_length, found.micro_batch, found.global_batch, found.mask_type) == (8192, 2, 16, "full")
    assert (found.tp, found.cp, found.ep, found.pp, found.etp, found.devices) == (2, 2, 8, None, None, 8)
    assert given.read(["--mask-type", "causal", "--", *SMALL, *SIZES.split()]).mask_type == "causal"


@pytest.mark.parametrize("behind", [True, False], ids=["behind --", "--launch"])
def test_a_launch_command_says_how_many_devices(behind):
    command = f"torchrun --nnodes 2 --nproc-per-node 8 pretrain_gpt.py {shlex.join(SMALL)} {SIZES}"
    found = given.read(["--", *command.split()] if behind else ["--launch", command])
    assert (found.devices, found.cp, found.line.model().hidden) == (16, 4, 1024)
    layer = given.read(["--cp", "2", "--launch", command])
    assert (layer.devices, layer.cp) == (None, 2)


def test_a_line_and_a_launch_are_too_much(capsys):
    assert main(["--launch", "torchrun x.py", "--", *SMALL]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert main(["--model", "gpt3-125m", "--cp", "2", "--ep", "2", "--seq-length", "64", "--cluster", "a100"]) == 2
    assert "belong to a whole training" in capsys.readouterr().err


def test_the_line_is_planned_as_the_model_by_name(capsys):
    common = ["--cluster", "a100", "--cp", "2", "--seq-length", "4096"]
    assert main([*common, "--model", "llama2-70b", "--json"]) == 0
    by_name = capsys.readouterr().out
    assert main([*common, "--json", "--", *FLAGS["llama2-70b"].split()]) == 0
    assert capsys.readouterr().out == by_name


def test_biases_in_experts_are_read():
    with_bias = FLAGS["mixtral-8x7b"].replace("--disable-bias-linear", "").split()
    experts = dataclasses.replace(MODELS["mixtral-8x7b"].experts, bias=True)
    assert megatron_flags.read(with_bias).model().experts == experts


def test_layers_with_settings_of_their_own_are_read_and_said_not_to_be_planned():
    line = "--cp 4 -- --num-layers 2 --seq-length 64 --cp-layer-algo 0:megatron_cp_algo"
    (note,) = given.read(line.split()).notes
    assert "--cp-layer-algo 0:megatron_cp_algo is not planned" in note and "doctor --launch" in note

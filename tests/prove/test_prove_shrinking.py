"""A training command made small: what stays, what is left out, and what is said about it."""

import shlex

import pytest

from mindspeed_cp.prove import flags
from mindspeed_cp.prove.command import main
from mindspeed_cp.prove.shrinking import Wish, plan
from mindspeed_cp.prove.words import Words

LARGE = (
    "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --seq-length 32768 --micro-batch-size 4 "
    "--global-batch-size 512 --max-position-embeddings 32768 --lr 1e-4 --bf16 --context-parallel-size 8 "
)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "pretrain.py"
    path.write_text("from megatron.training import pretrain\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def small(script, tmp_path):
    """(command, **wish) -> (flags without context parallelism, flags with it, the plan)"""

    def make(command, **wish):
        found = plan(script, shlex.split(command), Wish(**wish), tmp_path)
        return Words(found.alone.flags), Words(found.shared.flags), found

    return make


def test_words_are_read_and_written_back():
    words = Words(["data", "--a=1", "--b", "2", "3", "--c", "--a", "-5"])
    assert words.values("--a") == ["-5"] and words.values("--b") == ["2", "3"] and words.values("--c") == []
    words.set("--a", 7)
    assert words.drop(["--c", "--d"]) == ["--c"]
    assert words.line() == ["data", "--b", "2", "3", "--a", "7"]
    assert words.copy().line() == words.line()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--num-layers many", "--num-layers many is not a whole number"),
        ("--context-parallel-size 0", "--context-parallel-size 0 must be at least 1"),
        ("--hidden-size -5", "--hidden-size -5 must be at least 1"),
    ],
)
def test_a_value_that_is_no_size_is_refused(small, command, message):
    with pytest.raises(ValueError, match=message):
        small(command)


def test_the_two_runs_differ_in_context_parallelism_alone(small):
    alone, shared, _ = small(
        LARGE + "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 4 --cp-kv-exchange auto"
    )
    ours = flags.of_context_parallelism()
    assert not set(alone.flags()) & ours
    assert shared.number("--context-parallel-size", 0) == 4 and shared.text("--ulysses-degree-in-cp") == "2"
    rest = shared.copy()
    rest.drop(ours)
    assert rest.line() == alone.line()


def test_nothing_of_the_user_is_written(small):
    files = "--save a --load b --tensorboard-dir c --wandb-project d --log-file e --data-cache-path f --data-path g"
    alone, shared, _ = small(LARGE + files, steps=2)
    for words in (alone, shared):
        assert not {"--save", "--load", "--tensorboard-dir", "--wandb-project", "--log-file"} & set(words.flags())
        assert words.text("--data-cache-path").endswith("/cache") and words.text("--data-path") == "g"
        assert words.text("--train-iters") == "2" and words.text("--hidden-dropout") == "0"


def test_sizes_keep_what_they_say_of_one_another(small):
    alone, _, found = small(
        LARGE + "--group-query-attention --num-query-groups 8 --kv-channels 128 --window-size 4096,0"
    )
    heads, groups = alone.number("--num-attention-heads", 0), alone.number("--num-query-groups", 0)
    assert heads == 4 * groups and groups == 2
    assert alone.number("--hidden-size", 0) == heads * alone.number("--kv-channels", 0)
    length = alone.number("--seq-length", 0)
    assert length == 128 and length % 4 == 0 and alone.text("--window-size") == "16,0"
    assert any("num-layers 32 -> 2" in line for line in found.changed)
    assert any(line.startswith("--bf16") for line in found.uncovered)


def test_replicated_heads_stay_replicated(small):
    """Of 2 KV heads on 8 ranks each was held by four; two ranks hold one together."""
    alone, _, _ = small(LARGE + "--group-query-attention --num-query-groups 2 --context-parallel-algo ulysses_cp_algo")
    assert alone.number("--num-query-groups", 0) < 2


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [
        ("--num-experts 64 --moe-layer-freq ([0]*3+[1]*29)", "--moe-layer-freq", "[0,1]"),
        ("--num-experts 64 --moe-router-topk 6", "--moe-router-topk", "2"),
        ("--hybrid-override-pattern M-M-M*-M-M*-", "--hybrid-override-pattern", "M-*"),
        ("--hybrid-layer-pattern MGE|*-|M-/M*/M*/M*", "--hybrid-layer-pattern", "MGE*-/M*/M*"),
        (
            "--hybrid-layer-pattern M-*-|M-*-|M-E-|M-E- --pipeline-model-parallel-size 2",
            "--hybrid-layer-pattern",
            "M|-|*|E",
        ),
        ("--hybrid-override-pattern M*", "--mamba-num-groups", "2"),
        ("--multi-latent-attention --v-head-dim 192", "--v-head-dim", "12"),
        ("--recompute-num-layers 8 --recompute-granularity full", "--recompute-num-layers", "1"),
        ("--mock-data --tokenizer-type NullTokenizer --vocab-size 128000", "--vocab-size", "4224"),
        ("--data-path text --tokenizer-type NullTokenizer --vocab-size 128000", "--vocab-size", "128000"),
        ("--seq-length 4097", "--seq-length", "125"),
        ("--seq-length 63 --context-parallel-size 3", "--seq-length", "58"),
        ("--reset-attention-mask", "--seq-length", "512"),
    ],
)
def test_every_kind_of_layer_and_batch_stays(small, command, flag, value):
    assert small(LARGE + command)[1].text(flag) == value


RING_DIRECT = "--context-parallel-algo megatron_cp_algo --cp-kv-exchange direct "


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [
        (RING_DIRECT + "--cp-layer-algo 5-/6:ulysses_cp_algo", "--cp-layer-algo", "1:ulysses_cp_algo"),
        (
            "--cp-layer-algo 0-15:megatron_cp_algo:cp-window-size=4,20-:hybrid_cp_algo:ulysses-degree-in-cp=4",
            "--cp-layer-algo",
            "0:megatron_cp_algo:cp-window-size=2,2:hybrid_cp_algo:ulysses-degree-in-cp=2",
        ),
        ("--window-attn-skip-freq 6 --cp-layer-algo 5-/6:ulysses_cp_algo", "--window-attn-skip-freq", "[1,0]"),
        ("--mtp-num-layers 1 --cp-layer-algo 32-:kvallgather_cp_algo", "--cp-layer-algo", "2:kvallgather_cp_algo"),
        (f"--cp-comm-type {'p2p ' * 16}{'a2a ' * 16}", "--cp-comm-type", "p2p a2a"),
        (
            "--hybrid-override-pattern M-*M-* --cp-layer-algo 2-:megatron_cp_algo",
            "--cp-layer-algo",
            "2:megatron_cp_algo",
        ),
    ],
)
def test_every_way_in_which_layers_share_a_sequence_stays(small, command, flag, value):
    alone, shared, _ = small(LARGE + command)
    assert shared.text(flag) == value
    assert "--cp-layer-algo" not in alone and "--cp-comm-type" not in alone


def test_a_window_of_layers_divides_the_ring_of_the_runs_algorithm(small):
    hybrid = "--context-parallel-size 32 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 4"
    _, shared, _ = small(f"{LARGE} {hybrid} --cp-layer-algo 0-:cp-window-size=4", cp=8, ranks=8)
    assert shared.text("--ulysses-degree-in-cp") == "4"
    assert shared.text("--cp-layer-algo") == "0:cp-window-size=2,1:cp-window-size=2"


def test_parallel_sizes_fit_into_the_ranks(small):
    command = (
        LARGE
        + "--tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 4 "
        + "--num-layers-per-virtual-pipeline-stage 2 --expert-model-parallel-size 4"
    )
    _, four, found = small(command)
    assert four.text("--pipeline-model-parallel-size") == "2" and four.text("--tensor-model-parallel-size") == "1"
    assert "--sequence-parallel" not in four and four.text("--num-layers") == "4"
    assert any("--ranks 8 keeps 2" in line for line in found.uncovered)
    _, eight, _ = small(command, ranks=8)
    assert eight.text("--tensor-model-parallel-size") == "2" and "--sequence-parallel" in eight
    assert eight.text("--num-layers-per-virtual-pipeline-stage") == "1" and "--expert-model-parallel-size" not in eight


def test_layers_of_every_kind_fill_all_stages(small):
    kinds = "--num-layers 3 --num-experts 4 --moe-layer-freq [0,1,0] --window-attn-skip-freq [1,1,0]"
    _, shared, _ = small(f"{LARGE} {kinds} --pipeline-model-parallel-size 3")
    assert shared.text("--pipeline-model-parallel-size") == "2" and shared.text("--num-layers") == "4"
    assert shared.text("--moe-layer-freq") == "[0,1,0,0]" and shared.text("--window-attn-skip-freq") == "[1,1,0,1]"


def test_real_sizes_stay(small):
    _, shared, _ = small(LARGE, real_sizes=True)
    assert shared.text("--num-layers") == "32" and shared.text("--seq-length") == "32768"
    assert shared.text("--train-iters") == "3"


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"cp": 1}, "--cp 1 compares a run with itself; give at least 2"),
        ({"cp": 8}, "--cp 8 needs as many --ranks, and they are 4; use --ranks 8"),
    ],
)
def test_what_does_not_fit_is_refused(small, wish, message):
    with pytest.raises(ValueError, match=message):
        small(LARGE, **wish)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no script is given"),
        (["missing.py"], "missing.py does not exist"),
        (["--steps", "0", "SCRIPT"], "--steps 0 must be at least 1"),
        (["SCRIPT", "--yaml-cfg", "a"], "--yaml-cfg a cannot be read"),
        (["SCRIPT", "--cp-config", "a"], "--cp-config a cannot be read"),
        (["--device", "cuda", "SCRIPT"], "--device cuda needs a device for each of --ranks 4, and torch sees 0"),
        (["--device", "npu", "--cp", "8", "SCRIPT"], "--device npu needs a device for each of --ranks 8"),
        (["ls", "-l"], "starts neither torchrun nor python"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(script, capsys, words, message):
    assert main([script if word == "SCRIPT" else word for word in words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_launcher_in_front_of_the_script_is_read(script):
    from mindspeed_cp.prove.command import script_of

    found = script_of(["env", "A=1", "torchrun", "--nproc-per-node", "8", script, "--num-layers", "4"])
    assert found == (script, ["--num-layers", "4"], {"A": "1"})


YAML = """
language_model: {num_layers: 24, hidden_size: 1024, num_attention_heads: 16, num_moe_experts: null,
  add_bias_linear: False, activation_func: swiglu, bias_swiglu_fusion: True, persist_layer_norm: False,
  init_method: null, layernorm_zero_centered_gamma: True}
model_parallel: {context_parallel_size: 4, sequence_parallel: True, tp_comm_split_ag: True, bf16: True}
seq_length: 4096
global_batch_size: 128
save: checkpoints
data_path: ${WHERE}/a b
profile_ranks: [0, 1]
"""


def test_a_yaml_file_of_megatrons_is_read_as_flags(small, tmp_path, monkeypatch):
    (file := tmp_path / "model.yaml").write_text(YAML, encoding="utf-8")
    monkeypatch.setenv("WHERE", "/data")
    alone, shared, found = small(f"--yaml-cfg {file} --context-parallel-algo megatron_cp_algo --seq-length 8192")
    assert "--yaml-cfg" not in shared and "--save" not in shared and shared.text("--num-layers") == "2"
    assert "--apply-layernorm-1p" not in shared and any("count from 1" in line for line in found.uncovered)
    assert {"--swiglu", "--disable-bias-linear", "--no-persist-layer-norm"} <= set(alone.flags())
    assert not {"--no-bias-swiglu-fusion", "--init-method", "--tp-comm-split-ag", "--num-experts"} & set(alone.flags())
    assert alone.values("--data-path") == ["/data/a", "b"] and alone.values("--profile-ranks") == ["0", "1"]
    assert shared.text("--context-parallel-size") == "2" and "--context-parallel-size" not in alone
    assert any("num-layers 24 -> 2" in line and "seq-length 8192" in " ".join(found.changed) for line in found.changed)


def test_a_yaml_file_of_mindformers_is_read_as_flags(small, tmp_path):
    text = "parallel_config: {context_parallel: 4, context_parallel_algo: ulysses_cp}\n"
    (file := tmp_path / "cp.yaml").write_text(text, encoding="utf-8")
    alone, shared, _ = small(f"--cp-config {file} --num-layers 4 --seq-length 4096")
    assert shared.text("--context-parallel-algo") == "ulysses_cp_algo" and "--cp-config" not in shared
    assert shared.text("--context-parallel-size") == "2" and "--context-parallel-algo" not in alone


def test_a_file_of_mindformers_need_not_name_an_algorithm(small, tmp_path):
    (file := tmp_path / "cp.yaml").write_text("parallel_config: {context_parallel: 1}\n", encoding="utf-8")
    _, shared, _ = small(f"--cp-config {file} --num-layers 4 --context-parallel-algo megatron_cp_algo")
    assert shared.text("--context-parallel-algo") == "megatron_cp_algo" and "--cp-config" not in shared


def test_a_file_is_read_with_the_variables_that_the_command_sets(script, tmp_path, monkeypatch, capsys):
    (file := tmp_path / "model.yaml").write_text("num_layers: ${LAYERS}\n", encoding="utf-8")
    monkeypatch.setenv("LAYERS", "2")
    assert main(["env", "LAYERS=many", "python", script, "--yaml-cfg", str(file)]) == 2
    assert "--num-layers many is not a whole number" in capsys.readouterr().err


def test_a_launch_script_is_read_as_the_doctor_reads_it(tmp_path, script):
    from mindspeed_cp.doctor.launch import MARKER
    from mindspeed_cp.prove.command import script_of

    (launch := tmp_path / "train.sh").write_text(
        f"""{MARKER}
if [[ -n $DRY_RUN ]]; then echo "# command"; echo "LEVEL=$LEVEL torchrun --nproc-per-node 8 {script} --num-layers 4"; fi
""",
        encoding="utf-8",
    )
    assert script_of(["env", "LEVEL=2", "bash", str(launch)])[:2] == (script, ["--num-layers", "4"])
    assert script_of(["env", "LEVEL=2", "bash", str(launch)])[2]["LEVEL"] == "2"

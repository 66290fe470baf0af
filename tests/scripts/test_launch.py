"""The launch scripts: what they print with DRY_RUN=1, and a tiny model of every architecture that trains with cp 2 as
with cp 1.
"""

import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
from distributed import free_port
from trainer_runs import REPOSITORY, prepare_data, run_argvs

from mindspeed_cp.planner.models import MODELS

LAUNCH = REPOSITORY / "scripts" / "launch"
FAMILIES = {
    "llama2": ("7b", "13b", "70b"),
    "qwen": ("7b", "14b", "72b"),
    "qwen1_5": ("7b", "14b", "72b"),
    "gpt3": ("1.3b", "13b", "175b"),
}
SIZES = [(family, size) for family, sizes in FAMILIES.items() for size in sizes]

pytestmark = pytest.mark.cpu_only


def launch(family, *arguments, **environment):
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("SLURM") and name != "MEGATRON_LM_PATH"
    }
    return subprocess.run(
        ["bash", str(LAUNCH / f"{family}.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        env={**kept, "PYTHON": sys.executable, **environment},
    )


def resolved(result):
    """NAME=VALUE lines of a dry run, and its command under "command"."""
    assert result.returncode == 0, result.stderr
    before, command = result.stdout.split("# command\n")
    return {**pairs(before), "command": command.replace("\\", "")}


def pairs(text):
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


@pytest.fixture
def dry_run(tmp_path, monkeypatch, capsys):
    """What ``resolved`` gives; describe.py runs in this process, where torch is imported already, with what the script
    gives it.
    """
    asked, python = tmp_path / "asked", tmp_path / "python"
    python.write_text(f"#!/usr/bin/env bash\nprintf '%s\\n' \"$WORLD_SIZE\" \"$@\" >'{asked}'\n")
    python.chmod(0o755)

    def run(family, *arguments, **environment):
        values = resolved(launch(family, *arguments, DRY_RUN="1", PYTHON=str(python), **environment))
        world_size, *argv = asked.read_text().splitlines()
        assert argv[0] == str(LAUNCH / "describe.py")
        monkeypatch.setenv("WORLD_SIZE", world_size)
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(argv[0], run_name="__main__")
        return {**values, **pairs(capsys.readouterr().out)}

    return run


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_scripts_are_shellcheck_clean():
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.parent.glob("*.sh")]
    result = subprocess.run(["shellcheck", "-x", *map(str, scripts)], capture_output=True, text=True, cwd=LAUNCH)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("length, cp, tokens", [("32k", "4", "8192"), ("128k", "8", "16384"), ("1m", "32", "32768")])
@pytest.mark.parametrize("family, size", [("llama2", "70b"), ("gpt3", "13b")], ids=lambda value: value)
def test_presets_of_sequence_length_fit_the_model(dry_run, family, size, length, cp, tokens):
    # describe.py checks every rule of the configuration, and fails the dry run when one is broken.
    values = dry_run(family, size, SEQ_LENGTH=length, DEVICE="npu", NNODES="128", MASTER_ADDR="first")
    assert (values["CP"], values["TOKENS_PER_RANK"]) == (cp, tokens)


@pytest.mark.parametrize("family, size", SIZES, ids=lambda value: value)
def test_every_size_has_a_command(dry_run, family, size):
    values = dry_run(family, size, DEVICE="gpu", NNODES="64", NODE_RANK="3", MASTER_ADDR="first")
    model = MODELS[f"{family}-{size}"]  # of the one table
    sizes = model.num_layers, model.hidden, model.ffn, model.num_heads, model.num_kv_heads, model.vocab
    names = ("LAYERS", "HIDDEN", "FFN", "HEADS", "KV_HEADS", "VOCAB_SIZE")
    assert tuple(int(values[name]) for name in names) == sizes
    for part in (
        f"--num-layers {values['LAYERS']}",
        f"--hidden-size {values['HIDDEN']}",
        f"--ffn-hidden-size {values['FFN']}",
        "--node-rank 3",
        "--master-addr first",
        "--nnodes 64",
        "--context-parallel-algo ulysses_cp_algo",
    ):
        assert part in values["command"]


def test_slurm_variables_choose_the_nodes():
    values = resolved(
        launch(
            "llama2",
            "7b",
            DRY_RUN="1",
            DEVICE="gpu",
            PYTHON="true",
            SLURM_NNODES="4",
            SLURM_NODEID="2",
            SLURM_JOB_ID="7",
            MASTER_ADDR="first",
        )
    )
    assert (values["NNODES"], values["NODE_RANK"], values["MASTER_PORT"], values["DP"]) == ("4", "2", "20007", "4")


def test_environment_and_later_flags_win(dry_run, tmp_path):
    (tmp_path / "pretrain_gpt.py").touch()
    values = dry_run(
        "qwen",
        "14b",
        "--seed",
        "9",
        DEVICE="npu",
        NNODES="8",
        MASTER_ADDR="first",
        CP="8",
        TP="1",
        PP="1",
        CP_ALGO="megatron_cp_algo",
        CP_WINDOW="2",
        MEGATRON_LM_PATH=str(tmp_path),
    )
    assert "Double Ring (window 2)" in values["CONTEXT_PARALLEL"]
    assert values["command"].rstrip().endswith("--seed 9")
    assert f"-m mindspeed_cp.run {tmp_path}/pretrain_gpt.py" in values["command"] and "--mock-data" in values["command"]


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"SIZE": "8b"}, "size 8b is not known; choose one of 7b, 13b, 70b."),
        ({"NNODES": "2"}, "set MASTER_ADDR"),
        ({"DEVICE": "gpu", "NPROC_PER_NODE": "6"}, "must be a multiple of TP 2 x CP 4 x PP 1 = 8; use NNODES=2"),
        ({"SEQ_LENGTH": "32x"}, "must be a number of tokens above 0, such as 32k"),
        ({"DEVICE": "tpu"}, "choose npu, gpu or cpu"),
        ({"MEGATRON_LM_PATH": "/nowhere"}, "holds no pretrain_gpt.py"),
        ({"CP": "3"}, "must be divisible by --tensor-model-parallel-size 2 x --context-parallel-size 3"),
    ],
    ids=["size", "address", "world", "length", "device", "checkout", "rule"],
)
def test_mistakes_are_named_with_a_way_out(environment, words):
    result = launch("llama2", DRY_RUN="1", **environment)
    assert result.returncode == 2 and words in result.stderr, result.stderr


BAD = ("08", "abc", "0", "-1", "1.5")
NUMBERS = [
    *((name, value) for name in ("TP", "CP", "NPROC_PER_NODE", "GLOBAL_BATCH") for value in BAD),
    ("PP", " 2"), ("VPP", "0"), ("NNODES", "2;ls"), ("NODE_RANK", "-1"), ("ULYSSES_DEGREE", "x"), ("CP_WINDOW", "2**3"),
    ("MASTER_PORT", "99999"), ("MASTER_PORT", "0"), ("LR", "fast"), ("TINY", "yes"), ("SLURM_JOB_ID", "a[0]"),
    ("SEQ_LENGTH", "0"), ("SEQ_LENGTH", "010"), ("SEQ_LENGTH", "1e6"), ("SIZE", "7b 13b"), ("TIMEOUT_MINUTES", "long"),
]  # fmt: skip


@pytest.mark.parametrize("name, value", NUMBERS)
def test_every_number_is_checked_before_it_is_used(name, value):
    result = launch("llama2", DRY_RUN="1", DEVICE="gpu", PYTHON="true", **{name: value})
    line = f"{'size' if name == 'SIZE' else name} {value} "
    assert result.returncode == 2 and result.stderr.startswith("llama2.sh: error: ") and line in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""


@pytest.mark.parametrize(
    "name",
    ["TP", "CP", "PP", "VPP", "NNODES", "NPROC_PER_NODE", "SEQ_LENGTH", "ULYSSES_DEGREE", "CP_WINDOW", "SEED",
     "VOCAB_SIZE", "MASTER_PORT", "TIMEOUT_MINUTES", "EVAL_ITERS", "TINY", "DRY_RUN", "SLURM_JOB_ID", "SLURM_NNODES"],
)  # fmt: skip
def test_nothing_that_stands_in_a_number_is_executed(name, tmp_path):
    settings = {"DRY_RUN": "1", "DEVICE": "gpu", "PYTHON": "true", name: f"PATH[$(touch {tmp_path}/executed)]"}
    result = launch("llama2", **settings)
    assert result.returncode == 2 and not (tmp_path / "executed").exists(), result.stderr


def test_lengths_may_end_in_k_or_m():
    for text, tokens in (("64k", "65536"), ("2m", "2097152"), ("4096", "4096")):
        assert (
            resolved(launch("llama2", "7b", DRY_RUN="1", DEVICE="gpu", PYTHON="true", SEQ_LENGTH=text))["SEQ_LENGTH"]
            == tokens
        )


def test_a_pipeline_may_be_interleaved():
    values = resolved(launch("llama2", "13b", DRY_RUN="1", DEVICE="gpu", PYTHON="true", CP="1", VPP="4"))
    assert "--num-virtual-stages-per-pipeline-rank 4" in values["command"]


TINY = [("llama2", "7b"), ("llama2", "70b"), ("qwen", "7b"), ("qwen1_5", "7b"), ("gpt3", "1.3b")]
ALGORITHMS = {1: "ulysses_cp_algo", 2: "megatron_cp_algo"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return prepare_data(tmp_path_factory.mktemp("launch"))


def tiny(text, cp, **environment):
    return {
        "TINY": "1",
        "CP": str(cp),
        "CP_ALGO": ALGORITHMS[cp],
        "TRAIN_ITERS": "3",
        "DEVICE": "cpu",
        "DATA_PATH": text,
        **environment,
    }


@pytest.fixture(scope="module")
def records(text):
    """(family, size, cp) -> step records of the command that a dry run prints, without starting torchrun for each."""

    def flags(family, size, cp):
        command = shlex.split(printed_command(launch(family, size, **tiny(text, cp, DRY_RUN="1", PYTHON="true"))))
        assert command[command.index("--nproc-per-node") + 1] == str(cp)
        return command[command.index(str(REPOSITORY / "scripts" / "pretrain_gpt.py")) + 1 :]

    found = {}
    for cp in ALGORITHMS:
        found |= run_argvs(cp, {(family, size, cp): flags(family, size, cp) for family, size in TINY})
    return found


def check_equal(records, expected):
    assert len(records) == len(expected) == 3
    for record, reference in zip(records, expected):
        assert record["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("family, size", TINY, ids=["llama2", "llama2-gqa", "qwen", "qwen1_5", "gpt3"])
def test_tiny_model_trains_as_with_cp_1(records, family, size):
    check_equal(records[family, size, 2], records[family, size, 1])
    assert all(record["cp_bytes_per_rank"] > 0 for record in records[family, size, 2])


def printed_command(result):
    assert result.returncode == 0, result.stderr
    return result.stdout.split("# command\n")[1]


def test_a_dry_run_prints_a_command_that_runs_in_another_shell_and_folder(records, text, tmp_path):
    settings = tiny(text, 2, DRY_RUN="1", MASTER_PORT=str(free_port()))
    command = printed_command(launch("llama2", "70b", "--log-file", str(tmp_path / "log.jsonl"), **settings))
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=400, cwd=tmp_path, env=bare
    )
    assert result.returncode == 0, result.stderr[-3000:]
    check_equal(
        [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()], records["llama2", "70b", 2]
    )


@pytest.mark.parametrize("device", ["cpu", "gpu", "npu"])
def test_a_launch_starts_the_command_that_its_dry_run_prints_with_its_environment(device, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\nenv\n')
    python.chmod(0o755)
    settings = dict(DEVICE=device, PYTHON=str(python), DATA_PATH="data", HCCL_CONNECT_TIMEOUT="7")
    cd, folder, then, env, *words = shlex.split(printed_command(launch("llama2", "7b", DRY_RUN="1", **settings)))
    start = words.index(str(python))
    started = launch("llama2", "7b", **settings).stdout.splitlines()
    assert (cd, folder, then, env) == ("cd", os.getcwd(), "&&", "env")
    assert started[: len(words) - start - 1] == words[start + 1 :]
    assert set(words[:start]) <= set(started)
    assert ("HCCL_CONNECT_TIMEOUT=7" in words and "TASK_QUEUE_ENABLE=2" in words) == (device == "npu")


def test_the_planner_chooses_what_is_not_given():
    """CP=auto: the planner's first setting, which the configuration's own rules then check."""
    settings = dict(
        DEVICE="npu", DRY_RUN="1", DATA_PATH="data", CP="auto", PP="1", TP="1", NPROC_PER_NODE="4", SEQ_LENGTH="32k"
    )
    planned = resolved(launch("gpt3", "1.3b", **settings))
    assert int(planned["CP"]) * int(planned["DP"]) == 4 and planned["PP"] == planned["TP"] == "1"
    assert f"--context-parallel-size {planned['CP']} " in planned["command"]
    assert planned["CP"] == "1" or f"--context-parallel-algo {planned['CP_ALGO']} " in planned["command"]
    refused = launch("gpt3", "1.3b", **{**settings, "TINY": "1"})
    assert refused.returncode == 2 and "leave one of them out" in refused.stderr
    too_large = launch("gpt3", "175b", **settings)
    assert too_large.returncode == 2 and "the least that is needed is" in too_large.stderr


def test_a_dry_run_without_data_makes_it_first(tmp_path):
    settings = dict(DEVICE="cpu", TINY="1", PYTHON="true", DRY_RUN="1")
    command = printed_command(launch("llama2", "7b", **settings))
    prepare, train = command.split("; } && ")
    assert "prepare_data.py --output" in prepare and "MINDSPEED_CP_DEVICE=cpu" in prepare and "pretrain_gpt.py" in train

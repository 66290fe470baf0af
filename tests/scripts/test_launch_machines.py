"""The examples for Slurm, Kubernetes, Docker and Ray start the launch scripts with what their machines give."""

import os
import re
import runpy
import shlex
import subprocess

import pytest
import yaml
from test_launch import resolved
from trainer_runs import REPOSITORY

LAUNCH = REPOSITORY / "scripts" / "launch"
DRY = {"DRY_RUN": "1", "DEVICE": "gpu", "PYTHON": "true", "SEQ_LENGTH": "128k"}


pytestmark = pytest.mark.cpu_only


def shim(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


def run_in(folder, *command, **environment):
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    kept = {name: os.environ[name] for name in ("HOME",) if name in os.environ}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=LAUNCH.parents[1], env={**kept, "PATH": path, **environment}
    )


def test_the_slurm_job_starts_one_launch_script_on_each_node(tmp_path):
    shim(tmp_path / "bin", "srun", 'echo "srun $1"; shift; exec "$@"')
    shim(tmp_path / "bin", "scontrol", "echo node7; echo node8")
    slurm = {"SLURM_NNODES": "4", "SLURM_NODEID": "1", "SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "node[7-8]"}
    result = run_in(tmp_path / "bin", "bash", str(LAUNCH / "slurm.sbatch"), "llama2", "7b", **DRY, **slurm)
    values = resolved(result)
    assert result.stdout.startswith("srun --kill-on-bad-exit=1\n")
    assert (values["NNODES"], values["NODE_RANK"], values["MASTER_ADDR"], values["SIZE"]) == ("4", "1", "node7", "7b")


def test_the_kubernetes_job_runs_the_launch_script_with_what_the_operator_gives(tmp_path):
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    specs = job["spec"]["pytorchReplicaSpecs"]
    nodes = sum(spec["replicas"] for spec in specs.values())
    for rank, kind in ((0, "Master"), (2, "Worker")):
        (container,) = specs[kind]["template"]["spec"]["containers"]
        given = {each["name"]: each["value"] for each in container["env"]}
        operator = {"WORLD_SIZE": str(nodes), "RANK": str(rank), "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
        command = [*container["command"], *container["args"]]
        values = resolved(run_in(tmp_path, *command, **{**DRY, **given, **operator}))
        assert (values["NNODES"], values["NODE_RANK"], values["NPROC_PER_NODE"]) == ("4", str(rank), "8")
        assert "--master-addr job-master-0 --master-port 23456" in values["command"]


def test_docker_gets_the_variables_and_the_devices(tmp_path):
    command = ["bash", str(LAUNCH / "docker.sh"), "qwen", "7b", "--lr", "1e-4"]
    result = run_in(tmp_path, *command, IMAGE="torch:2", **DRY)
    words = shlex.split(result.stdout.split("# command\n")[1])
    assert words[:3] == ["docker", "run", "--rm"] and "--gpus" in words
    assert words[-6:] == ["torch:2", "bash", "scripts/launch/qwen.sh", "7b", "--lr", "1e-4"]
    assert words[words.index("SEQ_LENGTH") - 1] == "--env" and "CP" not in words
    for wrong, said in (({"IMAGE": ""}, "set IMAGE"), ({"IMAGE": "x", "DEVICE": "tpu"}, "choose npu, gpu or cpu")):
        result = run_in(tmp_path, *command, **{**DRY, **wrong})
        assert result.returncode and said in result.stderr
    named = re.search(r"^for name in (.*?); do", (LAUNCH / "docker.sh").read_text(), re.M | re.S)[1]
    missing = {"DRY_RUN", "MEGATRON_LM_PATH", "PYTHON", "TENSORBOARD_DIR", "MODEL", "DIR"}
    documented = re.findall(r"^#   ([A-Z_ =|0-9a-z.]+?)  ", (LAUNCH / "common.sh").read_text(), re.M)
    known = {name for line in documented for name in re.findall(r"\b[A-Z][A-Z_]+\b", line)}
    assert known - missing <= set(named.replace("\\\n", " ").split()) | {"N"}


def test_ray_checks_the_flags_before_it_starts_workers(capsys):
    ray_train = runpy.run_path(str(LAUNCH / "ray_train.py"))
    flags = ["scripts/pretrain_gpt.py", "--num-attention-heads", "8", "--seq-length", "4096", "--context-parallel-size"]
    assert ray_train["main"](["--workers", "8", "--dry-run", *flags, "4"]) == 0
    assert capsys.readouterr().out == "8 workers with one GPU each: Ulysses, cp=4, contiguous, causal\n"
    assert ray_train["main"](["--workers", "8", "--dry-run", *flags, "3"]) == 2
    assert "ray_train.py: error: " in capsys.readouterr().err

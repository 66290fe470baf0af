"""The command on the embedded trainer: equal, a fault that is found, nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from trainer_runs import REPOSITORY, environment, prepare_data

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]
MODEL = (
    "--num-layers 8 --hidden-size 256 --num-attention-heads 8 --seq-length 1024 --global-batch-size 16 "
    "--train-iters 100 --position-embedding-type rope --context-parallel-algo megatron_cp_algo"
).split()
# A module that the ranks import: RoPE counts from each rank's first token.
BREAK_ROPE = """
from mindspeed_cp import megatron_adaptor
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

original = RotaryEmbedding.forward

def forward(self, length, *args, **kwargs):
    right = original(self, length, *args, **kwargs)
    if megatron_adaptor.state().cp_size == 1:
        return right
    return right.sort(dim=0, descending=True).values

RotaryEmbedding.forward = forward
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_data(tmp_path_factory.mktemp("data"))


def prove(folder, data, *words, model=MODEL, **variables):
    script = str(REPOSITORY / "scripts" / "pretrain_gpt.py")
    return subprocess.run(
        [sys.executable, "-m", "mindspeed_cp.prove", *words, script, *model, "--data-path", data],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env=environment() | {"TMPDIR": str(folder)} | variables,
    )


def files(*folders):
    """Every file of the user's: its contents, and when it was written."""
    found = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in found}


def test_the_trainer_is_equal_and_nothing_of_the_users_is_touched(tmp_path, data):
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/latest.txt", "log.jsonl"):
        (tmp_path / name).write_text("the user's own", encoding="utf-8")
    home = Path(data).parent
    before = files(tmp_path, home)
    theirs = "--save checkpoints --load checkpoints --save-interval 1 --log-file log.jsonl".split()
    result = prove(tmp_path, data, "--steps", "2", "--report", "found.md", model=[*MODEL, *theirs])
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("EQUAL: pretrain_gpt.py: cp=2 against cp=1")
    assert "num-layers 8 -> 2" in result.stdout and "Not covered:" in result.stdout and len(lines) < 40
    assert "step 2 of 2" in result.stderr
    assert "### mindspeed-cp prove: EQUAL" in (tmp_path / "found.md").read_text(encoding="utf-8")
    (tmp_path / "found.md").unlink()
    assert files(tmp_path, home) == before


def test_a_fault_in_the_script_is_found_and_named(tmp_path, data):
    (tmp_path / "break_rope.py").write_text(BREAK_ROPE, encoding="utf-8")
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    result = prove(tmp_path, data, "--steps", "1", "--json", MINDSPEED_CP_PROVE_IMPORTS="break_rope", PYTHONPATH=path)
    assert result.returncode == 1, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert not found["equal"] and found["first_module"]["name"] == "rotary_pos_emb"
    assert found["compared"]["weight"] > 20 and found["largest_error"]["loss"] > 1e-5
    assert "--context-parallel-size" in found["commands"]["cp=2"]
    assert "--context-parallel-size" not in found["commands"]["cp=1"]


def test_a_run_that_fails_is_shown_with_what_it_said(tmp_path, data):
    result = prove(tmp_path, data, model=[*MODEL, "--normalization", "Nothing"])
    assert result.returncode == 1
    assert result.stdout.startswith("NOT SHOWN: pretrain_gpt.py: a run failed")
    assert "error: --normalization Nothing" in result.stdout and "Traceback" not in result.stdout, result.stdout

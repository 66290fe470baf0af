"""A real MindSpeed beside this project, in every order: context parallelism is this project's, everything else its own.

MINDSPEED_FOLDER=DIR names a folder in which its package lies, of the branch for the environment's megatron-core.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import bed
import pytest

RING, ULYSSES = "megatron_cp_algo", "ulysses_cp_algo"
SPLIT = (
    "--seq-length 32 --num-attention-heads 4 --use-flash-attn --context-parallel-size 2 --context-parallel-algo".split()
)
WHO = "everything but context parallelism, which is mindspeed_cp's"


@pytest.fixture(scope="module")
def server():
    folder = os.environ.get("MINDSPEED_FOLDER", "")
    if not Path(folder, "mindspeed", "features_manager").is_dir():
        pytest.skip("no MindSpeed: MINDSPEED_FOLDER=DIR names a folder in which its package lies")
    server = bed.Server(folder, NPU_BED_IMPORTS="torch")
    yield server
    server.close()


@pytest.fixture(scope="module")
def run(server):
    return lambda world, *order, **more: server.run("beside_mindspeed", world, order=list(order), **more)


@pytest.fixture(scope="module")
def alone(run):
    """What MindSpeed trains to on one device, without this project and around it."""
    ours, theirs = run(1, "mindspeed", "ours", "plain")[0], run(1, "mindspeed", "plain")[0]
    assert ours["losses"] == theirs["losses"] and ours["calls"] == 0
    return theirs["losses"]


def check(results, alone, algorithm):
    first, *others = results
    for rank in results:
        for got, wanted in zip(rank["losses"], alone, strict=True):
            assert got == pytest.approx(wanted, rel=1e-5), (rank["losses"], alone)
        assert rank["lost"] == [] and rank["calls"] >= 2 * len(alone)  # two layers
    title = {RING: "Ring, cp=2, zigzag", ULYSSES: "Ulysses, cp=2, contiguous"}[algorithm]
    assert title in first["said"][0] and WHO in first["said"][1]
    assert [line for rank in others for line in rank["said"]] == []


@pytest.mark.parametrize("algorithm", [RING, ULYSSES])
@pytest.mark.parametrize("order", [["ours"], ["ours", "mindspeed"], ["mindspeed", "ours"]], ids="-".join)
def test_our_attention_computes_whoever_comes_first_and_with_mindspeeds_own_flags(run, alone, order, algorithm):
    check(run(2, *order, flags=[*SPLIT, algorithm]), alone, algorithm)


@pytest.mark.parametrize("algorithm", ["", ULYSSES])
def test_repatch_as_frameworks_call_it_leaves_our_attention_in_place(run, alone, algorithm):
    """Without an algorithm MindSpeed's default holds."""
    results = run(2, "mindspeed", "ours", "repatch", algorithm=algorithm)
    check(results, alone, algorithm or RING)
    assert ("is MindSpeed's default" in results[0]["said"][0]) == (not algorithm)


def test_switched_off_everything_stays_mindspeeds_and_is_said(run):
    result = run(1, "off", "ours", "mindspeed", "plain")[0]
    assert result["said"][0].startswith("MINDSPEED_CP=off: context parallelism is left to MindSpeed (")
    assert result["calls"] == 0 and len(result["said"]) == 1


def test_an_algorithm_that_only_mindspeed_has_stays_its_own_and_is_said(run):
    result = run(2, "ours", flags=[*SPLIT, "adaptive_cp_algo"], train=False)[0]
    assert result["said"][0].startswith("--context-parallel-algo adaptive_cp_algo is MindSpeed's own: ")
    assert result["applied"] == 0


def test_tensor_parallelism_in_two_dimensions_is_refused_by_name(run):
    with pytest.raises(bed.JobFailed, match="--tp-2d with --tp-y 2 splits the sequence .* set MINDSPEED_CP=off"):
        run(2, "ours", flags=[*SPLIT, RING, "--tp-2d", "--tp-y", "2"], train=False)


LLM = """--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --max-position-embeddings 128
--micro-batch-size 1 --global-batch-size 2 --train-iters 3 --lr 1e-3 --min-lr 1e-4 --log-interval 1 --eval-iters 0
--eval-interval 100 --attention-dropout 0 --hidden-dropout 0 --distributed-timeout-minutes 2 --split 90,10,0
--no-gradient-accumulation-fusion --no-masked-softmax-fusion --seq-length 64 --mock-data --tokenizer-type NullTokenizer
--vocab-size 4200 --transformer-impl local --use-mcore-models --use-flash-attn --position-embedding-type rope
--normalization RMSNorm --swiglu""".split()
RESET = ["--reset-attention-mask", "--reset-position-ids"]


def losses_of_mindspeed_llm(folders, world, flags, **more):
    """[(loss, gradient norm)] that MindSpeed-LLM's pretrain_gpt.py prints, and all that it prints."""
    script = next(path for folder in folders if (path := Path(folder, "pretrain_gpt.py")).is_file())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command += [str(bed.HERE / "llm_script.py"), str(script), *LLM, *flags]
    done = subprocess.run(
        command, env=bed.environment(*folders, bed.HERE, **more), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"lm loss: (\S+) .*? grad norm: (\S+) ", done.stdout)
    assert len(found) == 3
    return [tuple(map(float, pair)) for pair in found], done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("documents", [[], RESET], ids=["whole", "documents"])
def test_mindspeed_llms_own_script_trains_to_the_losses_of_mindspeed_alone(documents):
    """MINDSPEED_LLM_PATH: the folders of MindSpeed-LLM, its Megatron-LM, its MindSpeed and its packages, as in PATH."""
    folders = os.environ.get("MINDSPEED_LLM_PATH", "").split(os.pathsep)
    if folders == [""]:
        pytest.skip("no MindSpeed-LLM: MINDSPEED_LLM_PATH names its folder, Megatron-LM's, MindSpeed's, its packages'")
    wanted, _ = losses_of_mindspeed_llm(folders, 1, documents, MINDSPEED_CP="off")
    split = ["--context-parallel-size", "2", "--context-parallel-algo"]
    causal = ["--variable-seq-lengths"] if documents else []
    general = ["--attention-mask-type", "general"] if documents else []
    for algorithm, further in ((RING, causal), (ULYSSES, general)):
        found, said = losses_of_mindspeed_llm(folders, 2, [*split, algorithm, *documents, *further])
        assert WHO in said
        for pair, other in zip(found, wanted, strict=True):
            assert pair == pytest.approx(other, rel=2e-6, abs=1.1e-3), (found, wanted)  # three digits of the norm
            assert pair[0] == pytest.approx(other[0], rel=1e-6)


@pytest.mark.parametrize("world", [2, 4])
def test_one_layer_by_mindspeeds_own_ring_gives_what_this_projects_gives(server, world):
    """The row of scripts/verify_npu.sh; it raises where they differ."""
    for lines in server.run("beside_mindspeeds_ring", world):
        assert [line.split(" |")[0] for line in lines[2:4]] == ["| ring", "| MindSpeed's ring"], lines
        assert re.search("out .*dq .*dk .*dv .* between both", lines[4])

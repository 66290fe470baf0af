"""A real MindSpeed beside this project, in every order: context parallelism is this project's, everything else its own.

MINDSPEED_FOLDER=DIR names a folder in which its package lies, of the branch for the environment's megatron-core.
"""

import os
from pathlib import Path

import bed
import pytest

RING, ULYSSES = "megatron_cp_algo", "ulysses_cp_algo"
SPLIT = (
    "--seq-length 32 --num-attention-heads 4 --use-flash-attn --context-parallel-size 2 --context-parallel-algo".split()
)
WHO = "everything but context parallelism, which is mindspeed_cp's"


@pytest.fixture(scope="module")
def run():
    folder = os.environ.get("MINDSPEED_FOLDER", "")
    if not Path(folder, "mindspeed", "features_manager").is_dir():
        pytest.skip("no MindSpeed: MINDSPEED_FOLDER=DIR names a folder in which its package lies")
    server = bed.Server(folder, NPU_BED_IMPORTS="torch")
    yield lambda world, *order, **more: server.run("beside_mindspeed", world, order=list(order), **more)
    server.close()


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

"""A real MindSpeed beside this project, in every order: context parallelism is this project's, everything else its own.

MINDSPEED_FOLDER=DIR names a folder in which its package lies, of the branch for the environment's megatron-core.
"""

import contextlib
import os
import re
from pathlib import Path

import bed
import beside_runs
import pytest
from algorithms import ALGORITHMS, flags_of
from beside_runs import BATCHES, MODEL, ORDERS

WHO = "everything but context parallelism, which is mindspeed_cp's"
TITLES = {"Ring": "Ring, cp=2, zigzag", "Ulysses": "Ulysses, cp=2, contiguous"}
BY_IMPORTS = {title: order for title, (order, _) in ORDERS.items() if "repatch" not in order}
OF_TWO_RANKS = flags_of(*ALGORITHMS["Ring"])


@pytest.fixture(scope="module")
def server():
    folder = os.environ.get("MINDSPEED_FOLDER", "")
    if not Path(folder, "mindspeed", "features_manager").is_dir():
        pytest.skip("no MindSpeed: MINDSPEED_FOLDER=DIR names a folder in which its package lies")
    with contextlib.closing(beside_runs.mindspeed_server(folder)) as started:
        yield started


@pytest.fixture(scope="module")
def alone(server):
    """What MindSpeed trains to on one device, without this project and around it."""
    ours = server.run("beside_mindspeed", 1, order=["mindspeed", "ours", "plain"])[0]
    theirs = beside_runs.mindspeed_alone(server)
    assert ours["losses"] == theirs and ours["calls"] == 0
    return theirs


def check(results, alone, algorithm):
    first, *others = results
    for rank in results:
        assert beside_runs.difference(rank["losses"], alone) < beside_runs.BOUND, (rank["losses"], alone)
        assert rank["lost"] == [] and rank["calls"] >= 2 * len(alone)  # two layers
    assert TITLES[algorithm] in first["said"][0] and WHO in first["said"][1]
    assert [line for rank in others for line in rank["said"]] == []


@pytest.mark.parametrize("algorithm", TITLES)
@pytest.mark.parametrize("order", BY_IMPORTS)
def test_our_attention_computes_whoever_comes_first_and_with_mindspeeds_own_flags(server, alone, order, algorithm):
    check(beside_runs.beside(server, BY_IMPORTS[order], algorithm), alone, algorithm)


@pytest.mark.parametrize("algorithm", ["", "Ulysses"])
def test_repatch_as_frameworks_call_it_leaves_our_attention_in_place(server, alone, algorithm):
    """Without an algorithm MindSpeed's default holds."""
    settings = ALGORITHMS[algorithm][1] if algorithm else {}
    results = server.run("beside_mindspeed", 2, order=["mindspeed", "ours", "repatch"], settings=settings)
    check(results, alone, algorithm or "Ring")
    assert ("is MindSpeed's default" in results[0]["said"][0]) == (not algorithm)


def test_switched_off_everything_stays_mindspeeds_and_is_said(server):
    result = server.run("beside_mindspeed", 1, order=["off", "ours", "mindspeed", "plain"])[0]
    assert result["said"][0].startswith("MINDSPEED_CP=off: context parallelism is left to MindSpeed (")
    assert result["calls"] == 0 and len(result["said"]) == 1


def test_an_algorithm_that_only_mindspeed_has_stays_its_own_and_is_said(server):
    flags = [*MODEL, *flags_of(2, {"context_parallel_algo": "adaptive_cp_algo"})]
    result = server.run("beside_mindspeed", 2, order=["ours"], flags=flags, train=False)[0]
    assert result["said"][0].startswith("--context-parallel-algo adaptive_cp_algo is MindSpeed's own: ")
    assert result["applied"] == 0


def test_tensor_parallelism_in_two_dimensions_is_refused_by_name(server):
    flags = [*MODEL, *OF_TWO_RANKS, "--tp-2d", "--tp-y", "2"]
    with pytest.raises(bed.JobFailed, match="--tp-2d with --tp-y 2 splits the sequence .* set MINDSPEED_CP=off"):
        server.run("beside_mindspeed", 2, order=["ours"], flags=flags, train=False)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """MINDSPEED_LLM_PATH: the folders of MindSpeed-LLM, its Megatron-LM, its MindSpeed and its packages, as in PATH."""
    folders = os.environ.get("MINDSPEED_LLM_PATH", "").split(os.pathsep)
    if folders == [""]:
        pytest.skip("no MindSpeed-LLM: MINDSPEED_LLM_PATH names its folder, Megatron-LM's, MindSpeed's, its packages'")
    return beside_runs.MindSpeedLLM(folders, tmp_path_factory.mktemp("llm"))


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
def test_mindspeed_llms_own_scripts_train_to_the_losses_of_mindspeed_alone(llm, batch):
    wanted, _ = llm.run(batch)
    for algorithm in TITLES:
        found, said = llm.run(batch, algorithm)
        assert WHO in said and TITLES[algorithm] in said
        for pair, other in zip(found, wanted, strict=True):
            assert pair == pytest.approx(other, rel=2e-6, abs=1.1e-3), (found, wanted)  # three digits of the norm
            assert pair[0] == pytest.approx(other[0], rel=1e-6)


@pytest.mark.parametrize("world", [2, 4])
def test_one_layer_by_mindspeeds_own_ring_gives_what_this_projects_gives(server, world):
    """The row of scripts/verify_npu.sh; it raises where they differ."""
    for lines in server.run("beside_mindspeeds_ring", world):
        assert [line.split(" |")[0] for line in lines[2:4]] == ["| ring", "| MindSpeed's ring"], lines
        assert re.search("out .*dq .*dk .*dv .* between both", lines[4])

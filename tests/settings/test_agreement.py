"""Ranks with different settings: all stop, with the flag, the values and the ranks that have them, and none waits."""

import agreement_runs
import pytest
from agreement_runs import CASES
from alone import script_outcome
from distributed import run_ranks
from trainer_runs import IMPORTED

from mindspeed_cp.arguments.compared import compared_arguments, compared_names
from mindspeed_cp.settings.agreement import named

pytestmark = pytest.mark.cpu_only


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([2], "rank 2"),
        ([0, 3], "ranks 0 and 3"),
        ([0, 1, 3], "ranks 0, 1 and 3"),
        ([0, 2, 3, 4, 7], "ranks 0, 2 to 4 and 7"),
        ([*range(8)], "ranks 0 to 7"),
    ],
)
def test_ranks_are_named_in_few_words(ranks, text):
    assert named(ranks) == text


@pytest.fixture(scope="module")
def verdicts():
    return run_ranks(3, agreement_runs.judge)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_stops_with_the_flag_the_values_and_the_ranks(verdicts, name):
    _, expected = CASES[name]
    for rank, said in enumerate(verdicts):
        message, printed = said[name]
        assert message == expected and "\n" not in message
        assert printed == ([message] if rank == 0 and message else [])


def test_groups_of_ranks_that_ask_for_different_ones_stop_before_any_is_made(verdicts):
    for said in verdicts:
        message, _ = said["groups"]
        assert "algorithm is megatron_cp_algo on ranks 0 and 2 and ulysses_cp_algo on rank 1" in message
        assert said["afterwards"] == 3  # the next call works


@pytest.mark.megatron
def test_megatron_stops_before_it_makes_a_group_and_starts_once_the_settings_agree():
    for rank, (ids, ends, kernel, differ, refused, cp_size, started) in enumerate(
        run_ranks(2, agreement_runs.start_megatron, fresh=True, imported=IMPORTED)
    ):
        assert "documents_from_position_ids is True on rank 0 and False on rank 1" in ids
        assert "end_of_document is 0 on rank 0 and 1 on rank 1" in ends
        assert "--cp-kernel is cpu on rank 0 and blockwise on rank 1" in kernel
        assert "--lr is 0.1 on rank 0 and 0.2 on rank 1" in differ and "give all ranks the same" in differ
        assert "on rank 1: " in refused and "--context-parallel-size 4" in refused and "rank 0 can work" in refused
        assert "--context-parallel-size is 2 on rank 0 and 1 on rank 1" in cp_size
        assert started == 2, rank


def test_what_is_compared_shapes_the_job_and_nothing_that_ranks_may_have_of_their_own():
    own = {"rank", "local_rank", "save", "load", "data_path", "log_interval", "tensorboard_dir", "profile_ranks"}
    names = compared_names()
    assert own.isdisjoint(names) and len(set(names)) == len(names)
    assert {"lr", "seed", "num_layers", "cp_batch_layout", "context_parallel_algo", "params_dtype"} <= set(names)
    assert compared_arguments({"lr": 0.1, "rank": 3, "cp_comm_type": ["p2p", "p2p"]}) == {
        "--lr": "0.1",
        "--cp-comm-type": "p2p p2p",
    }
    assert compared_arguments({"cp_log": True, "log_interval": 5}) == {"--cp-log": "True", "--log-interval": "5"}


# A program whose rank 1 gets a flag of its own; the others go on to make the process group, as Megatron does.
PROGRAM = """
import argparse, sys
import torch.distributed as dist
from mindspeed_cp.settings.agreement import agree, RanksDiffer
from mindspeed_cp.arguments import add_context_parallel_arguments, config_from_args, readable_errors

with readable_errors("train.py", "gloo"):
    args = add_context_parallel_arguments(argparse.ArgumentParser(prog="train.py")).parse_args()
    config_from_args(args)
dist.init_process_group("gloo")
try:
    agree({})
except RanksDiffer as error:
    if dist.get_rank() == 0:
        print(f"train.py: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)
print("trained")
"""
HYBRID = "--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("", f"{HYBRID} 3"), ["on rank 1: --ulysses-degree-in-cp 3", "rank 0 can work"]),
        ((f"{HYBRID} 3", f"{HYBRID} 3"), ["error: --ulysses-degree-in-cp 3"]),
        (("", "--cp-window-size none"), ["--cp-window-size none", "on rank 1: the command line is refused"]),
    ],
    ids=["a rule on one rank", "a rule on all ranks", "a value on one rank"],
)
def test_a_flag_that_one_rank_refuses_ends_all_at_once(tmp_path, flags, says):
    script = tmp_path / "train.py"
    script.write_text(PROGRAM)
    codes, printed, errors = script_outcome(script, [words.split() for words in flags], timeout=90)
    assert codes == [2, 2], errors
    errors = errors.splitlines()
    assert [part for part in says if not any(part in line for line in errors)] == [], errors
    assert len(errors) == len([line for line in errors if line.startswith("train.py: error: ")]) <= len(says)
    assert not printed

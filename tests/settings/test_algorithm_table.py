"""A row of the table is all that an algorithm needs: one is added at run time, and everything obeys it."""

import dataclasses

import pytest
from cases import TOLERANCE, Case, attend, expected, largest_errors, whole
from contributing import row_of
from distributed import run_ranks
from trainer_runs import IMPORTED, largest_difference, prepare_data, tiny, train

from mindspeed_cp import ContextParallelConfig, TrainingSetup, resolve
from mindspeed_cp.arguments import add_context_parallel_arguments, config_from_args
from mindspeed_cp.settings import algorithms
from mindspeed_cp.settings.algorithms import ALGORITHMS
from mindspeed_cp.settings.notices import ContextParallelWarning

NAME, ROW = row_of("an algorithm", "mindspeed_cp/settings/algorithms.py", algorithms)  # that of CONTRIBUTING.md


@pytest.fixture
def row(monkeypatch):
    monkeypatch.setitem(ALGORITHMS, NAME, ROW)


def config(**changes):
    return ContextParallelConfig(**{"context_parallel_size": 8, "algorithm": NAME, "ulysses_degree": 2} | changes)


def test_rules_are_asked_of_the_row(row):
    assert config(window_size=2).hierarchy == (2, 2, 2)
    assert config(window_size=2).describe() == "Mine (ulysses 2, window 2), cp=8, zigzag, causal"
    with pytest.raises(ValueError, match=f"--ulysses-degree-in-cp is not given, and --context-parallel-algo {NAME}"):
        config(ulysses_degree=None)
    with pytest.raises(ValueError, match="ring size 4 and divide it"):
        config(window_size=3)
    with pytest.raises(ValueError, match="--num-attention-heads 9"):
        resolve(config(), TrainingSetup(num_attention_heads=9))
    with pytest.raises(ValueError, match=f"choose megatron_cp_algo or hybrid_cp_algo or {NAME}"):
        ContextParallelConfig(context_parallel_size=4, kv_exchange="direct")


def test_a_row_without_degree_and_window_says_that_it_ignores_them(monkeypatch):
    plain = dataclasses.replace(ALGORITHMS["megatron_cp_algo"], takes_window=False, hierarchy=lambda c: (1, 4, 1))
    monkeypatch.setitem(ALGORITHMS, NAME, plain)
    with pytest.warns(ContextParallelWarning) as said:
        config(context_parallel_size=4, ulysses_degree=2, window_size=2)
    assert {str(warning.message).split(" is ignored")[0] for warning in said} == {
        "--cp-window-size 2",
        "--ulysses-degree-in-cp 2",
    }


def test_flags_know_the_row(row):
    import argparse

    parser = add_context_parallel_arguments(argparse.ArgumentParser())
    flags = f"--context-parallel-size 4 --context-parallel-algo {NAME} --ulysses-degree-in-cp 2"
    assert config_from_args(parser.parse_args(flags.split())) == config(context_parallel_size=4)


def attend_with_the_row(rank, case):
    ALGORITHMS[NAME] = ROW
    return attend(rank, case)


def test_attention_and_its_gradients_are_exact_with_the_row(row):
    case = Case(config(context_parallel_size=4).__dict__, seq_len=37, heads=4, kv_heads=2)
    errors = largest_errors(whole(case, run_ranks(4, attend_with_the_row, case)), expected(case))
    assert all(error <= TOLERANCE[case.dtype] for error in errors.values()), errors


def train_with_the_row(rank, cases):
    ALGORITHMS[NAME] = ROW
    return train(rank, cases)


@pytest.mark.cpu_only
def test_a_training_with_the_row_has_the_losses_of_one_without_context_parallelism(tmp_path):
    short = "--train-iters 3 --micro-batch-size 4"
    chosen = f"--context-parallel-size 4 --context-parallel-algo {NAME} --ulysses-degree-in-cp 2"
    data = prepare_data(tmp_path)
    cases = {name: tiny(data, flags) for name, flags in {"cp=1": "--train-iters 3", NAME: f"{short} {chosen}"}.items()}
    records = run_ranks(4, train_with_the_row, cases, fresh=True, imported=IMPORTED)[0]
    assert largest_difference(records[NAME], records["cp=1"]) < 1e-5
    assert all(record["cp_bytes_per_rank"] > 0 for record in records[NAME])

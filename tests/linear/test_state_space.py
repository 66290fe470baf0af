"""The core of state-space layers by states, against one process that goes token by token."""

import pytest
import torch
from distributed import run_ranks
from space_runs import CHANNELS, GROUPS, HEADS, STATE, WIDTH, Case, expected, run

CASES = {
    "whole": Case(3, 20, batch=2),
    "packed": Case(4, 37, documents=(0, 1, 9, 9, 12, 30, 37)),
    "a skip of every channel, parts shorter than the convolution": Case(4, 6, skip=(HEADS, CHANNELS)),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_all_gradients_are_those_of_one_process(name):
    case = CASES[name]
    out, of_rows, of_weights = expected(case)
    ranks = run_ranks(case.cp, run, case)
    for positions, mine, grads, *_ in ranks:
        torch.testing.assert_close(mine, out[positions], rtol=0, atol=1e-10)
        for grad, whole in zip(grads, of_rows, strict=True):
            torch.testing.assert_close(grad, whole[positions], rtol=0, atol=1e-10)
    for index, whole in enumerate(of_weights):
        torch.testing.assert_close(sum(rank[3][index] for rank in ranks), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seq_len", [24, 96])
def test_one_state_travels_whatever_the_length(seq_len):
    sent = [rank[-1] for rank in run_ranks(3, run, Case(3, seq_len))]
    inputs = (WIDTH - 1) * (HEADS * CHANNELS + 2 * GROUPS * STATE) * 8
    assert sent == [{"inputs": inputs, "state": HEADS * CHANNELS * STATE * 8}] * 2 + [{}]

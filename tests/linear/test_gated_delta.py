"""The core of gated delta nets over ranks, by heads and by states, against one process that goes token by token."""

import pytest
import torch
from delta_runs import WIDTH, Case, expected, run
from distributed import run_ranks

PACKED = (0, 1, 9, 9, 12, 30, 37)
CASES = {
    "zigzag": Case(2, "heads", 24, layout="zigzag", batch=2, bias=True),
    "packed, uneven lengths and heads": Case(3, "heads", 37, keys=1, values=5, layout="uneven", documents=PACKED),
    "without all-to-all": Case(2, "heads", 13, layout="zigzag", alltoall=False),
    "packed, a kernel that takes documents": Case(4, "heads", 37, 2, 4, 1, PACKED, "zigzag", True),
    "contiguous, state": Case(4, "state", 25, batch=2, bias=True),
    "zigzag, state": Case(3, "state", 26, layout="zigzag"),
    "uneven, state": Case(3, "state", 19, layout="uneven", keys=1, values=3),
    "packed, state": Case(4, "state", 37, documents=PACKED),
    "packed, state, a kernel that takes documents": Case(2, "state", 37, 2, 4, 1, PACKED, "zigzag", True),
    "a decay for each channel": Case(3, "heads", 25, keys=4, layout="zigzag", decays=3, documents=(0, 7, 25)),
    "a decay for each channel, state": Case(3, "state", 25, keys=4, batch=2, decays=3),
    "parts shorter than the convolution, state": Case(4, "state", 6),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_all_gradients_are_those_of_one_process(name):
    case = CASES[name]
    out, grads = expected(case)
    ranks = run_ranks(case.cp, run, case)
    for positions, mine, grad, _, _ in ranks:
        torch.testing.assert_close(mine, out[positions], rtol=0, atol=1e-10)
        torch.testing.assert_close(grad, grads["tokens"][positions], rtol=0, atol=1e-10)
    for weight, whole in grads.items():
        if weight != "tokens":
            total = sum(found[weight] for _, _, _, found, _ in ranks)
            torch.testing.assert_close(total, whole, rtol=0, atol=1e-10)


def test_bytes_of_the_state_do_not_depend_on_the_length():
    sent = []
    for seq_len in (1 << 10, 1 << 13, 1 << 16):
        case = Case(4, "state", seq_len, keys=1, values=1, cheap=True)
        ranks = run_ranks(4, run, case)
        state = case.values * case.key_dim * case.value_dim * 8
        inputs = (WIDTH - 1) * (2 * case.keys * case.key_dim + case.values * case.value_dim) * 8
        forward = [rank[-1][0] for rank in ranks]
        backward = [rank[-1][1] for rank in ranks]
        assert forward == [{"inputs": inputs, "state": state}] * 3 + [{}]
        assert backward == [{}] + [{"dinputs": inputs, "dstate": state}] * 3
        sent.append(forward)
    assert sent[0] == sent[1] == sent[2]


def test_a_document_that_begins_with_a_part_gets_no_state():
    case = Case(2, "state", 24, documents=(0, 12, 24))
    assert [rank[-1][0] for rank in run_ranks(2, run, case)] == [{}, {}]


@pytest.mark.parametrize("layout, rows", [("contiguous", (0, 0, 0)), ("zigzag", (6, 12, 12))])
def test_rows_move_where_the_layout_of_the_batch_is_another(layout, rows):
    """In a zigzag of six chunks of six tokens, ranks hold 0 5, 1 4 and 2 3, and want 0 1, 2 3 and 4 5."""
    case = Case(3, "state", 36, layout=layout, cheap=True)
    out = case.values * case.value_dim
    token = 2 * case.keys * case.key_dim + out + 2 * case.values
    sent = [rank[-1][0].get("tokens", 0) for rank in run_ranks(3, run, case)]
    assert sent == [count * (token + out) * 8 for count in rows]


def test_heads_send_nothing_of_the_gate_and_each_rank_its_share():
    case = Case(2, "heads", 24, layout="zigzag")
    token = (2 * case.keys * case.key_dim + case.values * case.value_dim + 2 * case.values) * 8
    for *_, (forward, backward) in run_ranks(2, run, case):
        assert sum(forward.values()) == 12 * (token + case.values * case.value_dim * 8) // 2
        assert sum(backward.values()) == sum(forward.values())

"""Rows of a packed rotary embedding that frameworks have cut out, by position ids, are told from tables of places."""

from types import SimpleNamespace

import pytest
import torch

from mindspeed_cp.patches import rotary

pytestmark = pytest.mark.cpu_only
FREQUENCIES = torch.tensor([1.0, 0.1, 0.01])
POSITIONS = {
    "a table of places": ([0, 1, 2, 3, 4, 5], False),
    "the first rank's tokens, contiguous: the same rows": ([0, 1, 2, 3, 4, 5], False),
    "another rank's tokens, contiguous": ([6, 7, 8, 9, 10, 11], True),
    "a zigzag": ([0, 1, 2, 9, 10, 11], True),
    "documents that start again": ([0, 1, 2, 0, 1, 2], True),
    "padding alone": ([0, 0, 0, 0, 0, 0], True),
}


def are_of_tokens(positions, num_tokens):
    table = torch.outer(torch.tensor(positions, dtype=torch.float32), FREQUENCIES)[:, None, None]
    adaptor = SimpleNamespace(running_in=lambda scope: None)
    return rotary._are_of_tokens(adaptor, None, torch.cat([table, table], dim=-1), num_tokens)


@pytest.mark.parametrize("positions, expected", POSITIONS.values(), ids=POSITIONS)
def test_rows_of_tokens_do_not_count_up_from_0(positions, expected):
    assert are_of_tokens(positions, len(positions)) == expected


def test_an_embedding_of_another_length_is_a_table_of_places():
    assert not are_of_tokens([0, 1, 2, 9, 10, 11], 5)


def test_angles_are_rounded_and_still_count_up():
    assert not are_of_tokens(list(range(4096)), 4096)

"""Rows of documents by length: every document once, no row too long, the same rows everywhere."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_cp import pack_documents


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.lists(st.integers(0, 40), max_size=40), st.integers(1, 4), st.integers(10, 30))
def test_every_document_is_in_one_row_and_no_row_is_too_long(lengths, ranks, tokens):
    rows = pack_documents(lengths, ranks, tokens) if max(lengths, default=0) <= ranks * tokens else ()
    if rows == ():
        assert not any(lengths) or max(lengths) > ranks * tokens
        return
    assert sorted(place for row in rows for place in row) == [n for n, length in enumerate(lengths) if length]
    sums = [sum(lengths[place] for place in row) for row in rows]
    assert max(sums) <= ranks * tokens
    for before, after in zip(rows, rows[1:]):
        assert max(lengths[n] for n in before) >= max(lengths[n] for n in after), "the longest first"
        free = ranks * tokens - sum(lengths[n] for n in before)
        assert min(lengths[n] for n in after) > free, "what fits into a row is in it"


def test_rows_hold_documents_of_about_one_length():
    assert pack_documents([1, 8, 2, 7, 1, 8, 2, 7], ranks=2, tokens=8) == ((1, 5), (2, 3, 7), (0, 4, 6))


def test_a_document_may_be_longer_than_a_ranks_tokens():
    assert pack_documents([30, 5], ranks=4, tokens=8) == ((0,), (1,))
    assert pack_documents([32], ranks=4, tokens=8) == ((0,),)


def test_nothing_makes_no_rows_and_documents_without_tokens_are_in_none():
    assert pack_documents([], 4, 8) == () and pack_documents([0, 0], 4, 8) == ()
    assert pack_documents([0, 3, 0], 4, 8) == ((1,),)


def test_lengths_may_be_of_numpy_or_torch():
    expected = pack_documents([3, 9, 4], 2, 8)
    assert pack_documents(np.array([3, 9, 4], dtype=np.int32), 2, 8) == expected
    assert pack_documents(torch.tensor([3, 9, 4]), 2, 8) == expected


@pytest.mark.parametrize(
    "arguments, says",
    [
        (([4, 33], 4, 8), "document 1 has 33 tokens, and a row holds 4 ranks x 8 tokens = 32; allow 9 tokens a rank"),
        (([4, -1], 4, 8), r"lengths\[1\] -1 must be a whole number of at least 0"),
        (([4.5], 4, 8), r"lengths\[0\] 4.5 must be a whole number"),
        (([4], 0, 8), "ranks 0 must be a whole number of at least 1"),
        (([4], 4, 0), "tokens 0 must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_packed_is_an_error_with_a_way_out(arguments, says):
    with pytest.raises(ValueError, match=says):
        pack_documents(*arguments)

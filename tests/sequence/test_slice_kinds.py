"""Slices of what is asked for most, against the definition in words."""

import random

import numpy as np
import pytest
import torch
from reference import allowed_pairs, sliced_pairs
from slice_cases import IMAGES, NAMED, PREFIX, drawn_slices

from mindspeed_cp.sequence import slice_kinds
from mindspeed_cp.sequence.slice_kinds import prefix_slices, slices_of_ranges, span_slices
from mindspeed_cp.sequence.slice_mask import slices_mask

SIZE = 40


def test_prefixes_see_each_other_and_the_rest_what_is_before_it():
    assert prefix_slices((0, 40), [13]) == PREFIX
    position, ends, lengths = torch.arange(SIZE), (0, 9, 9, 10, 40), (4, 0, 1, 12)
    allowed = allowed_pairs(SIZE, causal=True, cu_seqlens=ends)[0]
    for start, length in zip(ends, lengths):
        inside = (position >= start) & (position < start + length)
        allowed |= inside[:, None] & inside[None]
    assert torch.equal(sliced_pairs(prefix_slices(ends, lengths), SIZE), allowed)
    for lengths in ((4, 0, 1), (10, 0, 0, 0), (4, 0, 1, -1)):
        with pytest.raises(ValueError, match="give (one for )?each document"):
            prefix_slices(ends, lengths)


def test_spans_see_each_other_within_their_document():
    assert span_slices((0, 40), [(5, 15), (22, 29)]) == IMAGES
    rng = random.Random(0)
    for _ in range(200):
        cuts = sorted(rng.sample(range(SIZE + 1), 2 * rng.randint(0, 5)))
        spans = list(zip(cuts[::2], cuts[1::2]))
        ends = (0, *sorted(rng.choices(range(SIZE + 1), k=rng.randint(0, 4))), SIZE)
        number = torch.zeros(SIZE, dtype=torch.long)
        for index, (start, stop) in enumerate(spans, start=1):
            number[start:stop] = index
        together = (number[:, None] == number[None]) & (number[:, None] > 0)
        allowed = allowed_pairs(SIZE, causal=True, cu_seqlens=ends)[0]
        allowed |= together & allowed_pairs(SIZE, cu_seqlens=ends)[0]
        slices = span_slices(ends, spans)
        slices_mask(slices, SIZE)  # no two overlap
        assert torch.equal(sliced_pairs(slices, SIZE), allowed), (ends, spans)


def ranges_of(allowed):
    """(first, last + 1) of the keys of every query, None where they are not one range."""
    first = allowed.int().argmax(1)
    last = first + allowed.sum(1)
    columns = torch.arange(allowed.shape[1])
    one = torch.equal((columns >= first[:, None]) & (columns < last[:, None]), allowed)
    return (first.numpy(), last.numpy()) if one else None


def test_ranges_of_keys_are_as_many_slices_as_they_were(monkeypatch):
    monkeypatch.setattr(slice_kinds, "QUERIES_PER_SLICE", 2)
    for name in ("prefix", "images", "video", "windows"):
        found = slices_of_ranges(*ranges_of(sliced_pairs(NAMED[name], SIZE)))
        assert torch.equal(sliced_pairs(found, SIZE), sliced_pairs(NAMED[name], SIZE))
        assert len(found) <= len(NAMED[name]) + 1, name
    rng, seen = random.Random(1), 0
    for _ in range(400):
        allowed = sliced_pairs(drawn_slices(rng, SIZE), SIZE)
        ranges = ranges_of(allowed)
        found = None if ranges is None else slices_of_ranges(*ranges)
        if found is not None:
            slices_mask(found, SIZE)
            assert torch.equal(sliced_pairs(found, SIZE), allowed)
            seen += 1
    assert seen > 40


def test_masks_that_take_too_many_slices_stay_dense():
    rng = np.random.default_rng(0)
    first = rng.integers(0, SIZE, 1000)
    assert slices_of_ranges(first, first + 1) is None
    assert slices_of_ranges(np.array([0]), np.array([1])) == (((0, 1), (0, 1), "full"),)
    assert slices_of_ranges(np.zeros(5, dtype=np.int64), np.zeros(5, dtype=np.int64)) == ()

"""What a difference looks like, on tensors made for it."""

import pytest
import torch

from mindspeed_cp.prove import signature
from mindspeed_cp.prove.comparing import Rows
from mindspeed_cp.prove.limits import limits_of
from mindspeed_cp.prove.watching import zigzag

SEQ, LIMIT = 32, 1e-4
ZIGZAG = [zigzag([0, SEQ], 2, rank) for rank in range(2)]


def rows(change, documents=()):
    expected = torch.randn(SEQ, 6, generator=torch.Generator().manual_seed(1))
    owner = torch.empty(SEQ, dtype=torch.long)
    for rank, positions in enumerate(ZIGZAG):
        owner[positions] = rank
    return Rows(expected, change(expected.clone()), owner, documents)


def with_rows(places, value=9.0):
    def change(tensor):
        tensor[places] = value * torch.arange(1, len(tensor[places]) + 1)[:, None]
        return tensor

    return change


KINDS = {
    "factor cp": lambda tensor: 2 * tensor,
    "factor 1/cp": lambda tensor: tensor / 2,
    "factor": lambda tensor: 0.3 * tensor,
    "permuted rows": lambda tensor: tensor.flip(0),
    "one rank's part": with_rows(ZIGZAG[1]),
    "beginnings": with_rows([0, 8, 9, 24]),
    "ends": with_rows([7, 23]),
    "every row": with_rows(slice(None)),
    "behind the first piece": with_rows(slice(8, SEQ)),
    "some rows": with_rows([2, 4, 7, 8, 11, 12, 20, 29]),
    "not a number": with_rows([3], float("nan")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_fault_is_recognised(kind):
    assert signature.of_rows(rows(KINDS[kind]), LIMIT, 2).kind == kind


def test_rows_behind_the_first_document_are_about_documents():
    found = signature.of_rows(rows(with_rows(slice(5, SEQ)), (0, 5, 20)), LIMIT, 2)
    assert found.kind == "across documents" and "the first document (5 rows) is right" in found.seen


def test_gradients_that_were_not_reduced_are_recognised():
    parts = [torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    mean = (parts[0] + parts[1]) / 2
    assert "whose mean is right" in signature.of_gradient(mean, parts, LIMIT, 2).seen
    assert "whose sum is right" in signature.of_gradient(2 * mean, parts, LIMIT, 2).seen
    assert signature.of_gradient(mean, [2 * mean, 2 * mean], LIMIT, 2).kind == "factor cp"
    assert signature.of_gradient(mean, [mean, parts[1]], LIMIT, 2).kind == "ranks disagree"


def test_zigzag_positions_are_a_partition_of_every_document():
    ends = [0, 8, 24]
    assert zigzag(ends, 2, 0).tolist() == [0, 1, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23]
    assert sorted(torch.cat([zigzag(ends, 2, rank) for rank in range(2)]).tolist()) == list(range(24))


def test_limits_are_wider_on_devices_and_for_bfloat16():
    cpu, npu, half = limits_of("float32", "cpu"), limits_of("float32", "npu"), limits_of("bfloat16", "npu")
    assert {what: 20 * limit for what, limit in cpu.largest.items()} == npu.largest and npu.small == cpu.small
    assert half == limits_of("bfloat16", "cpu") and half.small > cpu.small
    assert all(half.largest[what] > limit for what, limit in npu.largest.items())

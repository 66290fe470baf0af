"""Differentiable collectives (mindspeed_cp.compat.mapping) against one process that holds every rank's tensor."""

import itertools

import pytest
import torch
from distributed import run_ranks

from mindspeed_cp.comm import count_bytes
from mindspeed_cp.comm.messages import Pending
from mindspeed_cp.compat.mapping import (
    all_to_all,
    cal_split_sizes,
    gather_forward_split_backward,
    split_forward_gather_backward,
    start_all_to_all,
)

PAIRS = {num_dims: list(itertools.permutations(range(num_dims), 2)) for num_dims in (3, 4)}
SHAPES = {  # for groups of 3: even, scatter uneven, gather uneven, both uneven, shorter than the group
    "even": (6, 9, 3, 12),
    "uneven": (5, 7, 4, 8),
    "mixed": (6, 7, 9, 5),
    "short": (2, 1, 2, 4),
}


def _global(shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _own(tensor, dim, rank, world):
    return tensor.split(cal_split_sizes(tensor.size(dim), world), dim)[rank]


def _check_all_to_all(rank, shape, scatter, gather, dtype):
    world = torch.distributed.get_world_size()
    whole, grad = _global(shape, 1).to(dtype), _global(shape, 2).to(dtype)
    source = _own(whole, gather, rank, world).clone().requires_grad_()
    out = all_to_all(source, None, scatter, gather, shape[gather])
    assert out.is_contiguous() and torch.equal(out, _own(whole, scatter, rank, world))
    out.backward(_own(grad, scatter, rank, world))
    assert torch.equal(source.grad, _own(grad, gather, rank, world))


def _every_all_to_all(rank, num_dims):
    for shape in SHAPES.values():
        for scatter, gather in PAIRS[num_dims]:
            _check_all_to_all(rank, shape[:num_dims], scatter, gather, torch.float64)
            _check_all_to_all(rank, shape[:num_dims], scatter - num_dims, gather, torch.bfloat16)


@pytest.mark.parametrize("num_dims", [3, 4])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_to_all_is_exact_in_both_directions_for_every_pair_of_dimensions(world, num_dims):
    run_ranks(world, _every_all_to_all, num_dims)


def _views_and_bytes(rank):
    whole = _global((6, 4, 2), 3)
    strided = _own(whole, 1, rank, 2).transpose(0, 2)  # a non-contiguous input
    with count_bytes() as traffic:
        out = all_to_all(strided, None, 2, 1)
    assert torch.equal(out, _own(whole.transpose(0, 2), 2, rank, 2))
    assert traffic.total_bytes == 3 * 2 * 2 * 8 and traffic.total_messages == 1
    leaf = _own(whole, 0, rank, 2).clone().requires_grad_()
    all_to_all(leaf, None, 1, 0).sum().backward()  # an expanded gradient
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def test_all_to_all_takes_strided_tensors_and_sends_only_what_others_get():
    run_ranks(2, _views_and_bytes)


def _check_split_and_gather(rank, dim, sizes, scale):
    world = torch.distributed.get_world_size()
    shape = [4, 5, 3]
    shape[dim] = sum(sizes)
    start = sum(sizes[:rank])
    factor = {"up": float(world), "down": 1 / world, None: 1.0}[scale]
    whole = _global(shape, 4).requires_grad_()
    part = split_forward_gather_backward(whole, None, dim, sizes, scale)
    assert torch.equal(part, whole.narrow(dim, start, sizes[rank]))
    grad = _global(shape, 5)
    part.backward(grad.narrow(dim, start, sizes[rank]))
    torch.testing.assert_close(whole.grad, grad * factor, rtol=1e-15, atol=0)
    piece = whole.detach().narrow(dim, start, sizes[rank]).clone().requires_grad_()
    joined = gather_forward_split_backward(piece, None, dim, sizes, scale)
    assert torch.equal(joined, whole)
    joined.backward(grad)
    torch.testing.assert_close(piece.grad, (grad * factor).narrow(dim, start, sizes[rank]), rtol=1e-15, atol=0)


def _every_split_and_gather(rank):
    for dim in (0, 1, 2):
        for sizes in ([2, 2, 2], [3, 2, 2], [1, 5, 0]):
            for scale in ("up", "down", None):
                _check_split_and_gather(rank, dim, sizes, scale)
    uneven = _global((7, 2), 6).requires_grad_()
    split_forward_gather_backward(uneven, None, 0).sum().backward()  # sizes by the usual rule, scaled down by default
    torch.testing.assert_close(uneven.grad, torch.full_like(uneven, 1 / 3))
    piece = torch.ones(2, 2, requires_grad=True)
    gather_forward_split_backward(piece, None, -1).sum().backward()  # scaled up by default
    assert torch.equal(piece.grad, torch.full_like(piece, 3.0))


def test_split_and_gather_are_each_others_backward_with_every_scale():
    run_ranks(3, _every_split_and_gather)


def _messages(rank):
    tensor = torch.zeros(2, 3, 4)
    for call, words in (
        (lambda: all_to_all(tensor, None, 1, 1), "must differ"),
        (lambda: all_to_all(tensor, None, 3, 1), "scatter_dim 3 does not exist"),
        (lambda: all_to_all(tensor, None, 2, 1, 9), r"gather_size 9 gives rank \d of 2 a length of [45]"),
        (lambda: all_to_all(tensor[0, 0], None), "3 or 4 dimensions"),
        (lambda: split_forward_gather_backward(tensor, None, 1, [1, 1]), "must sum to 3"),
        (lambda: split_forward_gather_backward(tensor, None, 1, grad_scale="sideways"), "'sideways'"),
        (lambda: gather_forward_split_backward(tensor, None, 1, [5, 5]), "has 3 on dimension 1"),
        (lambda: gather_forward_split_backward(tensor, None, 1, [3]), "each of the 2 ranks"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def _unequal_without_sizes(rank):
    """Ranks that hold 1, 2 and 3 entries and say nothing of it; backward gives each its own part."""
    whole, grad = _global((2, 6), 5), _global((2, 6), 6)
    start = (0, 1, 3)[rank]
    source = whole[:, start : start + rank + 1].clone().requires_grad_()
    out = gather_forward_split_backward(source, None, -1, grad_scale=None)
    out.backward(grad)
    assert torch.equal(out, whole) and torch.equal(source.grad, grad[:, start : start + rank + 1])


def test_lengths_that_nobody_says_are_asked_for():
    run_ranks(3, _unequal_without_sizes)


def test_wrong_sizes_are_named_before_anything_is_sent():
    run_ranks(2, _messages)


def test_split_sizes_give_the_remainder_to_the_first_ranks():
    assert cal_split_sizes(10, 4) == [3, 3, 2, 2] and cal_split_sizes(2, 3) == [1, 1, 0]


def _pending_equals_awaited(rank, shape, scatter, gather):
    """Results and gradients of three exchanges under way at once are those of exchanges one after the other."""
    world = torch.distributed.get_world_size()
    found = []
    for start in (True, False):
        leaves = [_own(_global(shape, seed), gather, rank, world).clone().requires_grad_() for seed in (1, 2, 3)]
        if start:
            pending = [start_all_to_all(leaf, None, scatter, gather, shape[gather]) for leaf in leaves]
            tensors = [each.wait() for each in pending]
            assert all(each.wait() is tensor for each, tensor in zip(pending, tensors))
        else:
            tensors = [all_to_all(leaf, None, scatter, gather, shape[gather]) for leaf in leaves]
        (tensors[0] * tensors[1] + tensors[2]).square().sum().backward()
        found.append([*(tensor.detach() for tensor in tensors), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(*pair) for pair in zip(*found))


def _every_pending(rank):
    for shape in SHAPES.values():
        _pending_equals_awaited(rank, shape, 2, 0)
        _pending_equals_awaited(rank, shape, 0, 1)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_pending_exchanges_give_the_same_numbers_and_gradients(world):
    run_ranks(world, _every_pending)


class _Noted(torch.autograd.Function):
    """A projection that notes when it computes."""

    @staticmethod
    def forward(ctx, tensor, name, events):
        ctx.name, ctx.events = name, events
        events.append(f"project {name}")
        return tensor * 2

    @staticmethod
    def backward(ctx, grad):
        ctx.events.append(f"backward {ctx.name}")
        return grad * 2, None, None


def _order_of_events(rank):
    from mindspeed_cp.comm.link import Link

    events, real = [], Link.all_to_all

    def noting(self, *args):
        number = sum(event.startswith("start") for event in events)
        events.append(f"start {number}")
        pending = real(self, *args)
        return Pending(lambda: (events.append(f"wait {number}"), pending.wait()))

    hidden = torch.ones(4, 2, 4, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "all_to_all", noting)
        query, key = (start_all_to_all(_Noted.apply(hidden, name, events), None, 2, 0) for name in ("q", "k"))
        (query.wait() + key.wait()).sum().backward()
    return events


def test_pending_exchanges_overlap_the_projections_that_follow():
    expected = [
        "project q",
        "start 0",
        "project k",
        "start 1",
        "wait 0",
        "wait 1",
        "start 2",
        "start 3",
        "wait 2",
        "backward k",
        "wait 3",
        "backward q",
    ]
    assert run_ranks(2, _order_of_events) == [expected] * 2

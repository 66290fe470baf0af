"""Measure on real ranks what a call of attention saves and sends."""

import time
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from cases import arguments, local_inputs, setup_of
from distributed import run_ranks

from mindspeed_cp.comm import count_bytes, link


def prepared(rank, case):
    """(function that calls context_parallel_attention, leaves, grad_out, groups), with an empty workspace."""
    from mindspeed_cp import context_parallel_attention

    config, groups = setup_of(case.config, case.share_from)
    groups.workspace.clear()
    layout = case.layout()
    leaves, sinks, grad_out, mask = local_inputs(rank, case, layout)
    keywords = arguments(case, config, groups, layout, sinks, mask)

    def call(*tensors, kept=None):
        return context_parallel_attention(*(tensors or leaves), **keywords, kept=kept)

    return call, leaves, grad_out, groups


def saved_bytes(rank, case):
    """Bytes that forward saves for backward, counting every storage once."""
    call, *_ = prepared(rank, case)
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = call()
    assert out.requires_grad
    return sum(storages.values())


def traffic_of(rank, case):
    """(forward bytes, forward messages, backward bytes, backward messages) of this rank, each a dict by purpose."""
    from mindspeed_cp import context_parallel_attention

    config, groups = setup_of(case.config, case.share_from)
    layout = case.layout()
    leaves, sinks, grad_out, mask = local_inputs(rank, case, layout)
    with count_bytes() as forward:
        out = context_parallel_attention(*leaves, **arguments(case, config, groups, layout, sinks, mask))
    with count_bytes() as backward:
        out.backward(grad_out)
    counts = (forward.bytes, forward.messages, backward.bytes, backward.messages)
    return tuple({purpose: number for purpose, number in counter.items() if number} for counter in counts)


def traffic(case):
    return run_ranks(case.cp, traffic_of, case)


def drop_zero(sizes):
    return {purpose: size for purpose, size in sizes.items() if size}


class _LetGo:
    """A collective's handle that also waits until no other reference holds its tensors."""

    def __init__(self, collective, tensors, *more, **keywords):
        self._tensors, self._held = tensors, [tensor._use_count() for tensor in tensors]
        self._work = collective(*tensors, *more, **keywords)

    def wait(self):
        work, self._work = self._work, None
        work.wait()
        del work
        while any(tensor._use_count() > held for tensor, held in zip(self._tensors, self._held)):
            time.sleep(0)


@contextmanager
def let_go():
    """Context manager in which an awaited collective no longer holds its tensors.

    gloo's thread reports completion before it releases them: on two busy cores every third tensor is held a few
    milliseconds longer.
    """

    def of(collective):
        return lambda received, sent, *more, **keywords: _LetGo(collective, (received, sent), *more, **keywords)

    with (
        mock.patch.object(link, "_all_gather", of(link._all_gather)),
        mock.patch.object(dist, "all_to_all_single", of(dist.all_to_all_single)),
    ):
        yield

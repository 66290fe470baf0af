"""Reuse process groups, because making and destroying dozens of them takes seconds, and each has threads that poll a
hundred times a second.
"""

import contextlib
import io
from collections import Counter
from functools import cache
from unittest.mock import patch


class KeptGroups:
    """Replaces a function that makes process groups by one that returns existing groups.

    The n-th group of the same ranks that a user requests is the n-th that earlier users requested, so that no two
    groups of one user share a communicator.

    Args:
        owner, name: the owner and name of the function (ranks, timeout=None, **options) that makes a group.
    """

    def __init__(self, owner, name):
        import torch.distributed as dist

        self._owner, self._name, self._create = owner, name, getattr(owner, name)
        self._destroy, self._groups = dist.destroy_process_group, {}

    @contextlib.contextmanager
    def reused(self):
        """Context manager for one user of groups, in which the function is replaced and no group is destroyed."""
        import torch.distributed as dist

        asked = Counter()

        def create_group(ranks, timeout=None, **options):
            asked[tuple(ranks), timeout] += 1
            key = tuple(ranks), timeout, asked[tuple(ranks), timeout]
            if key not in self._groups:
                self._groups[key] = self._create(ranks, timeout=timeout, **options)
            return self._groups[key]

        def destroy_process_group(group=None):
            if not any(group is kept for kept in self._groups.values()):
                self._destroy(group)

        with (
            patch.object(self._owner, self._name, create_group),
            patch.object(dist, "destroy_process_group", destroy_process_group),
        ):
            yield


@cache
def of_megatron():
    """The groups that Megatron makes in this process; our own are made and destroyed by every run."""
    from megatron.core import parallel_state

    return KeptGroups(parallel_state, "create_group")


@contextlib.contextmanager
def megatron_groups(**sizes):
    """Context manager: Megatron's process groups of these sizes; yields what was printed when they were made."""
    from megatron.core import parallel_state

    with of_megatron().reused():
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            parallel_state.initialize_model_parallel(**sizes)
        try:
            yield printed.getvalue()
        finally:
            parallel_state.destroy_model_parallel()

"""The ranks over which a module computes: the context-parallel group that it was built with, and what belongs to it.

A process has no current group. A group that Megatron, a framework or a script has made is adopted at its first use: its
members alone compare their settings and make the further groups that the algorithm needs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.comm.parts import is_there
from mindspeed_cp.settings.config import ContextParallelConfig

SINGLE = ContextParallelConfig(context_parallel_size=1)
COLLECTIONS = ("pg_collection", "model_comm_pgs")  # attributes with a module's groups; the second until 0.14
OWN = "context_parallel_group"  # set on patched modules, because Megatron does not store their argument


class HeldGroup:
    """A process group on a module: copies of the module share it, and an unpickled module uses Megatron's own."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "HeldGroup":
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return HeldGroup, ()


@dataclass(frozen=True, eq=False)
class Scope:
    """One context-parallel group, seen from this rank.

    Args:
        config: the configuration for this group.
        groups: its links; those of one rank if nothing is split.
    """

    config: ContextParallelConfig
    groups: ContextParallelGroups

    @property
    def size(self) -> int:
        return self.groups.cp_size

    @property
    def rank(self) -> int:
        return self.groups.cp_rank

    @property
    def alone(self) -> bool:
        """Whether nothing is split, so that everything is left to Megatron."""
        return self.groups.cp_size == 1

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group, which exists whenever something is split."""
        group = self.groups.cp_group
        assert group is not None
        return group


class Scopes:
    """The map of groups: process group -> Scope.

    Args:
        adopt: group -> Scope, called once per group with more than one rank; collective over its ranks.
    """

    def __init__(self, adopt: Callable[[dist.ProcessGroup], Scope]) -> None:
        self._adopt = adopt
        self._known: dict[dist.ProcessGroup, Scope] = {}

    @cached_property
    def alone(self) -> Scope:
        """The scope of one rank."""
        return Scope(SINGLE, ContextParallelGroups.build(SINGLE))

    def __bool__(self) -> bool:
        return bool(self._known)

    def __iter__(self) -> Iterator[Scope]:
        """Every scope of more than one rank, once."""
        return iter({id(scope): scope for scope in self._known.values()}.values())

    def of(self, group: dist.ProcessGroup | None) -> Scope:
        """The scope of ``group``; the scope of one rank if ``group`` has one rank or is None."""
        if group is None or group.size() == 1:
            return self.alone
        scope = self._known.get(group)
        if scope is None:
            self._forget_ended()
            ranks = tuple(dist.get_process_group_ranks(group))
            # Another communicator over the same ranks shares their scope, which knows the records of their batches.
            scope = next((known for known in self if known.groups.global_ranks == ranks), None) or self._adopt(group)
            self._known[group] = scope
        return scope

    def _forget_ended(self) -> None:
        """Forget groups that were destroyed by their owners, and their scopes."""
        self._known = {
            group: scope for group, scope in self._known.items() if is_there(group) and is_there(scope.group)
        }

    def known(self, group: dist.ProcessGroup | None) -> Scope | None:
        """The scope of ``group`` if it was adopted already, else None."""
        return None if group is None else self._known.get(group)

    def items(self) -> list[tuple[dist.ProcessGroup, Scope]]:
        """Every adopted group with its scope."""
        return list(self._known.items())

    def drop(self, group: dist.ProcessGroup) -> None:
        """Adopt ``group`` again at its next use."""
        self._known.pop(group, None)

    def put(self, group: dist.ProcessGroup, scope: Scope) -> None:
        """Set the scope of ``group`` and of every other group that had the same one."""
        old = self._known.get(group)
        for other in [other for other, known in self._known.items() if known is old]:
            self._known[other] = scope
        self._known[group] = scope

    def destroy(self) -> None:
        """Destroy what was made for the groups; every rank calls it."""
        for scope in self:
            scope.groups.destroy()
        self._known.clear()

    def forget(self) -> None:
        """Forget every group without destroying what was made for it, because other ranks may not do the same."""
        self._known.clear()


def own_group() -> dist.ProcessGroup | None:
    """The context-parallel group that Megatron's initialize_model_parallel made, or None."""
    from megatron.core import parallel_state

    group: dist.ProcessGroup | None = parallel_state.get_context_parallel_group(check_initialized=False)
    return group


def named_group(owner: Any) -> dist.ProcessGroup | None:
    """The context-parallel group of a module, or in arguments for one; None if there is none.

    Args:
        owner: a module with ``cp_group`` or a collection of groups, or a mapping of arguments by name.
    """
    get = owner.get if isinstance(owner, dict) else lambda name: getattr(owner, name, None)
    for group in (
        getattr(get(OWN), "group", None),
        *(getattr(get(name), "cp", None) for name in COLLECTIONS),
        get("cp_group"),
    ):
        if isinstance(group, dist.ProcessGroup):
            return group
    return None


def group_of(owner: Any, size: int, what: str) -> dist.ProcessGroup | None:
    """The group over which a module computes: the one that it was built with, else Megatron's own.

    Args:
        owner: the module or the arguments for it, as for ``named_group``.
        size: context_parallel_size of its configuration; for 1 there is no group, whatever groups the process has.
        what: the module's name in messages.

    Raises:
        ValueError: there is no group, or it has another size.
    """
    if size == 1:
        return None
    named = named_group(owner)
    group = own_group() if named is None else named
    if group is None:
        raise ValueError(
            f"{what} has context_parallel_size {size} in its configuration, and no context-parallel group: call "
            "initialize_model_parallel(context_parallel_size=...) first, or give its pg_collection a cp group; "
            "context_parallel_size 1 computes on this rank alone."
        )
    if group.size() != size:
        raise ValueError(
            f"{what} has context_parallel_size {size} in its configuration, and its context-parallel group has "
            f"{group.size()} ranks; give both the same size (1 computes on this rank alone)."
        )
    return group


def collective_device(group: dist.ProcessGroup) -> Any:
    """The device that tensors for a collective of ``group`` must be on."""
    return "cpu" if dist.get_backend(group) == "gloo" else torch.cuda.current_device()

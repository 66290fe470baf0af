"""The parts of a context-parallel group (its Ulysses ranks, its ring) as process groups of torch."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from mindspeed_cp.comm.hccl import group_options
from mindspeed_cp.settings.algorithms import Hierarchy

PoolKey = tuple[str, tuple[int, ...], int]  # name, global ranks, how many of these were ended before
Ranks = list[list[int]]  # global ranks of every context-parallel group


def part_of_pool(
    pool: dict[PoolKey, dist.ProcessGroup],
    name: str,
    ranks: tuple[int, ...],
    timeout: timedelta | None,
    buffers: Mapping[str, int],
) -> dist.ProcessGroup:
    """Return the existing group of this name and these ranks; if the pool has none, its members make it."""
    number = 0
    while (name, ranks, number) in pool and not is_there(pool[name, ranks, number]):
        number += 1
    key = name, ranks, number
    if key not in pool:
        pool[key] = _made_by_members(key, timeout, group_options(buffers, name))
    return pool[key]


def _made_by_members(key: PoolKey, timeout: timedelta | None, options: Any) -> dist.ProcessGroup:
    """Make a group; only its members call this.

    torch names such a group by its ranks and the number of groups of this process, so that ranks with different numbers
    of groups would wait for each other under different names.
    """
    name, ranks, number = key
    known = distributed_c10d._process_group_name
    named: Any = lambda *args, **kwargs: f"mindspeed_cp {name} {ranks} {number}"  # noqa: E731
    distributed_c10d._process_group_name = named
    try:
        group: dist.ProcessGroup = dist.new_group(
            list(ranks), timeout=timeout, pg_options=options, use_local_synchronization=True
        )
        return group
    finally:
        distributed_c10d._process_group_name = known


def is_there(group: dist.ProcessGroup) -> bool:
    """Whether a process group exists, that is, was not destroyed by ``destroy_process_group``."""
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return False
    return True


def make_parts(
    all_ranks: Ranks,
    hierarchy: Hierarchy,
    timeout: timedelta | None,
    existing: Sequence[str],
    buffers: Mapping[str, int],
) -> dict[str, dist.ProcessGroup]:
    """This rank's process groups by name, without the existing ones; all ranks make all of them, in one order."""
    ulysses, _, windows = hierarchy
    made = {}
    for name, ranks in parts_of(all_ranks, ulysses, windows):
        if name not in existing:
            group = dist.new_group(list(ranks), timeout=timeout, pg_options=group_options(buffers, name))
            if dist.get_rank() in ranks:
                made[name] = group
    return made


def parts_of(all_ranks: Ranks, ulysses: int, windows: int) -> Iterator[tuple[str, Sequence[int]]]:
    """(name, global ranks) of every process group, in the order in which all ranks make them."""
    for ranks in all_ranks:
        yield "cp", ranks
        if 1 < ulysses < len(ranks):
            for start in range(0, len(ranks), ulysses):
                yield "ulysses", ranks[start : start + ulysses]
        for first in range(ulysses):
            if 1 < ulysses < len(ranks):
                yield "ring", ranks[first::ulysses]
            if windows > 1:
                yield "outer", ranks[first::ulysses]

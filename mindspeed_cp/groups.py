"""The process groups of one rank, and the buffers that it reuses from layer to layer.

Within a context-parallel group, cp_rank = ring_rank * ulysses_degree + ulysses_rank: Ulysses ranks are neighbours
(their all-to-all wants the fastest links), ring ranks are strided.
"""

from dataclasses import dataclass, field

import torch.distributed as dist

from mindspeed_cp.comm.host_memory import SMALLEST_MESSAGE, HostMemory
from mindspeed_cp.comm.workspace import Workspace


@dataclass(frozen=True, eq=False)
class ContextParallelGroups:
    """Process groups and ranks of one context-parallel group, seen from one rank; build it with ``build``.

    Attributes:
        hierarchy: (ulysses, window, windows).
        cp_rank: this rank within the context-parallel group.
        global_ranks: global ranks of the group in cp_rank order.
        cp_group, ulysses_group, ring_group: process groups, None where the part has one rank.
        outer_group: a second communicator over the ring, for transfers between windows, so that they run beside the
            transfers within a window instead of queueing behind them; None without windows.
        workspace: reused communication buffers.
        host: HostMemory shared with the ranks on this host, None where gloo or another back end carries everything.
    """

    hierarchy: tuple[int, int, int]
    cp_rank: int
    global_ranks: tuple[int, ...]
    cp_group: object = None
    ulysses_group: object = None
    ring_group: object = None
    outer_group: object = None
    workspace: Workspace = field(default_factory=Workspace, repr=False)
    host: HostMemory | None = field(default=None, repr=False)

    @property
    def cp_size(self):
        return len(self.global_ranks)

    @property
    def ulysses_degree(self):
        return self.hierarchy[0]

    @property
    def ulysses_rank(self):
        return self.cp_rank % self.ulysses_degree

    @property
    def ring_rank(self):
        return self.cp_rank // self.ulysses_degree

    @property
    def ring_size(self):
        return self.hierarchy[1] * self.hierarchy[2]

    @property
    def ring_global_ranks(self):
        """Global ranks of this rank's ring in ring_rank order."""
        return self.global_ranks[self.ulysses_rank :: self.ulysses_degree]

    @classmethod
    def build(cls, config, cp_ranks=None, timeout=None, share_from=SMALLEST_MESSAGE):
        """Make the process groups; collective over the world, so every rank calls it with the same arguments.

        Args:
            config: ContextParallelConfig.
            cp_ranks: global ranks of every context-parallel group, a list of lists; None is one group of all ranks.
            timeout: datetime.timedelta for the groups, None for the backend's default.
            share_from: bytes from which a message between gloo ranks of one host goes through shared memory; None is
                never.

        Raises:
            ValueError: the groups do not fit the configuration or the world; checked before any group is made.
        """
        cp = config.context_parallel_size
        if cp == 1:
            return cls(config.hierarchy, 0, (dist.get_rank() if dist.is_initialized() else 0,))
        all_ranks = _checked_ranks(cp, cp_ranks)
        ulysses, window, windows = config.hierarchy
        mine, rank = {}, dist.get_rank()

        def make(name, ranks):
            group = dist.new_group(list(ranks), timeout=timeout)
            if rank in ranks:
                mine[name] = group

        for ranks in all_ranks:
            make("cp_group", ranks)
            for start in range(0, cp, ulysses):
                if 1 < ulysses < cp:
                    make("ulysses_group", ranks[start : start + ulysses])
            for first in range(ulysses):
                if 1 < ulysses < cp:
                    make("ring_group", ranks[first::ulysses])
                if windows > 1:
                    make("outer_group", ranks[first::ulysses])
            if rank in ranks:
                mine["global_ranks"], mine["cp_rank"] = tuple(ranks), ranks.index(rank)
        if ulysses == cp:
            mine["ulysses_group"] = mine["cp_group"]
        elif ulysses == 1:
            mine["ring_group"] = mine["cp_group"]
        if share_from is not None:
            mine["host"] = HostMemory.connect(mine["cp_group"], share_from)
        groups = cls(config.hierarchy, **mine)
        groups._warm_up()
        return groups

    def _warm_up(self):
        """Connect every pair now: NCCL and HCCL want every rank in a group's first operation, and a ring may start with
        fewer; with gloo, a rank that destroys its groups early would break connections that others still make."""
        for group in self._distinct():
            dist.barrier(group)

    def _distinct(self):
        groups = (self.cp_group, self.ulysses_group, self.ring_group, self.outer_group)
        return {id(group): group for group in groups if group is not None}.values()

    def destroy(self):
        """Release the process groups; every rank calls it, after its last operation. The object cannot be used
        afterwards.
        """
        if self.host is not None:
            self.host.close()
        for group in self._distinct():
            dist.destroy_process_group(group)
        self.workspace.clear()


def _checked_ranks(cp, cp_ranks):
    if not dist.is_initialized():
        raise ValueError(
            f"--context-parallel-size {cp} needs torch.distributed; call init_process_group first "
            "(torchrun starts the processes)."
        )
    world = dist.get_world_size()
    all_ranks = [list(range(world))] if cp_ranks is None else [list(ranks) for ranks in cp_ranks]
    flat = [rank for ranks in all_ranks for rank in ranks]
    if any(len(ranks) != cp for ranks in all_ranks):
        sizes = sorted({len(ranks) for ranks in all_ranks})
        raise ValueError(
            f"--context-parallel-size {cp} must equal the number of ranks in each context-parallel group, "
            f"here {', '.join(map(str, sizes))} (world size {world}); start {cp} processes, or pass cp_ranks with "
            f"groups of {cp}."
        )
    if sorted(flat) != list(range(world)):
        raise ValueError(
            f"cp_ranks {all_ranks} must name each of the {world} ranks of the world exactly once; "
            "list every context-parallel group."
        )
    if any(ranks != sorted(ranks) for ranks in all_ranks):
        # torch.distributed numbers the ranks of a group in ascending order, whatever order they are given in.
        raise ValueError(f"cp_ranks {all_ranks} must ascend within each group; sort them.")
    return all_ranks

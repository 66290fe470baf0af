"""The process groups of one rank, and the buffers that it reuses from layer to layer.

Within a context-parallel group, cp_rank = ring_rank * ulysses_degree + ulysses_rank: Ulysses ranks are neighbours
(their all-to-all needs the fastest links), ring ranks are strided.
"""

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

from mindspeed_cp.comm.host_memory import SMALLEST_MESSAGE, HostMemory
from mindspeed_cp.comm.link import Link, within
from mindspeed_cp.comm.parts import PartKey, Parts, PoolKey, Ranks, make_parts, part_of_pool, parts_of
from mindspeed_cp.comm.workspace import Workspace
from mindspeed_cp.settings.agreement import agree, settings_of
from mindspeed_cp.settings.algorithms import Hierarchy
from mindspeed_cp.settings.config import ContextParallelConfig

Linkage = Literal["mesh", "switch", "nodes"]  # how ring ranks are linked, see ContextParallelConfig.topology


@dataclass(frozen=True, eq=False)
class ContextParallelGroups:
    """Process groups and ranks of one context-parallel group, seen from one rank; build it with ``build``.

    Attributes:
        hierarchy: (ulysses, window, windows).
        cp_rank: this rank within the context-parallel group.
        global_ranks: global ranks of the group in cp_rank order.
        cp, ulysses, ring: links over the whole group, the Ulysses ranks and the ring; None for a part of one rank.
        outer: a second communicator over the ring, for transfers between windows, so that they run concurrently with
            the transfers within a window instead of queueing behind them; None without windows.
        workspace: reused communication buffers.
        topology: how the ring ranks are linked, as far as the configuration asks.
        others: groups over the same ranks for the other algorithms, if layers have their own.
        made: the process groups that ``build`` made, and ``destroy`` destroys.
    """

    hierarchy: Hierarchy
    cp_rank: int
    global_ranks: tuple[int, ...]
    cp: Link | None = None
    ulysses: Link | None = None
    ring: Link | None = None
    outer: Link | None = None
    workspace: Workspace = field(default_factory=Workspace, repr=False)
    topology: Linkage = "switch"
    others: tuple["ContextParallelGroups", ...] = field(default=(), repr=False)
    made: tuple[dist.ProcessGroup, ...] = field(default=(), repr=False)

    @property
    def cp_group(self) -> dist.ProcessGroup | None:
        return None if self.cp is None else self.cp.group

    @property
    def ulysses_group(self) -> dist.ProcessGroup | None:
        return None if self.ulysses is None else self.ulysses.group

    @property
    def ring_group(self) -> dist.ProcessGroup | None:
        return None if self.ring is None else self.ring.group

    @property
    def outer_group(self) -> dist.ProcessGroup | None:
        return None if self.outer is None else self.outer.group

    @property
    def cp_size(self) -> int:
        return len(self.global_ranks)

    @property
    def ulysses_degree(self) -> int:
        return self.hierarchy[0]

    @property
    def ulysses_rank(self) -> int:
        return self.cp_rank % self.ulysses_degree

    @property
    def ring_rank(self) -> int:
        return self.cp_rank // self.ulysses_degree

    @property
    def ring_size(self) -> int:
        return self.hierarchy[1] * self.hierarchy[2]

    @property
    def ring_global_ranks(self) -> tuple[int, ...]:
        """Global ranks of this rank's ring in ring_rank order."""
        return self.global_ranks[self.ulysses_rank :: self.ulysses_degree]

    def of(self, config: ContextParallelConfig) -> "ContextParallelGroups":
        """The groups for a layer's ``config``: one of ``others`` if it has that hierarchy, else these."""
        return next((groups for groups in self.others if groups.hierarchy == config.hierarchy), self)

    @property
    def links(self) -> list[Link]:
        """The links of this hierarchy."""
        return [link for link in (self.cp, self.ulysses, self.ring, self.outer) if link is not None]

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Surround what one forward or backward pass communicates.

        If it ends with an error, messages may be under way that no later transfer can tell from its own. The groups
        then refuse transfers, which would hang or compute with keys of the interrupted pass.
        """
        try:
            yield
        except BaseException as error:
            for link in self.links:
                link.interrupt(f"{type(error).__name__}: {error}")
            raise

    @classmethod
    def build(
        cls,
        config: ContextParallelConfig,
        cp_ranks: Sequence[Sequence[int]] | None = None,
        *,
        timeout: timedelta | None = None,
        cp_group: dist.ProcessGroup | None = None,
        share_from: int | None = SMALLEST_MESSAGE,
        virtual_pipeline: bool = False,
        buffers: Mapping[str, int] | None = None,
    ) -> "ContextParallelGroups":
        """Make the process groups; collective over the world, so every rank calls it with the same arguments.

        Args:
            cp_ranks: global ranks of every context-parallel group; None is one group of all ranks.
            timeout: timeout of the new groups, None for the backend's default.
            cp_group: this rank's context-parallel group if it already exists, such as Megatron's; it is used and never
                destroyed. Every communicator costs an NPU 400 MB of buffers. Pass it on all ranks or on none.
            share_from: bytes from which a message between gloo ranks of one host goes through shared memory; None is
                never.
            virtual_pipeline: whether the model's pipeline has virtual stages, with which HCCL allows no batches of
                messages between single ranks.
            buffers: on HCCL, buffer size in MB of each new group by its name (``comm.hccl.buffers_of``); a group
                without an entry gets HCCL_BUFFSIZE.

        Raises:
            ValueError: the groups do not fit the configuration or the world, or --cp-p2p batch asks for what HCCL
                forbids; checked before any group is made.
        """
        cp = config.context_parallel_size
        if cp == 1:
            return cls(config.hierarchy, 0, (dist.get_rank() if dist.is_initialized() else 0,))
        all_ranks = _agreed_ranks(config, cp_ranks, cp_group)
        one_by_one = _one_by_one(config, virtual_pipeline)
        known = {} if cp_group is None else {("cp", _ranks_of_mine(all_ranks)): cp_group}
        made = make_parts(all_ranks, hierarchies(config), timeout, known, buffers or {})
        parts = known | made
        return cls._of(
            config, parts["cp", _ranks_of_mine(all_ranks)], parts, tuple(made.values()), share_from, one_by_one
        )

    @classmethod
    def adopt(
        cls,
        config: ContextParallelConfig,
        group: dist.ProcessGroup,
        *,
        pool: dict[PoolKey, dist.ProcessGroup],
        timeout: timedelta | None = None,
        share_from: int | None = SMALLEST_MESSAGE,
        virtual_pipeline: bool = False,
        buffers: Mapping[str, int] | None = None,
    ) -> "ContextParallelGroups":
        """Build on a context-parallel group that was made elsewhere; collective over its ranks only.

        Args:
            group: has context_parallel_size ranks; it is used and never destroyed.
            pool: (name, global ranks, number of destroyed groups before it) -> a group that is made here once and kept.
            timeout, share_from, virtual_pipeline, buffers: as in ``build``.

        Raises:
            ValueError: the group has another size, or --cp-p2p batch asks for what HCCL forbids.
        """
        ranks = dist.get_process_group_ranks(group)
        if len(ranks) != config.context_parallel_size:
            raise ValueError(
                f"--context-parallel-size {config.context_parallel_size} must equal the number of ranks in the "
                f"context-parallel group, here {len(ranks)}; give both the same size."
            )
        one_by_one = _one_by_one(config, virtual_pipeline)
        found = {}
        for name, members in parts_of([ranks], hierarchies(config)):
            if name != "cp" and dist.get_rank() in members:
                found[name, members] = part_of_pool(pool, name, members, timeout, buffers or {})
        return cls._of(config, group, found, (), share_from, one_by_one)

    @classmethod
    def _of(
        cls,
        config: ContextParallelConfig,
        whole: dist.ProcessGroup,
        parts: Parts,
        made: tuple[dist.ProcessGroup, ...],
        share_from: int | None,
        one_by_one: bool,
    ) -> "ContextParallelGroups":
        mine = tuple(dist.get_process_group_ranks(whole))
        carrier = None if share_from is None else HostMemory.connect(whole, share_from)
        link = Link(whole, mine.index(dist.get_rank()), mine, carrier=carrier, one_by_one=one_by_one)
        links = {key: within(link, group, key[1]) for key, group in parts.items()}
        first, *others = [cls._at(hierarchy, link, links) for hierarchy in hierarchies(config)]
        groups = replace(first, others=tuple(others), made=made)
        groups._warm_up()
        return groups._with_topology(config)

    @classmethod
    def _at(cls, hierarchy: Hierarchy, link: Link, links: Mapping[PartKey, Link]) -> "ContextParallelGroups":
        parts = parts_of([link.global_ranks], [hierarchy])
        mine: dict[str, Any] = {part[0]: links[part] for part in parts if part in links} | {"cp": link}
        if hierarchy[0] in (1, link.size):
            mine["ring" if hierarchy[0] == 1 else "ulysses"] = link
        return cls(hierarchy, link.rank, link.global_ranks, **mine, workspace=link.workspace)

    def _with_topology(self, config: ContextParallelConfig) -> "ContextParallelGroups":
        """A copy with the topology of each ring; collective over its ranks if a layer needs it."""
        others = tuple(groups._with_topology(config) for groups in self.others)
        asking = [each for each in config.layer_configs if each.hierarchy == self.hierarchy]
        return replace(self, topology=_topology(asking, self.ring), others=others)

    def _warm_up(self) -> None:
        """Connect every pair now: NCCL and HCCL need every rank in a group's first operation, and a ring may start with
        fewer; with gloo, a rank that destroys its groups early would break connections that others still make."""
        links = [link for each in (self, *self.others) for link in each.links]
        for group in {id(link.group): link.group for link in links}.values():
            dist.barrier(group)

    def destroy(self) -> None:
        """Destroy the process groups that were made here; every rank calls this after its last operation. The object
        cannot be used afterwards.
        """
        if self.cp is not None and self.cp.carrier is not None:
            self.cp.carrier.close()
        for group in self.made:
            dist.destroy_process_group(group)
        self.workspace.clear()


def _agreed_ranks(
    config: ContextParallelConfig, cp_ranks: Sequence[Sequence[int]] | None, cp_group: dist.ProcessGroup | None
) -> Ranks:
    """Return the checked ranks of all groups, after a check that all ranks of the world ask for the same."""
    try:
        all_ranks = _checked_ranks(config.context_parallel_size, cp_ranks)
        _check_existing(cp_group, _ranks_of_mine(all_ranks))
    except ValueError as error:
        agree({}, refusal=str(error))
        raise
    existing = "not given" if cp_group is None else "given"
    agree(settings_of(config) | {"cp_ranks": str(all_ranks), "cp_group": existing})
    return all_ranks


def _one_by_one(config: ContextParallelConfig, virtual_pipeline: bool) -> bool:
    """Whether messages between single ranks are posted one by one."""
    forbidden = virtual_pipeline and "hccl" in dist.get_backend()
    if config.p2p == "batch" and forbidden:
        raise ValueError(
            "--cp-p2p batch cannot work with virtual pipeline stages on an NPU: HCCL allows no batches of sends and "
            "receives beside them; leave it out, or use --cp-p2p isend."
        )
    return config.p2p == "isend" or forbidden


def hierarchies(config: ContextParallelConfig) -> list[Hierarchy]:
    """The different hierarchies of all layers; that of the layers without an entry comes first."""
    return list(dict.fromkeys(each.hierarchy for each in config.layer_configs))


def _topology(configs: Sequence[ContextParallelConfig], ring: Link | None) -> Linkage:
    """As configured; else several hosts are nodes, one of NPUs a mesh and any other a switch. The ranks of the ring ask
    each other where something depends on it.

    Args:
        configs: settings of the layers that use ``ring``.
    """
    if configs[0].topology != "auto":
        return configs[0].topology
    if ring is None or not any("auto" in (each.kv_exchange, each.in_flight) for each in configs):
        return "switch"
    hosts: list[str] = [""] * ring.size
    dist.all_gather_object(hosts, socket.gethostname(), group=ring.group)
    if len(set(hosts)) > 1:
        return "nodes"
    return "mesh" if "hccl" in ring.backend else "switch"


def _ranks_of_mine(all_ranks: Ranks) -> tuple[int, ...]:
    """Global ranks of this rank's context-parallel group."""
    rank = dist.get_rank()
    return next(tuple(ranks) for ranks in all_ranks if rank in ranks)


def _check_existing(cp_group: dist.ProcessGroup | None, mine: tuple[int, ...]) -> None:
    if cp_group is not None and tuple(dist.get_process_group_ranks(cp_group)) != mine:
        raise ValueError(
            f"cp_group has the global ranks {dist.get_process_group_ranks(cp_group)} and must have {list(mine)}, "
            f"the context-parallel group of rank {dist.get_rank()}; pass that group, or leave cp_group out."
        )


def _checked_ranks(cp: int, cp_ranks: Sequence[Sequence[int]] | None) -> Ranks:
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

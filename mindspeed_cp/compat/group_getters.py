"""What MindSpeed's getters of process groups and ranks answer, from the groups that an adaptor has.

Our transfers name their peer by global rank, so one group over the whole ring also serves its windows, and the getters
of the window groups return it. If there is no ring, Ulysses group or window, a getter behaves as MindSpeed's does
without that group.
"""

from collections.abc import Callable
from math import gcd
from typing import Any

import torch.distributed as dist

from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.megatron.adaptor import Adaptor


def _required(found: Any, name: str, check: bool = True) -> Any:
    if found is None and check:
        raise ValueError(
            f"{name} is not there; import mindspeed_cp.megatron_adaptor, choose an algorithm that has it, "
            "and call initialize_model_parallel first."
        )
    return found


class GroupGetters:
    """MindSpeed's functions, of the adaptor that ``adaptor`` gives when one of them is called."""

    def __init__(self, adaptor: Callable[[], Adaptor]) -> None:
        self._adaptor = adaptor

    def _ring(self) -> ContextParallelGroups | None:
        """The groups if there is a ring, else None."""
        groups = self._adaptor().groups
        return groups if groups is not None and groups.ring_size > 1 else None

    def _hybrid(self) -> ContextParallelGroups | None:
        """The groups if the algorithm is Hybrid, else None."""
        groups = self._ring()
        return groups if groups is not None and groups.ulysses_degree > 1 else None

    def _neighbour(self, steps: int) -> int:
        """Global rank of the context-parallel rank ``steps`` after this one, cyclically."""
        main = self._adaptor().main
        if main.alone:
            return dist.get_rank()
        ranks = main.groups.global_ranks
        return ranks[(main.rank + steps) % len(ranks)]

    def get_context_parallel_next_rank(self) -> int:
        return self._neighbour(1)

    def get_context_parallel_prev_rank(self) -> int:
        return self._neighbour(-1)

    def get_context_parallel_group_for_send_recv_overlap(
        self, check_initialized: bool = True
    ) -> dist.ProcessGroup | None:
        """A group for transfers that overlap others; the ring's own group if there are no windows."""
        ring = _required(self._ring(), "the context-parallel group for send-recv overlap", check_initialized)
        return None if ring is None else ring.outer_group or ring.ring_group

    def get_context_parallel_group_for_hybrid_ulysses(self, check_initialized: bool = True) -> dist.ProcessGroup | None:
        groups = _required(self._hybrid(), "the Ulysses group of hybrid_cp_algo", check_initialized)
        return None if groups is None else groups.ulysses_group

    def get_context_parallel_for_hybrid_ulysses_world_size(self) -> int:
        return dist.get_world_size(self.get_context_parallel_group_for_hybrid_ulysses())

    def get_context_parallel_for_hybrid_ulysses_rank(self) -> int:
        return dist.get_rank(self.get_context_parallel_group_for_hybrid_ulysses())

    def get_context_parallel_group_for_hybrid_ring(self, check_initialized: bool = True) -> dist.ProcessGroup | None:
        groups = _required(self._hybrid(), "the ring group of hybrid_cp_algo", check_initialized)
        return None if groups is None else groups.ring_group

    def get_context_parallel_for_hybrid_ring_world_size(self) -> int:
        return dist.get_world_size(self.get_context_parallel_group_for_hybrid_ring())

    def get_context_parallel_for_hybrid_ring_rank(self) -> int:
        return dist.get_rank(self.get_context_parallel_group_for_hybrid_ring())

    def get_context_parallel_for_hybrid_ring_global_ranks(self) -> list[int]:
        return list(_required(self._hybrid(), "the ring of hybrid_cp_algo").ring_global_ranks)

    def get_ring_group_for_intra_window(self) -> dist.ProcessGroup | None:
        ring = self._ring()
        return None if ring is None else ring.ring_group

    def get_ring_group_for_intra_window_send_recv_overlap(self) -> dist.ProcessGroup | None:
        return self.get_context_parallel_group_for_send_recv_overlap(check_initialized=False)

    def _window_place(self) -> tuple[list[int], int, int, int]:
        """(global ranks of the ring, window size, index of this rank's window, this rank's index in it)."""
        ring = _required(self._ring(), "the ring")
        window = _inner_size(ring)
        return list(ring.ring_global_ranks), window, *divmod(ring.ring_rank, window)

    def get_ring_ranks_for_intra_window(self) -> list[int]:
        """Global ranks of this rank's window."""
        ranks, window, place_w, _ = self._window_place()
        return ranks[place_w * window : (place_w + 1) * window]

    def get_ring_ranks_for_inter_window_kv(self) -> list[int]:
        """Global ranks with this rank's index in each window, between which keys and values cross windows."""
        ranks, window, _, place_i = self._window_place()
        return ranks[place_i::window]

    def get_ring_ranks_for_inter_window_dkv(self) -> list[int]:
        """MindSpeed's ring for gradients between windows, which advances by one window and one index per step."""
        ranks, window, place_w, place_i = self._window_place()
        windows = len(ranks) // window
        # MindSpeed lists each such ring starting with its first rank in the first window.
        first = (place_i - place_w) % gcd(window, windows)
        place, found = (0, first), []
        while ranks[place[0] * window + place[1]] not in found:
            found.append(ranks[place[0] * window + place[1]])
            place = (place[0] + 1) % windows, (place[1] + 1) % window
        return found

    def check_initialized_for(self, purpose: str, context_parallel_size: int) -> None:
        """Instead of MindSpeed's makers of groups: initialize_model_parallel has made them all here."""
        if context_parallel_size > 1:
            _required(self._adaptor().groups, f"the groups for {purpose}")


def _inner_size(ring: ContextParallelGroups) -> int:
    """MindSpeed's inner size; in MindSpeed a ring without windows has windows of one rank."""
    return ring.hierarchy[1] if ring.hierarchy[2] > 1 else 1


# Functions that MindSpeed also sets on megatron.core.parallel_state.
GETTERS = tuple(name for name in vars(GroupGetters) if name.startswith("get_"))

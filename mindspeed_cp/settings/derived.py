"""Values derived from the settings of a context-parallel group, and settings that the chosen algorithm ignores."""

from typing import Literal, get_args

from mindspeed_cp.settings.algorithms import ALGORITHMS, Algorithm, Hierarchy
from mindspeed_cp.settings.setting import declarations

MaskType = Literal["causal", "full", "general"]
KVCachePolicy = Literal["full", "half"]
KVExchange = Literal["ring", "direct", "mesh", "auto"]
Topology = Literal["auto", "mesh", "switch", "nodes"]
P2P = Literal["auto", "batch", "isend"]
LinearExchange = Literal["heads", "state"]
BatchLayout = Literal["auto", "contiguous", "zigzag", "document_zigzag", "balanced"]

MASK_TYPES: tuple[MaskType, ...] = get_args(MaskType)
KV_CACHE_POLICIES: tuple[KVCachePolicy | None, ...] = (None, *get_args(KVCachePolicy))


class Derived:
    """Derived values of ``ContextParallelConfig``, which declares the settings."""

    context_parallel_size: int
    algorithm: str
    ulysses_degree: int | None
    window_size: int
    attention_mask_type: MaskType
    batch_layout: BatchLayout
    ranks_per_node: int | None
    kv_exchange: KVExchange
    in_flight: int | Literal["auto"]
    topology: Topology
    p2p: P2P
    kv_cache_policy: KVCachePolicy | None
    kv_cache_interval: int
    log: bool

    @property
    def row(self) -> Algorithm:
        """The algorithm's row of the table."""
        return ALGORITHMS[self.algorithm]

    @property
    def _ring_of_window(self) -> int:
        """Size of the ring that a window must divide; used before the hierarchy, which needs a valid window."""
        return self.context_parallel_size // (self.ulysses_degree or 1 if self.row.takes_degree else 1)

    @property
    def _is_one_window(self) -> bool:
        return self.row.takes_window and self.window_size == self._ring_of_window > 1

    def ignored_settings(self) -> list[str]:
        """Warnings about settings that the chosen algorithm ignores."""
        algorithm = f"--context-parallel-algo {self.algorithm}"
        found = [each.notice(getattr(self, each.name), self.algorithm) for each in declarations(type(self))]
        unread = "auto" not in (self.kv_exchange, self.in_flight) and self.topology != "auto"
        alike = self.batch_layout == "balanced" and self.row.exchange is None and self.context_parallel_size > 1
        all_at_once = self.p2p != "auto" and self.kv_exchange == "mesh"
        unplaced = self.ranks_per_node is not None and not self._may_be_balanced
        silent = self.log and self.context_parallel_size == 1
        one_by_one = self.in_flight not in (1, "auto") and not self._takes_several_steps
        across = {
            f"--cp-window-size {self.window_size} is one window of all {self.window_size} ranks of the ring: the plain "
            "ring.": self._is_one_window,
            f"--cp-batch-layout balanced is contiguous for {algorithm}, whose ranks have equal work anyway.": alike,
            f"--cp-p2p {self.p2p} is ignored: the mesh exchange sends no messages between single ranks.": all_at_once,
            f"--cp-in-flight {self.in_flight} is ignored: a plain ring forwards one step at a time.": one_by_one,
            f"--cp-topology {self.topology} is ignored: neither --cp-kv-exchange nor --cp-in-flight is auto.": unread,
            f"--cp-ranks-per-node {self.ranks_per_node} is ignored: only the balanced layout of a ring reads it.": (
                unplaced
            ),
            "--cp-log says nothing at --context-parallel-size 1 without --hybrid-context-parallel.": silent,
        }
        return [*filter(None, found), *(message for message, applies in across.items() if applies)]

    @property
    def _takes_several_steps(self) -> bool:
        return self.row.exchange == "ring" and (self.kv_exchange != "ring" or self.hierarchy[2] > 1)

    @property
    def hierarchy(self) -> Hierarchy:
        """(ulysses, window, windows), whose product is context_parallel_size; it determines the algorithm."""
        return self.row.hierarchy(self)

    @property
    def ring_size(self) -> int:
        return self.context_parallel_size // self.hierarchy[0]

    @property
    def ring_ranks_per_node(self) -> int | None:
        """Number of ring ranks per node, None if unknown."""
        return None if self.ranks_per_node is None else max(1, self.ranks_per_node // self.hierarchy[0])

    @property
    def _may_be_balanced(self) -> bool:
        return self.ring_size > 1 and (
            self.batch_layout == "balanced" or self.batch_layout == "auto" and self.layout_kind == "zigzag"
        )

    @property
    def causal(self) -> bool:
        """Whether a layer is causal if the batch contains no mask."""
        return self.attention_mask_type != "full"

    @property
    def layout_kind(self) -> Literal["contiguous", "zigzag", "document_zigzag", "balanced"]:
        """The layout kind for ``batch_layout``; "auto" is zigzag for a causal ring, else contiguous."""
        if self.batch_layout == "balanced" and self.ring_size == 1:
            return "contiguous"
        if self.batch_layout != "auto":
            return self.batch_layout
        return "zigzag" if self.ring_size > 1 and self.causal else "contiguous"

    def kv_cache_policy_for(self, layer_number: int) -> KVCachePolicy | None:
        """The policy of a layer (global number, from 1); interval n applies it to layers with layer % (n + 1) == 1."""
        return self.kv_cache_policy if (layer_number - 1) % (self.kv_cache_interval + 1) == 0 else None

"""The table of algorithms: each is a point of the triple (ulysses, window, windows) and an exchange of keys and values.

Flag choices, rules, layouts and test parameters derive from this table; no other code compares algorithm names. A new
algorithm is a row here, and a new exchange in comm/kv_exchange.py if it needs one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

Hierarchy = tuple[int, int, int]


class Sizes(Protocol):
    """The sizes from which a hierarchy is computed; implemented by ``ContextParallelConfig``."""

    @property
    def context_parallel_size(self) -> int: ...
    @property
    def ulysses_degree(self) -> int | None: ...
    @property
    def window_size(self) -> int: ...


@dataclass(frozen=True)
class Algorithm:
    """One row: how the context-parallel size is factored, how keys and values travel, and which settings apply.

    Args:
        title: the name in messages.
        hierarchy: config -> (ulysses, window, windows); the product is the context-parallel size.
        exchange: "ring", "allgather", or None if the ring has one rank, so that no keys and values travel.
        splits_heads: whether every rank computes a share of the heads, so that there must be enough heads.
        takes_degree: whether --ulysses-degree-in-cp applies and is required.
        takes_window: whether --cp-window-size applies.
        any_length: whether it takes any sequence length without --gather-size-calculator.
        summary: one line for --help and the documentation.
        comm_types: Megatron's names for it, in --cp-comm-type.
        file_names: MindFormers' names for it, in its YAML files.
    """

    title: str
    hierarchy: Callable[[Sizes], Hierarchy]
    exchange: Literal["ring", "allgather"] | None
    summary: str
    splits_heads: bool = False
    takes_degree: bool = False
    takes_window: bool = False
    any_length: bool = True
    comm_types: tuple[str, ...] = ()
    file_names: tuple[str, ...] = ()


def _ring_hierarchy(ulysses: int, ring: int, window: int) -> Hierarchy:
    """A window size of 1 means the plain ring, which is one window of all ring ranks."""
    return (ulysses, ring, 1) if window == 1 else (ulysses, window, ring // window)


def _degree(config: Sizes) -> int:
    assert config.ulysses_degree is not None, "a rule of the configuration"
    return config.ulysses_degree


ALGORITHMS: dict[str, Algorithm] = {
    "ulysses_cp_algo": Algorithm(
        "Ulysses",
        lambda c: (c.context_parallel_size, 1, 1),
        None,
        "all-to-all: every rank sees the whole sequence for a share of the heads",
        splits_heads=True,
        any_length=False,
        comm_types=("a2a",),
        file_names=("ulysses_cp",),
    ),
    "megatron_cp_algo": Algorithm(
        "Ring",
        lambda c: _ring_hierarchy(1, c.context_parallel_size, c.window_size),
        "ring",
        "keys and values travel around a ring, or a double ring with --cp-window-size",
        takes_window=True,
        comm_types=("p2p",),
        file_names=("colossalai_cp",),
    ),
    "hybrid_cp_algo": Algorithm(
        "Hybrid",
        lambda c: _ring_hierarchy(_degree(c), c.context_parallel_size // _degree(c), c.window_size),
        "ring",
        "Ulysses inside groups of --ulysses-degree-in-cp ranks, a ring between them",
        splits_heads=True,
        takes_degree=True,
        takes_window=True,
        comm_types=("a2a+p2p",),
        file_names=("hybrid_cp", "hybird_cp"),  # MindFormers takes both
    ),
    "kvallgather_cp_algo": Algorithm(
        "KV all-gather",
        lambda c: (1, c.context_parallel_size, 1),
        "allgather",
        "one all-gather of keys and values per layer",
        comm_types=("all_gather", "allgather"),  # the second is the spelling in Megatron's help
    ),
}
DEFAULT = "ulysses_cp_algo"
_ADAPTIVE = (
    "it reorders tokens to suit one dense mask; here blocks that a mask empties are skipped for every algorithm: "
    "take {way_out} with --cp-kv-exchange direct"
)
# Algorithms that only MindSpeed has -> why they are not supported, and the nearest one here.
REFUSED = {
    "adaptive_cp_algo": _ADAPTIVE.format(way_out="megatron_cp_algo"),
    "hybrid_adaptive_cp_algo": _ADAPTIVE.format(way_out="hybrid_cp_algo with --ulysses-degree-in-cp"),
    "mamba_cp_algo": "it belongs to MindSpeed-LLM's own Mamba layers; Megatron's (megatron.core.ssm) run with every "
    "algorithm: take ulysses_cp_algo",
}


def titled(row: Algorithm, hierarchy: Hierarchy) -> str:
    """The title of a row with the sizes of its hierarchy, such as "Hybrid (ulysses 2, ring 4)"."""
    ulysses, window, windows = hierarchy
    if windows > 1:
        by = f"window {window}" if ulysses == 1 else f"ulysses {ulysses}, window {window}"
        return f"{'Double ' if ulysses == 1 else ''}{row.title} ({by})"
    return f"{row.title} (ulysses {ulysses}, ring {window})" if ulysses > 1 and window > 1 else row.title


def known_algorithm(name: str) -> str:
    """``name``, if it is an algorithm.

    Raises:
        ValueError: the name is unknown, or the algorithm exists only in MindSpeed.
    """
    if name in REFUSED:
        raise ValueError(f"--context-parallel-algo {name} is not supported: {REFUSED[name]}.")
    if name not in ALGORITHMS:
        raise ValueError(f"--context-parallel-algo {name} is not known; choose one of {', '.join(ALGORITHMS)}.")
    return name


def summaries() -> dict[str, str]:
    """Algorithm -> its line in --help."""
    return {name: row.summary for name, row in ALGORITHMS.items()}


def algorithm_named(attribute: Literal["comm_types", "file_names"], name: str) -> str | None:
    """The first algorithm with this name in Megatron or MindFormers, None if there is none."""
    return next((ours for ours, row in ALGORITHMS.items() if name in getattr(row, attribute)), None)


def names_with(**properties: object) -> str:
    """The algorithms whose rows have these properties, as text for an error message."""
    found = [
        name
        for name, row in ALGORITHMS.items()
        if all(getattr(row, attribute) == value for attribute, value in properties.items())
    ]
    return " or ".join(found)

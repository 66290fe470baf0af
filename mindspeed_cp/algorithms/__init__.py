"""The table of algorithms: each is a point of the triple (ulysses, window, windows) and an exchange of keys and values.

Flag choices, layouts and test parameters derive from this table. A new algorithm is a row here, and a file beside this
one if it needs an exchange that does not exist yet.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Algorithm:
    """One row: how the context-parallel size is factored, and how keys and values travel between ring ranks.

    Args:
        title: the name in messages.
        hierarchy: config -> (ulysses, window, windows); the product is the context-parallel size.
        exchange: "ring", "allgather", or None when the ring has one rank and nothing travels around it.
        uses_window: whether --cp-window-size has a meaning.
        summary: one line for --help and the documentation.
    """

    title: str
    hierarchy: Callable
    exchange: str | None
    uses_window: bool
    summary: str


def _ring_hierarchy(ulysses, ring, window):
    """A window of 1 is the plain ring: one window that holds every ring rank."""
    return (ulysses, ring, 1) if window == 1 else (ulysses, window, ring // window)


ALGORITHMS = {
    "ulysses_cp_algo": Algorithm(
        "Ulysses",
        lambda c: (c.context_parallel_size, 1, 1),
        None,
        False,
        "all-to-all: every rank sees the whole sequence for a share of the heads",
    ),
    "megatron_cp_algo": Algorithm(
        "Ring",
        lambda c: _ring_hierarchy(1, c.context_parallel_size, c.window_size),
        "ring",
        True,
        "keys and values travel around a ring, or a double ring with --cp-window-size",
    ),
    "hybrid_cp_algo": Algorithm(
        "Hybrid",
        lambda c: _ring_hierarchy(c.ulysses_degree, c.context_parallel_size // c.ulysses_degree, c.window_size),
        "ring",
        True,
        "Ulysses inside groups of --ulysses-degree-in-cp ranks, a ring between them",
    ),
    "kvallgather_cp_algo": Algorithm(
        "KV all-gather",
        lambda c: (1, c.context_parallel_size, 1),
        "allgather",
        False,
        "one all-gather of keys and values per layer",
    ),
}

"""Megatron's way of naming an algorithm (``cp_comm_type``) -> ours; MindSpeed's core_r0.18.0 knows no other.

The flag, the same field of a TransformerConfig and the same key of a framework's dict all come through here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ALGORITHM_OF = {
    "p2p": "megatron_cp_algo",
    "a2a": "ulysses_cp_algo",
    "all_gather": "kvallgather_cp_algo",
    "allgather": "kvallgather_cp_algo",  # as Megatron's help spells it
    "a2a+p2p": "hybrid_cp_algo",
}
_SIZES = "--hierarchical-context-parallel-sizes"


@dataclass(frozen=True)
class Choice:
    """An algorithm, and the ranks that split the heads where it is Hybrid."""

    algorithm: str
    ulysses_degree: int | None = None


def comm_kinds(cp_comm_type: str | Sequence[str] | None) -> tuple[str, ...]:
    """``cp_comm_type`` as a tuple, one value or one for each layer; () when there is none."""
    if cp_comm_type is None:
        return ()
    return (cp_comm_type,) if isinstance(cp_comm_type, str) else tuple(map(str, cp_comm_type))


def choice_of_comm_type(
    cp_comm_type: str | Sequence[str], cp_size: int, sizes: Sequence[int] | None = None, degree: int | None = None
) -> Choice:
    """The algorithm that a ``cp_comm_type`` names.

    Args:
        cp_comm_type: "p2p", "a2a", "all_gather" or "a2a+p2p", or a list of one for each layer.
        cp_size: context-parallel size.
        sizes: Megatron's hierarchical_context_parallel_sizes, the ranks of the all-to-all first.
        degree: --ulysses-degree-in-cp, which may stand in for ``sizes``.

    Raises:
        ValueError: a value is not known, the list mixes kinds, or the sizes do not fit.
    """
    kinds = comm_kinds(cp_comm_type)
    unknown = [kind for kind in kinds if kind not in ALGORITHM_OF]
    if unknown:
        raise ValueError(
            f"--cp-comm-type {unknown[0]} is not known; choose one of p2p, a2a, all_gather, a2a+p2p, or name the "
            "algorithm with --context-parallel-algo."
        )
    algorithms = list(dict.fromkeys(ALGORITHM_OF[kind] for kind in kinds))
    if len(algorithms) != 1:
        raise ValueError(
            f"--cp-comm-type {' '.join(kinds) or '(empty)'} must be one kind for all layers, because every layer works "
            f"on the same split of the batch; use --cp-comm-type {kinds[0] if kinds else 'p2p'}, or --cp-comm-type "
            "a2a+p2p (hybrid_cp_algo), which does both in every layer."
        )
    if algorithms[0] != "hybrid_cp_algo":
        return Choice(algorithms[0])
    return _hybrid(cp_size, degree_from_sizes(cp_size, sizes, degree))


def degree_from_sizes(cp_size: int, sizes: Sequence[int] | None, degree: int | None) -> int | None:
    """Ranks that split the heads, from Megatron's hierarchical sizes or from our own flag; None when neither is given.

    Raises:
        ValueError: the sizes are not two whose product is the context-parallel size, or the two sources disagree.
    """
    if not sizes:
        return degree
    text = " ".join(map(str, sizes))
    if len(sizes) != 2 or sizes[0] * sizes[1] != cp_size:
        raise ValueError(
            f"{_SIZES} {text} must be two numbers, the ranks of the all-to-all and those of the ring, whose product is "
            f"--context-parallel-size {cp_size}; use {_SIZES} {_example(cp_size)}."
        )
    if degree is not None and degree != sizes[0]:
        raise ValueError(
            f"{_SIZES} {text} and --ulysses-degree-in-cp {degree} disagree; leave one out, or use "
            f"--ulysses-degree-in-cp {sizes[0]}."
        )
    return sizes[0]


def _hybrid(cp_size: int, degree: int | None) -> Choice:
    """Hybrid; with one rank on either side it is plain Ring or plain Ulysses."""
    if degree is None:
        raise ValueError(
            f"--cp-comm-type a2a+p2p needs {_SIZES}, the ranks of the all-to-all and those of the ring; use {_SIZES} "
            f"{_example(cp_size)}, or --ulysses-degree-in-cp."
        )
    if degree in (1, cp_size):
        return Choice("megatron_cp_algo" if degree == 1 else "ulysses_cp_algo")
    return Choice("hybrid_cp_algo", degree)


def _example(cp_size: int) -> str:
    first = next((size for size in range(2, cp_size) if cp_size % size == 0), 1)
    return f"{first} {cp_size // first}"

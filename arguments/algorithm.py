"""Choose the algorithm, from --context-parallel-algo or Megatron's ``cp_comm_type``, and how many ranks split heads.

MindSpeed's core_r0.18.0 has only ``cp_comm_type``. Flags, fields of a TransformerConfig and keys of a framework's dict
are all handled here.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed_cp.settings.algorithms import ALGORITHMS, algorithm_named, known_algorithm
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.layers import EXAMPLE, FLAG, ranges_of, read_layers, written

_SIZES = "--hierarchical-context-parallel-sizes"


@dataclass(frozen=True)
class Choice:
    """An algorithm, Hybrid's number of ranks that split the heads, and a notice of how this number was chosen.

    ``layers`` names the layers with another algorithm, in the grammar of --cp-layer-algo; None leaves them to the flag.
    """

    algorithm: str
    ulysses_degree: int | None = None
    notice: str = ""
    layers: str | None = None


def chosen_algorithm(args: Any, node_ranks: int | None = None) -> Choice:
    """The algorithm named by --context-parallel-algo, else by --cp-comm-type, else the default.

    A parser records in ``args.cp_given`` which names were given. In a namespace without this list all names count as
    given, except the communication type p2p, Megatron's default. If Hybrid gets no degree, one is chosen that fits
    ``node_ranks``, by default the launcher's number.

    Raises:
        ValueError: the algorithm exists only in MindSpeed, or the communication types are unknown or not one per layer.
    """
    name = known_algorithm(args.context_parallel_algo)
    cp, degree = args.context_parallel_size, args.ulysses_degree_in_cp
    sizes = getattr(args, "hierarchical_context_parallel_sizes", None)
    layers = getattr(args, "cp_layer_algo", None)
    if cp > 1 and not algorithm_is_given(args) and given_kinds(args):
        kinds = given_kinds(args)
        choice = choice_of_comm_type(kinds, cp, sizes, degree, getattr(args, "num_layers", None))
        if layers and choice.layers not in (None, layers):
            raise ValueError(
                f"{FLAG} {layers} and --cp-comm-type {' '.join(kinds)} both say which algorithm a layer has; leave one "
                "of them out."
            )
        return choice
    if not any(ALGORITHMS[each].takes_degree for each in (name, *_waiting_for_a_degree(layers))):
        return Choice(name, degree)
    degree = degree_from_sizes(cp, sizes, degree)
    return Choice(name, degree) if degree is not None else _with_a_degree(name, args, node_ranks or ranks_of_node())


def _waiting_for_a_degree(layers: str | None) -> list[str]:
    """The algorithms of layers for which no degree is named."""
    entries = read_layers(layers, ContextParallelConfig.by_layer()) if layers else ()
    named = [entry.named for entry in entries]
    return [values["algorithm"] for values in named if "algorithm" in values and "ulysses_degree" not in values]


def algorithm_is_given(args: Any) -> bool:
    return "context_parallel_algo" in getattr(args, "cp_given", ("context_parallel_algo",))


def given_kinds(args: Any) -> tuple[str, ...]:
    """The communication types that were given; () for Megatron's default."""
    kinds = comm_kinds(getattr(args, "cp_comm_type", None))
    return kinds if "cp_comm_type" in getattr(args, "cp_given", ()) or kinds != ("p2p",) else ()


def ranks_of_node() -> int:
    """How many ranks the launcher started on this node, 8 if unknown."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isdecimal() and int(text) > 0 else 8


def _with_a_degree(name: str, args: Any, node: int) -> Choice:
    """Choose as degree the largest proper divisor of the context-parallel size that divides the heads of a
    tensor-parallel rank and whose ranks, at a stride of tensor parallel size, fit into a node; none if nothing fits.
    """
    cp, tp = args.context_parallel_size, max(getattr(args, "tensor_model_parallel_size", 1), 1)  # 0 is rejected later
    heads = getattr(args, "num_attention_heads", None)
    fitting = [
        degree
        for degree in range(2, min(cp // 2, node // tp) + 1)
        if cp % degree == 0 and (heads is None or heads % (tp * degree) == 0)
    ]
    if not fitting:
        return Choice(name)
    of_heads = "" if heads is None else f"the {heads // tp} heads of a tensor-parallel rank and "
    return Choice(
        name,
        fitting[-1],
        f"--ulysses-degree-in-cp is not given: {fitting[-1]} is the largest divisor of --context-parallel-size {cp} "
        f"that fits {of_heads}the {node} ranks of a node; give --ulysses-degree-in-cp to change it.",
    )


def comm_kinds(cp_comm_type: str | Sequence[str] | None) -> tuple[str, ...]:
    """``cp_comm_type`` as a tuple of one value or one per layer; () if there is none."""
    if cp_comm_type is None:
        return ()
    return (cp_comm_type,) if isinstance(cp_comm_type, str) else tuple(map(str, cp_comm_type))


def choice_of_comm_type(
    cp_comm_type: str | Sequence[str],
    cp_size: int,
    sizes: Sequence[int] | None = None,
    degree: int | None = None,
    num_layers: int | None = None,
) -> Choice:
    """The algorithm that a ``cp_comm_type`` means.

    Args:
        cp_comm_type: "p2p", "a2a", "all_gather" or "a2a+p2p", or a list with one per layer. The most frequent one
            becomes the algorithm; ``layers`` of the result names the other layers.
        cp_size: context-parallel size.
        sizes: Megatron's hierarchical_context_parallel_sizes, the ranks of the all-to-all first.
        degree: --ulysses-degree-in-cp, which may replace ``sizes``.
        num_layers: of the model; None if unknown.

    Raises:
        ValueError: a value is not known, the list has not one entry per layer, or the sizes do not fit.
    """
    kinds = comm_kinds(cp_comm_type)
    if not kinds:
        raise ValueError("--cp-comm-type (empty) names no communication; use --cp-comm-type p2p, or leave it out.")
    choices = {kind: _choice_of_kind(kind, cp_size, sizes, degree) for kind in dict.fromkeys(kinds)}
    algorithms = [choices[kind].algorithm for kind in kinds]
    if len(set(algorithms)) == 1:
        return choices[kinds[0]]
    if num_layers is not None and len(kinds) != num_layers:
        raise ValueError(
            f"--cp-comm-type names {len(kinds)} ways and --num-layers is {num_layers}; name one for each layer, or one "
            f"for all, or use {EXAMPLE}."
        )
    most = max(algorithms, key=algorithms.count)
    degrees = {choice.ulysses_degree for choice in choices.values()} - {None}
    return Choice(most, next(iter(degrees), None), layers=_written(algorithms, most))


def _choice_of_kind(kind: str, cp_size: int, sizes: Sequence[int] | None, degree: int | None) -> Choice:
    algorithm = algorithm_named("comm_types", kind)
    if algorithm is None:
        raise ValueError(
            f"--cp-comm-type {kind} is not known; choose one of p2p, a2a, all_gather, a2a+p2p, or name the algorithm "
            "with --context-parallel-algo."
        )
    if not ALGORITHMS[algorithm].takes_degree:
        return Choice(algorithm)
    degree = degree_from_sizes(cp_size, sizes, degree)
    if degree is None:
        raise ValueError(
            f"--cp-comm-type a2a+p2p needs {_SIZES}, the ranks of the all-to-all and those of the ring; use {_SIZES} "
            f"{_example(cp_size)}, or --ulysses-degree-in-cp."
        )
    return two_levels(algorithm, cp_size, degree)


def _written(algorithms: Sequence[str], most: str) -> str:
    """The layers whose algorithm is not ``most``, as --cp-layer-algo has them."""
    others = [name for name in dict.fromkeys(algorithms) if name != most]
    entries = [
        (layers, {"algorithm": name})
        for name in others
        for layers in ranges_of([layer for layer, each in enumerate(algorithms) if each == name])
    ]
    return written(entries, ())


def degree_from_sizes(cp_size: int, sizes: Sequence[int] | None, degree: int | None) -> int | None:
    """Ranks that split the heads, from Megatron's hierarchical sizes or our own flag; None if neither is given.

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


def two_levels(algorithm: str, cp_size: int, degree: int) -> Choice:
    """``algorithm`` with this degree; with degree 1 or ``cp_size`` it becomes plain Ring or plain Ulysses."""
    alone = {1: "p2p", cp_size: "a2a"}.get(degree)
    return Choice(algorithm, degree) if alone is None else Choice(algorithm_named("comm_types", alone) or algorithm)


def _example(cp_size: int) -> str:
    first = next((size for size in range(2, cp_size) if cp_size % size == 0), 1)
    return f"{first} {cp_size // first}"

"""Rules across settings, helpers to write them and to read numbers, and the rule of tensor parallelism for heads."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby

from mindspeed_cp.settings.algorithms import ALGORITHMS, Algorithm, names_with

MOST_RANKS = 1 << 16  # messages list no divisors above this; a flag may have any value
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def listed(values: Iterable[object]) -> str:
    found = [str(value) for value in values]
    return found[0] if len(found) == 1 else ", ".join(found[:-1]) + " or " + found[-1] if found else ""


def divisors(number: int, low: int, high: int) -> str:
    """Divisors d of ``number`` with low <= d <= high (at most MOST_RANKS), as text for an error message."""
    return listed([d for d in range(max(low, 1), min(high, MOST_RANKS) + 1) if number % d == 0])


def consecutive(numbers: Iterable[int]) -> list[list[int]]:
    """Ascending numbers as lists of neighbours."""
    runs = groupby(enumerate(numbers), lambda placed: placed[1] - placed[0])
    return [[number for _, number in run] for _, run in runs]


def tokens(text: str) -> int:
    """Parse a length such as 131072, 128k or 1m; k is 1,024 and m 1,048,576.

    Raises:
        ValueError: ``text`` is not such a number. The message names value and rule; argparse adds the flag.
    """
    match = re.fullmatch(r"0*([1-9][0-9]*)([km]?)", text.strip().lower())
    if not match:
        raise ValueError(f"{text!r} is not a length; write a number of tokens above 0, such as 4096, 128k or 1m.")
    return int(match[1]) * UNITS[match[2]]


def require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)


@contextmanager
def said_of(what: str) -> Iterator[None]:
    """Put ``what``, such as a flag and its value, before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def require_even_tokens(length: int, cp: int, tp: int) -> None:
    """Raise ValueError unless a context-parallel rank's tokens split evenly over ``tp`` sequence-parallel ranks."""
    require(
        length % (cp * tp) == 0,
        f"--seq-length {length} must be divisible by --context-parallel-size {cp} x --tensor-model-parallel-size {tp} "
        f"= {cp * tp} with --sequence-parallel, which splits each rank's tokens again; use --seq-length "
        f"{length // (cp * tp) * cp * tp or cp * tp}, or leave out --sequence-parallel.",
    )


def heads_of_rank(heads: int, groups: int, tp: int) -> tuple[int, int]:
    """(query heads, KV heads) of a tensor-parallel rank; with more ranks than KV heads, several ranks hold the same.

    Raises:
        ValueError: Megatron cannot split the heads like this; before 0.16 it needs at least one KV head per rank.
    """
    require(
        heads % tp == 0,
        f"--num-attention-heads {heads} must be divisible by --tensor-model-parallel-size {tp}; choose "
        f"{divisors(heads, 1, heads)}.",
    )
    require(
        groups % tp == 0 or tp % groups == 0,
        f"--num-query-groups {groups} must be a multiple or a divisor of --tensor-model-parallel-size {tp}; choose "
        f"{divisors(groups, 1, groups)}.",
    )
    return heads // tp, max(groups // tp, 1)


def check_degree(algorithm: str, cp: int, degree: int | None) -> None:
    if not ALGORITHMS[algorithm].takes_degree:
        return
    choices = divisors(cp, 2, cp - 1)
    way_out = (
        f"choose {choices}"
        if choices
        else (
            f"no number does for --context-parallel-size {cp}: take a size that is not prime, such as 4, or "
            f"--context-parallel-algo {names_with(takes_degree=False)}"
        )
    )
    needs = f"--ulysses-degree-in-cp is not given, and --context-parallel-algo {algorithm} needs it; {way_out}."
    require(degree is not None, needs)
    assert degree is not None
    require(
        1 < degree < cp,
        f"--ulysses-degree-in-cp {degree} must lie between 1 and --context-parallel-size {cp}, both excluded; "
        f"{way_out}.",
    )
    require(cp % degree == 0, f"--ulysses-degree-in-cp {degree} must divide --context-parallel-size {cp}; {way_out}.")


def check_window(row: Algorithm, window: int, ring: int) -> None:
    require(
        window == 1 or not row.takes_window or ring % window == 0,
        f"--cp-window-size {window} must be at most the ring size {ring} and divide it; "
        f"choose {divisors(ring, 1, max(ring - 1, 1))}.",
    )


def check_kv_cache(cp: int, policy: str | None, interval: int) -> None:
    require(
        policy is None or cp > 1,
        f"--context-parallel-kv-cache-policy {policy} needs --context-parallel-size above 1; "
        "leave it out or use --context-parallel-size 2 or more.",
    )
    require(
        interval == 0 or policy is not None,
        f"--context-parallel-cache-interval {interval} needs --context-parallel-kv-cache-policy; "
        "add --context-parallel-kv-cache-policy full or half.",
    )


def check_keep_attention(cp: int, keep_attention: bool) -> None:
    require(
        not keep_attention or cp > 1,
        "--cp-keep-attention needs --context-parallel-size above 1; leave it out or use --context-parallel-size 2 or "
        "more.",
    )


def check_exchange(algorithm: str, exchange: str, window: int) -> None:
    if exchange not in ("direct", "mesh"):
        return
    require(
        ALGORITHMS[algorithm].exchange == "ring",
        f"--cp-kv-exchange {exchange} needs a ring-type algorithm, not --context-parallel-algo {algorithm}; "
        f"choose {names_with(exchange='ring')}, or --cp-kv-exchange ring.",
    )
    require(
        window == 1,
        f"--cp-kv-exchange {exchange} forwards nothing, so --cp-window-size {window} has no meaning; "
        "use --cp-window-size 1, or --cp-kv-exchange ring.",
    )


def check_allgather(algorithm: str, allgather_kv: bool) -> None:
    row = ALGORITHMS[algorithm]
    require(
        not allgather_kv or (row.splits_heads and row.exchange is None),
        f"--use-ulysses-allgather-kv needs --context-parallel-algo {names_with(splits_heads=True, exchange=None)}, "
        f"not {algorithm}; leave it out or change the algorithm.",
    )

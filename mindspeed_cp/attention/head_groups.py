"""Which heads each rank of a Ulysses group computes, in one round or in several rounds of head groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

from mindspeed_cp.sequence.runs import split_sizes

Share = slice | list[int]


@lru_cache(maxsize=256)
def head_shares(num_heads: int, num_kv_heads: int, degree: int) -> tuple[tuple[slice, ...], tuple[Share, ...]]:
    """Which query heads and which KV heads each of ``degree`` ranks gets.

    Query heads are split in order; the first ranks get the remainder. KV heads are replicated only as far as needed:
    ``unit`` is the largest run of query heads that always share a KV head and a rank, and each rank gets one KV head
    per unit. For even splits this gives lcm(num_kv_heads, degree) KV heads in all.

    Returns:
        (query shares, KV shares): per rank a slice of heads, or a list of KV heads if one is needed twice.
    """
    sizes = split_sizes(num_heads, degree)
    starts = [sum(sizes[:rank]) for rank in range(degree)]
    group = num_heads // num_kv_heads
    queries, keys = [], []
    for start, size in zip(starts, sizes):
        queries.append(slice(start, start + size))
        unit = max(size, 1) if num_kv_heads == 1 else gcd(group, start, size)
        keys.append(_share([head // group for head in range(start, start + size, unit)]))
    return tuple(queries), tuple(keys)


def _share(heads: Sequence[int]) -> Share:
    """The heads as a slice if they are consecutive, else as a list."""
    first = heads[0] if heads else 0
    if list(heads) == list(range(first, first + len(heads))):
        return slice(first, first + len(heads))
    return list(heads)


@dataclass(frozen=True)
class HeadGroup:
    """The heads that are exchanged and computed in one round; a slice or list per rank.

    Args:
        queries: query heads.
        arriving: KV heads that arrive in the round; a rank without any continues with those of the previous round.
        leaving: KV heads whose gradients are sent in the round; others are summed until their last round.
    """

    queries: tuple[slice, ...]
    arriving: tuple[Share, ...]
    leaving: tuple[Share, ...]


@lru_cache(maxsize=256)
def head_groups(num_heads: int, num_kv_heads: int, degree: int, num_groups: int) -> tuple[HeadGroup, ...]:
    """The rounds of an exchange of heads. Each KV head travels once, as in a single round.

    A rank's KV heads are distributed over the rounds together with their query heads. If there are more rounds than KV
    heads, the query heads of a KV head are distributed, and the KV head stays for all of its rounds. A rank with fewer
    heads than rounds has rounds without heads.
    """
    shares = head_shares(num_heads, num_kv_heads, degree)
    if num_groups == 1:
        return (HeadGroup(shares[0], shares[1], shares[1]),)
    of_ranks = [_rounds(queries, _heads(keys), num_groups) for queries, keys in zip(*shares)]
    return tuple(
        HeadGroup(
            tuple(q for q, _, _ in ranks), tuple(_share(a) for _, a, _ in ranks), tuple(_share(e) for _, _, e in ranks)
        )
        for ranks in zip(*of_ranks)
    )


def _heads(share: Share) -> list[int]:
    return list(range(share.start, share.stop)) if isinstance(share, slice) else share


def _rounds(queries: slice, keys: list[int], num_groups: int) -> list[tuple[slice, list[int], list[int]]]:
    """(query heads, arriving KV heads, leaving KV heads) of every round of one rank."""
    rounds, start = [], queries.start
    of_key = (queries.stop - queries.start) // max(len(keys), 1)
    if num_groups <= len(keys) or not keys:
        for count in split_sizes(len(keys), num_groups):
            mine, keys = keys[:count], keys[count:]
            rounds.append((slice(start, start + count * of_key), mine, mine))
            start += count * of_key
        return rounds
    for key, repeats in zip(keys, split_sizes(num_groups, len(keys))):
        sizes = split_sizes(of_key, repeats)
        last = min(of_key, repeats) - 1
        for number, size in enumerate(sizes):
            rounds.append((slice(start, start + size), [key] * (number == 0), [key] * (number == last)))
            start += size
    return rounds

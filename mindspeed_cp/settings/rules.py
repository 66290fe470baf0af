"""What rules are written with, and the one that tensor parallelism has for heads."""

MOST_RANKS = 1 << 16  # that a message looks for; a flag may say any number


def listed(numbers: list[int]) -> str:
    found = [str(number) for number in numbers]
    return found[0] if len(found) == 1 else ", ".join(found[:-1]) + " or " + found[-1] if found else ""


def divisors(number: int, low: int, high: int) -> str:
    """Divisors d of ``number`` with low <= d <= high, as text for an error message; none above any number of ranks."""
    return listed([d for d in range(max(low, 1), min(high, MOST_RANKS) + 1) if number % d == 0])


def require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_even_tokens(length: int, cp: int, tp: int) -> None:
    """Sequence parallelism shares the tokens of a rank of context parallelism out among ``tp`` ranks."""
    require(
        length % (cp * tp) == 0,
        f"--seq-length {length} must be divisible by --context-parallel-size {cp} x --tensor-model-parallel-size {tp} "
        f"= {cp * tp} with --sequence-parallel, which splits each rank's tokens again; use --seq-length "
        f"{length // (cp * tp) * cp * tp or cp * tp}, or leave out --sequence-parallel.",
    )


def heads_of_rank(heads: int, groups: int, tp: int) -> tuple[int, int]:
    """(query heads, KV heads) of a tensor-parallel rank; with more ranks than KV heads several hold the same one.

    Raises:
        ValueError: Megatron cannot split them so. Before 0.16 it asks for at least one KV head for each rank.
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

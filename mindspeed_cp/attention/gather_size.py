"""Calculators of the sequence length after Ulysses' all-to-all, and the check of the ranks' lengths."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from mindspeed_cp.sequence.runs import split_sizes


class GatherSizeCalculator(ABC):
    """Calculates the sequence length after the all-to-all; write a subclass for lengths that only your model knows.

    Attributes:
        sums_local_lengths: if True, a result of None means the sum of the ranks' lengths.
    """

    sums_local_lengths: bool = False

    @abstractmethod
    def calculate(self, *args: Any, **kwargs: Any) -> int | None:
        """The length of the whole sequence, or None if all ranks hold the same number of tokens.

        Args:
            args, kwargs: arguments of the attention call after query, key and value.
        """


class DefaultGatherSizeCalculator(GatherSizeCalculator):
    """Aligned Ulysses: every rank holds the same number of tokens."""

    def calculate(self, *args: Any, **kwargs: Any) -> int | None:
        return None


class DynamicGatherSizeCalculator(GatherSizeCalculator):
    """The length of the attention mask, or the ranks' total length if there is no mask."""

    sums_local_lengths = True

    def calculate(self, *args: Any, **kwargs: Any) -> int | None:
        """Last dimension of the mask: the first positional argument, or ``attention_mask`` or ``attn_mask``."""
        candidates = [*args[:1], kwargs.get("attention_mask"), kwargs.get("attn_mask")]
        return next((mask.shape[-1] for mask in candidates if isinstance(mask, torch.Tensor)), None)


CALCULATORS: dict[str, Callable[[], "GatherSizeCalculator"]] = {
    "default": DefaultGatherSizeCalculator,
    "dynamic": DynamicGatherSizeCalculator,
}


@cache
def calculator_named(name: str) -> GatherSizeCalculator:
    """The calculator that --gather-size-calculator names; one object per name.

    Args:
        name: "default", "dynamic", or your own class as "package.module:Class".

    Raises:
        ValueError: there is no such class, or it is not a calculator.
    """
    if name in CALCULATORS:
        return CALCULATORS[name]()
    module, _, attribute = name.partition(":")
    way_out = "choose default or dynamic, or name an importable class as package.module:Class"
    try:
        found: Any = getattr(importlib.import_module(module), attribute, None)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ValueError(f"--gather-size-calculator {name} cannot be imported ({reason}); {way_out}.") from error
    if not callable(getattr(found, "calculate", None)):
        raise ValueError(
            f"--gather-size-calculator {name} must be a class with a method calculate(*args, **kwargs); {way_out}."
        )
    made: GatherSizeCalculator = found()
    return made


def check_lengths(calculator: GatherSizeCalculator, stamps: list[tuple[int, int]]) -> list[int]:
    """The tokens of every rank, from each rank's (length, gather size or -1).

    Raises:
        ValueError: they are inconsistent; raised on every rank alike.
    """
    lengths, sizes = [length for length, _ in stamps], [size for _, size in stamps]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the gather size calculator gives the ranks different lengths {sizes} (-1 is None); it "
            "must give all ranks the length of the whole sequence."
        )
    if sizes[0] == -1:
        _check_aligned(lengths, calculator)
    elif lengths != split_sizes(sizes[0], len(lengths)):
        raise ValueError(
            f"gather size {sizes[0]} gives the ranks {split_sizes(sizes[0], len(lengths))} "
            f"tokens, and they hold {lengths}; split with cal_split_sizes({sizes[0]}, "
            f"{len(lengths)}), or let the calculator return {sum(lengths)}."
        )
    return lengths


def check_single(length: int, gather_size: int | None) -> None:
    """Raise ValueError if the gather size for a group of one rank is not its length."""
    if gather_size is not None and gather_size != length:
        raise ValueError(
            f"gather size {gather_size} must be the sequence length {length} in a group of one rank; pass "
            "the whole sequence."
        )


def _check_aligned(lengths: list[int], calculator: GatherSizeCalculator) -> None:
    """Check lengths without a gather size: equal for aligned Ulysses, differing by at most one if they are summed."""
    if calculator.sums_local_lengths:
        if lengths != split_sizes(sum(lengths), len(lengths)):
            raise ValueError(
                f"the ranks hold {lengths} tokens, and a sequence of {sum(lengths)} must be split as "
                f"{split_sizes(sum(lengths), len(lengths))}; split with cal_split_sizes({sum(lengths)}, "
                f"{len(lengths)})."
            )
    elif len(set(lengths)) > 1:
        raise ValueError(
            f"aligned Ulysses needs the same number of tokens on every rank, and they hold {lengths}; "
            "pass gather_size_calculator=DynamicGatherSizeCalculator() (--gather-size-calculator "
            f"dynamic), which takes any length, or a sequence length that {len(lengths)} divides."
        )

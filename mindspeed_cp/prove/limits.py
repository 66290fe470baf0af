"""The largest errors with which two runs count as equal, by their precision."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

ON_A_DEVICE = 20  # factor for devices, whose kernels sum in another order and compute exponentials differently


@dataclass(frozen=True)
class Limits:
    """The errors with which two runs count as equal.

    Args:
        largest: quantity -> largest relative error; all other quantities must be exactly equal.
        small: a gradient smaller than this fraction of the largest is compared as if it had that size, because it
            consists mostly of rounding errors.
    """

    largest: Mapping[str, float]
    small: float = 1e-4


# At least three times the largest error of correct models; docs/prove.md has the figures. The gradient of a norm is a
# sum over all tokens that cancels, so that in bfloat16 a third of it is rounding error: hence its ``small``.
LIMITS = {
    "float32": Limits({"output": 5e-5, "gradient": 2e-4, "loss": 1e-5, "gradient norm": 5e-5}),
    "bfloat16": Limits({"output": 5e-2, "gradient": 3e-1, "loss": 1e-3, "gradient norm": 1e-2}, small=1e-1),
}


def limits_of(dtype: str, device: str) -> Limits:
    limits = LIMITS[dtype]
    if device == "cpu" or dtype != "float32":  # rounding to bfloat16 is the same on all devices, and larger
        return limits
    return replace(limits, largest={what: ON_A_DEVICE * error for what, error in limits.largest.items()})

"""Up to which errors two runs count as equal, by the precision in which they compute."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Limits:
    """Up to which relative error two runs count as equal.

    Args:
        small: a gradient below this share of the largest is compared as if it had that size, for it is what others'
            rounding leaves of it.
    """

    output: float
    gradient: float
    loss: float
    grad_norm: float
    small: float = 1e-4


# Three times the largest error that sound models showed, or more; docs/prove.md has the figures. What the gradient of a
# norm sums over all tokens cancels, and bfloat16 leaves a third of it to rounding: hence its ``small``.
LIMITS = {
    "float32": Limits(output=5e-5, gradient=2e-4, loss=1e-5, grad_norm=5e-5),
    "bfloat16": Limits(output=5e-2, gradient=3e-1, loss=1e-3, grad_norm=1e-2, small=1e-1),
}
COMPARED = ("output", "gradient", "loss", "grad_norm")
ON_A_DEVICE = 20  # its kernels sum in an order of their own, and take other exponentials


def limits_of(dtype: str, device: str) -> Limits:
    limits = LIMITS[dtype]
    if device == "cpu" or dtype != "float32":  # rounding to bfloat16 is the same everywhere, and larger
        return limits
    return replace(limits, **{name: ON_A_DEVICE * getattr(limits, name) for name in COMPARED})

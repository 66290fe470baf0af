"""The only table of the versions that were tried together.

The adaptor's warning, scripts/, constraints.txt, CI's jobs, the table in docs/versions.md and the tests read it or are
checked against it. It imports only the standard library, because scripts/environment.py reads it before installation.
"""

from typing import NamedTuple

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# The lowest version that was tried and that of constraints.txt; scripts/ accept any installed torch between them.
LOWEST_TORCH, TORCH = "2.6.0", "2.13.0"


class Megatron(NamedTuple):
    """A version of Megatron that was tried.

    Args:
        version: version of megatron-core and of the checkout core_v<version>.
        pythons: lowest and highest Python with wheels.
        notes: how it was tried, and what it needs.
        in_ci: whether the tests that touch Megatron run on its wheel.
        on_checkout: whether every case of scripts/test_megatron_lm.sh ran on its checkout.
    """

    version: str
    pythons: tuple[str, str]
    notes: str
    in_ci: bool = True
    on_checkout: bool = True


CHECKOUT = "every case of scripts/test_megatron_lm.sh on a checkout; tests that touch Megatron in CI"
NEWER = "every case of scripts/test_megatron_lm.sh on a checkout, Python 3.12"
WHEEL = "its wheel: adaptor, census, losses, owners, dynamic groups as on 0.19.1, but for FP8 contexts the same core"
MEGATRONS = (
    Megatron("0.12.1", ("3.10", "3.11"), "the oldest: tests that touch Megatron run in scripts/test.sh"),
    Megatron("0.13.1", ("3.10", "3.11"), f"{CHECKOUT}; declares numpy<2, installed without its dependencies here"),
    Megatron("0.14.0", ("3.10", "3.13"), f"{CHECKOUT}; declares numpy<2, installed without its dependencies here"),
    Megatron("0.15.3", ("3.10", "3.13"), f"{CHECKOUT}; declares numpy<2, installed without its dependencies here"),
    Megatron("0.16.1", ("3.10", "3.13"), "the default: the whole test suite; needs einops for hierarchical groups"),
    Megatron("0.17.1", ("3.12", "3.13"), NEWER, in_ci=False),
    Megatron("0.18.2", ("3.12", "3.13"), NEWER, in_ci=False),
    Megatron("0.19.1", ("3.12", "3.13"), f"{NEWER}; the checkout core_v0.19.0 calls itself so", in_ci=False),
    Megatron("0.19.2", ("3.12", "3.13"), WHEEL, in_ci=False, on_checkout=False),
)
OLDEST, DEFAULT = MEGATRONS[0].version, "0.16.1"


def minor(version: str) -> tuple[int, int]:
    """(major, minor) of a version such as "3.11" or "2.13.0+cpu"."""
    major, second, *_ = version.partition("+")[0].split(".")
    return int(major), int(second)


def oldest_for(python: str) -> str:
    """The oldest Megatron with wheels for this Python."""
    return next(row.version for row in MEGATRONS if minor(row.pythons[0]) <= minor(python) <= minor(row.pythons[1]))

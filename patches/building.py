"""Patch of the base class of Megatron's modules: modules that context parallelism cannot compute are rejected."""

from collections.abc import Callable
from typing import Any

from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.census import Census
from mindspeed_cp.patches.rows import patch
from mindspeed_cp.patches.versions import MEGATRONS, minor


@patch(
    "megatron.core.transformer.module.MegatronModule.__init__",
    reason="modules that would take a rank's part of the sequence for the whole sequence are refused by name",
)
def __init__(adaptor: Adaptor, original: Callable[..., Any], self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    if getattr(config, "context_parallel_size", 1) > 1:
        census_of(adaptor).check(type(self), config)
    original(self, config, *args, **kwargs)


def census_of(adaptor: Adaptor) -> Census:
    """The census of the installed Megatron, including the classes that the settings trust."""
    from megatron.core import __version__

    trusted = None if adaptor.setup is None else adaptor.setup.trusted_classes
    return Census(__version__, TRIED, frozenset(trusted.split(",") if trusted else ()))


TRIED = frozenset(minor(row.version) for row in MEGATRONS)

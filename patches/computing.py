"""Over which ranks the module that runs computes, for functions of Megatron that are given no group."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mindspeed_cp.megatron.scopes import Scope

_SCOPE: ContextVar[Scope | None] = ContextVar("scope of the module that runs", default=None)


@contextmanager
def computing_over(scope: Scope) -> Iterator[None]:
    """Let functions inside the block know that they belong to a module that computes over ``scope``."""
    token = _SCOPE.set(scope)
    try:
        yield
    finally:
        _SCOPE.reset(token)


def computes_over() -> Scope | None:
    """The scope of the module that runs; None outside of the modules that say it."""
    return _SCOPE.get()

"""The scope of the running module, for functions of Megatron that have no group argument."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mindspeed_cp.megatron.scopes import Scope

_SCOPE: ContextVar[Scope | None] = ContextVar("scope of the module that runs", default=None)


@contextmanager
def computing_over(scope: Scope) -> Iterator[None]:
    """Context manager that tells functions called inside it that the running module computes over ``scope``."""
    token = _SCOPE.set(scope)
    try:
        yield
    finally:
        _SCOPE.reset(token)


def computes_over() -> Scope | None:
    """The scope of the running module; None outside ``computing_over``."""
    return _SCOPE.get()

"""What functions of Megatron that have no argument for it learn of the module that runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

from mindspeed_cp.megatron.scopes import Scope

Value = TypeVar("Value")


class WhileRunning(Generic[Value]):
    """A value for the functions that a module calls."""

    def __init__(self, name: str) -> None:
        self._variable: ContextVar[Value | None] = ContextVar(name, default=None)

    def get(self) -> Value | None:
        """The value of the innermost ``set`` that is open; None outside."""
        return self._variable.get()

    @contextmanager
    def set(self, value: Value) -> Iterator[None]:
        """Context manager in which ``get`` returns ``value``."""
        token = self._variable.set(value)
        try:
            yield
        finally:
            self._variable.reset(token)


COMPUTING_OVER = WhileRunning[Scope]("scope of the module that runs")

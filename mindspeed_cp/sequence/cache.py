"""Caches of pure functions' results, bounded by the bytes that they hold, not by their number.

A plan for thousands of documents takes megabytes, and in training every batch has different documents.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
V = TypeVar("V")

INT_BYTES = 40  # a Python int and the reference to it in a tuple
RUN_BYTES = 56 + 2 * INT_BYTES  # one (start, stop) tuple
LEAST_KEPT = 2  # the most recent results are kept whatever their size: two kinds of layers may alternate


class ByteCache(Generic[P, V]):
    """A function with an LRU cache of its results, up to ``limit`` bytes. The function never returns None.

    Args:
        size: returns the bytes that a result holds, its arguments included. A result may grow while it is in use, so
            its size is computed again when another result is requested.
    """

    def __init__(self, function: Callable[P, V], limit: int, size: Callable[[V], int]) -> None:
        self._function, self._limit, self._size = function, limit, size
        self._kept: OrderedDict[Hashable, V] = OrderedDict()
        self._sizes: dict[Hashable, int] = {}
        self._latest: tuple[Hashable, V] | None = None  # the result used last
        self._lock = Lock()  # autograd runs a checkpoint's recomputation in a thread of its own
        self.__doc__ = function.__doc__
        self.__wrapped__ = function

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> V:
        key = (args, tuple(sorted(kwargs.items())))
        found = self._kept.get(key)
        if found is not None and self._latest is not None and found is self._latest[1]:
            return found
        return self._used(key, self._function(*args, **kwargs) if found is None else found)

    @property
    def num_bytes(self) -> int:
        """Bytes that the cached results hold."""
        return sum(map(self._size, self._kept.values()))

    def cache_clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._sizes.clear()
            self._latest = None

    def _used(self, key: Hashable, value: V) -> V:
        with self._lock:
            value = self._kept.setdefault(key, value)
            self._kept.move_to_end(key)
            if self._latest is not None and self._latest[0] in self._kept:
                self._sizes[self._latest[0]] = self._size(self._latest[1])
            self._sizes[key] = self._size(value)
            self._latest, total = (key, value), sum(self._sizes.values())
            while total > self._limit and len(self._kept) > LEAST_KEPT:
                oldest, _ = self._kept.popitem(last=False)
                total -= self._sizes.pop(oldest)
        return value


def kept_up_to(limit: int, size: Callable[[V], int]) -> Callable[[Callable[P, V]], ByteCache[P, V]]:
    """Decorator: cache the function's results up to ``limit`` bytes; see ``ByteCache``."""
    return lambda function: ByteCache(function, limit, size)

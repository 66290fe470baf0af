"""Patches as decorated functions, with target and reason in the decorator.

    @patch("megatron.core.some.module.Class.method", reason="why it is replaced")
    def method(adaptor, original, self, *args, **kwargs): ...

``adaptor`` is the Adaptor of the process, ``original`` the replaced function.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any

from mindspeed_cp.patches.manager import Patch

Conditions = Callable[[], str] | tuple[Callable[[], str], ...]


@dataclass(frozen=True)
class Row:
    """A function that replaces one or several of Megatron's names; created by ``patch`` and ``replacement``.

    Args:
        targets: dotted paths, as in ``Patch``.
        function: the decorated function.
        reason, create, inherited, essential: as in ``Patch``.
        when: conditions, each () -> why the patch is not needed here, or "".
        is_value: ``function`` makes the replacement once, instead of running at every call.
    """

    targets: tuple[str, ...]
    function: Callable[..., Any]
    reason: str
    when: tuple[Callable[[], str], ...] = ()
    create: bool = False
    inherited: bool = False
    is_value: bool = False
    essential: bool = True

    def patches(self, adaptor: Any, *when: Callable[[], str]) -> list[Patch]:
        """One Patch per target, whose function gets ``adaptor``; ``when`` are further conditions, checked first."""
        conditions = (*when, *self.when)

        def unneeded() -> str:
            return next((why for condition in conditions if (why := condition())), "")

        return [
            Patch(target, self.builder(adaptor), self.reason, unneeded, self.create, self.inherited, self.essential)
            for target in self.targets
        ]

    def builder(self, adaptor: Any) -> Callable[[Any], Any]:
        """original -> replacement, like ``Patch.build``; to use this row's function for a target of another table."""
        function = self.function
        if self.is_value:
            return lambda original: function(adaptor, original)

        def build(original: Any) -> Any:
            @wraps(function if original is None else original)
            def replaced(*args: Any, **kwargs: Any) -> Any:
                return function(adaptor, original, *args, **kwargs)

            vars(replaced).update({name: value for name, value in vars(function).items() if name != "__wrapped__"})
            return replaced

        return build

    def __call__(self, adaptor: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(adaptor, original, *args, **kwargs)


def patch(
    *targets: str,
    reason: str,
    when: Conditions = (),
    create: bool = False,
    inherited: bool = False,
    is_value: bool = False,
    essential: bool = True,
) -> Callable[[Callable[..., Any]], Row]:
    """Decorate ``(adaptor, original, *args, **kwargs) -> result``, which runs instead of each of ``targets``.

    ``replacement`` decorates ``(adaptor, original) -> object``, whose result becomes the value of each target.
    """
    conditions = when if isinstance(when, tuple) else (when,)
    return lambda function: Row(targets, function, reason, conditions, create, inherited, is_value, essential)


replacement = partial(patch, is_value=True)


def always(value: Any = None) -> Callable[..., Any]:
    """For ``patch``: a function of any arguments that only returns ``value``."""
    return lambda adaptor, original, *args, **kwargs: value


def rows_of(module: Any) -> list[Row]:
    """Every Row of a module, including those in its lists, in the order of definition."""
    found: list[Row] = []
    for value in vars(module).values():
        values = value if isinstance(value, list) else [value]
        found += [row for row in values if isinstance(row, Row)]
    return found


def patches_of(modules: Iterable[Any], adaptor: Any = None, *when: Callable[[], str]) -> list[Patch]:
    """The patches of all rows of ``modules``; ``when`` are conditions for all of them."""
    return [made for module in modules for row in rows_of(module) for made in row.patches(adaptor, *when)]


@cache
def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """The cached signature of an original function."""
    return inspect.signature(function)


def arguments_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """name -> value of the arguments with which ``function`` is called, without defaults."""
    return signature_of(function).bind(*args, **kwargs).arguments


def absent(target: str, why: str) -> Callable[[], str]:
    """A condition: ``why`` if the name, or its module or class, does not exist."""

    def unneeded() -> str:
        owner, _, name = target.rpartition(".")
        return "" if hasattr(_found(owner), name) else why

    return unneeded


def uninstalled(package: str, why: str) -> Callable[[], str]:
    """A condition: ``why`` if ``package`` cannot be found."""

    def unneeded() -> str:
        try:
            found = importlib.util.find_spec(package) is not None
        except (ValueError, ModuleNotFoundError):  # a stub without a spec in sys.modules, or no parent
            found = False
        return "" if found else why

    return unneeded


def present(target: str, why: str) -> Callable[[], str]:
    """A condition: ``why`` if the name exists."""
    return lambda: why if _found(target) is not None else ""


def installed(package: str, why: str) -> Callable[[], str]:
    """A condition: ``why`` if ``package`` can be found."""
    return lambda: "" if uninstalled(package, why)() else why


def _found(path: str) -> Any:
    """The module or attribute at a dotted path, None if there is none."""
    try:
        return importlib.import_module(path)
    except ImportError:
        owner, _, name = path.rpartition(".")
        return getattr(_found(owner), name, None) if owner else None

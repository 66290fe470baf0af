"""How a patch is written: a decorated function, with its target and its reason beside it.

    @patch("megatron.core.some.module.Class.method", reason="why it is replaced")
    def method(adaptor, original, self, *args, **kwargs): ...

``adaptor`` is the Adaptor of the process, ``original`` what stood there before.
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
    """A function that stands for one or several of Megatron's names; ``patch`` and ``replacement`` make it.

    Args:
        targets: dotted paths, as ``Patch`` has them.
        function: what the decorator was put on.
        reason, create, inherited: as ``Patch`` has them.
        when: conditions, each () -> why the patch is not needed here, or "".
        is_value: ``function`` makes the replacement once, instead of running at every call.
        essential: as ``Patch`` has it.
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
        """One Patch for each target, whose function gets ``adaptor``; ``when`` are further conditions, asked first."""
        conditions = (*when, *self.when)

        def unneeded() -> str:
            return next((why for condition in conditions if (why := condition())), "")

        return [
            Patch(target, self.builder(adaptor), self.reason, unneeded, self.create, self.inherited, self.essential)
            for target in self.targets
        ]

    def builder(self, adaptor: Any) -> Callable[[Any], Any]:
        """original -> replacement, as ``Patch.build`` is: the function of this row for a target of another table."""
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
    """Decorates ``(adaptor, original, *args, **kwargs) -> result``, which runs instead of each of ``targets``.

    ``replacement`` decorates ``(adaptor, original) -> object``, which becomes the value of each of ``targets``.
    """
    conditions = when if isinstance(when, tuple) else (when,)
    return lambda function: Row(targets, function, reason, conditions, create, inherited, is_value, essential)


replacement = partial(patch, is_value=True)


def rows_of(module: Any) -> list[Row]:
    """Every Row of a module, and of its lists of rows, in the order in which they are written."""
    found: list[Row] = []
    for value in vars(module).values():
        values = value if isinstance(value, list) else [value]
        found += [row for row in values if isinstance(row, Row)]
    return found


def patches_of(modules: Iterable[Any], adaptor: Any = None, *when: Callable[[], str]) -> list[Patch]:
    """The patches of all rows of ``modules``; ``when`` are conditions of them all."""
    return [made for module in modules for row in rows_of(module) for made in row.patches(adaptor, *when)]


@cache
def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of an original; asked at every call, read once."""
    return inspect.signature(function)


def arguments_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """name -> value of the arguments with which ``function`` is called; what is not given is absent."""
    return signature_of(function).bind(*args, **kwargs).arguments


def absent(target: str, why: str) -> Callable[[], str]:
    """A condition: ``why`` where the module or class of ``target`` has no such name, or is not there itself."""

    def unneeded() -> str:
        owner, _, name = target.rpartition(".")
        return "" if hasattr(_found(owner), name) else why

    return unneeded


def uninstalled(package: str, why: str) -> Callable[[], str]:
    """A condition: ``why`` where ``package`` cannot be found."""

    def unneeded() -> str:
        try:
            found = importlib.util.find_spec(package) is not None
        except (ValueError, ModuleNotFoundError):  # a stub without a spec in sys.modules, or no parent
            found = False
        return "" if found else why

    return unneeded


def present(target: str, why: str) -> Callable[[], str]:
    """A condition: ``why`` where there is such a name."""
    return lambda: why if _found(target) is not None else ""


def installed(package: str, why: str) -> Callable[[], str]:
    """A condition: ``why`` where ``package`` can be found."""
    return lambda: "" if uninstalled(package, why)() else why


def _found(path: str) -> Any:
    """The module, or the attribute of a module or class, of a dotted path; None where there is none."""
    try:
        return importlib.import_module(path)
    except ImportError:
        owner, _, name = path.rpartition(".")
        return getattr(_found(owner), name, None) if owner else None

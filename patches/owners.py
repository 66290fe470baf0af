"""Who owns a patched name now: this project, somebody whose function calls ours, or somebody else.

The criterion is whether the current object can reach ours: through closures, partials, callable objects, decorators of
functools, or the globals that its code names. ``functools.wraps`` alone proves nothing, because a wrapper that never
calls the wrapped function has ``__wrapped__`` too.
"""

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any, Literal

ABSENT = object()
DEPTH, WIDTH = 8, 1000  # the search visits objects up to this distance, and at most so many
PLAIN = (str, bytes, int, float, complex, list, tuple, dict, set, frozenset, type(None))
# Packages that patch Megatron when a framework imports them, and whose functions this project's may wrap: whichever is
# imported first, this project's functions call theirs.
WRAPPED_ANEW = ("mcore_bridge",)  # of ms-swift
MINDSPEED = (
    "MindSpeed takes these names when it gets flags of its own context parallelism; start it without them, import "
    "mindspeed.megatron_adaptor before mindspeed_cp.megatron_adaptor, and leave context parallelism to mindspeed_cp."
)


@dataclass(frozen=True)
class Ownership:
    """Who owns a name.

    Args:
        kind: "ours", "wrapped" by somebody who calls ours, "replaced" by somebody who does not, or "removed".
        module, name, file: those of the current object; "" if it is ours.
    """

    kind: Literal["ours", "wrapped", "replaced", "removed"]
    module: str = ""
    name: str = ""
    file: str = ""

    def __str__(self) -> str:
        if self.kind == "ours":
            return "applied"
        where = f"{self.module}.{self.name}" if self.name else self.module
        if self.kind == "wrapped":
            return f"wrapped by {where}"
        return f"{self.kind} {'from' if self.kind == 'removed' else 'by'} {where} ({self.file})"

    @property
    def is_lost(self) -> bool:
        """Whether calls of the name no longer reach this project's function."""
        return self.kind in ("replaced", "removed")

    @property
    def package(self) -> str:
        """The top-level package of the current object."""
        return self.module.partition(".")[0]


OURS = Ownership("ours")


def ownership(target: str, owner: Any, ours: Any) -> Ownership:
    """Who owns ``target`` now.

    Args:
        target: dotted path of a module attribute or of a class attribute.
        owner: the module or class on which ``ours`` was set.
        ours: the replacement as it was set in the owner's ``__dict__``.
    """
    path, _, name = target.rpartition(".")
    now = at_path(path)
    live = vars(now).get(name, ABSENT) if now is not ABSENT else ABSENT
    if live is ours:
        return OURS
    if now is ABSENT:
        return Ownership("removed", *_whereabouts(owner, path))
    if live is ABSENT:
        live = inspect.getattr_static(now, name, ABSENT)
        if live is ours:  # a subclass replaced the class without overriding this method
            return OURS
    if live is ABSENT:
        return Ownership("removed", *_whereabouts(now, name))
    if _calls(live, ours) or _calls_super(now, live, owner):
        return Ownership("wrapped", *_whereabouts(live, name))
    # If another class replaced the patched one, name that class, since it may have inherited the method.
    return Ownership("replaced", *_whereabouts(live if now is owner else now, name))


def at_path(path: str) -> Any:
    """The current module or class at a dotted path, without importing anything; ABSENT if there is none."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        found: Any = sys.modules.get(".".join(parts[:count]), ABSENT)
        if found is not ABSENT:
            for part in parts[count:]:
                found = getattr(found, part, ABSENT)
            return found
    return ABSENT


def is_foreign(owner: Any, target: str) -> bool:
    """Whether the module or class ``owner``, found at the path ``target``, comes from another package."""
    return _module_of(owner).partition(".")[0] != target.partition(".")[0]


def said_of(owner: Any) -> str:
    """Name, module and file of a class or function, in words."""
    module, name, file = _whereabouts(owner, "")
    return f"{name} of {module} ({file})"


def way_out(package: str, target: str) -> str:
    """What the user can do about a package that replaced the name ``target``."""
    if package == "mindspeed":
        return MINDSPEED
    if package == target.partition(".")[0]:
        return (
            f"{package} has its own again: something set it back or loaded the module once more; do that before "
            "mindspeed_cp.megatron_adaptor is imported, or call its undo() and apply() afterwards."
        )
    return (
        f"Import {package} before mindspeed_cp.megatron_adaptor, so that this project's function calls the one of "
        f"{package}, or leave the change of {package} out."
    )


def way_out_of_class(owner: type) -> str:
    """What the user can do about a class that had replaced the class to patch before this project was imported."""
    package = _module_of(owner).partition(".")[0]
    if package == "mindspeed":
        return MINDSPEED
    return f"Import {package} after mindspeed_cp.megatron_adaptor, or leave the change of {package} out."


def _calls(live: Any, ours: Any) -> bool:
    """Whether ``live`` can reach ``ours``, by breadth-first search."""
    goal, seen, level = _plain(ours), set[int](), [_plain(live)]
    if isinstance(goal, type) and isinstance(level[0], type):
        return issubclass(level[0], goal)
    for _ in range(DEPTH):
        following = []
        for value in level:
            if value is goal:
                return True
            if id(value) not in seen and len(seen) < WIDTH:
                seen.add(id(value))
                following += [_plain(held) for held in _held(value)]
        level = following
    return any(value is goal for value in level)


def _calls_super(now: Any, live: Any, owner: Any) -> bool:
    """Whether a method of a subclass of the patched class uses super()."""
    code = getattr(_plain(live), "__code__", None)
    return isinstance(now, type) and owner in now.__mro__[1:] and code is not None and "super" in _names(code)


def _held(value: Any) -> Iterator[Any]:
    """The objects that a callable refers to and may call."""
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not set yet
                continue
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        names = _names(value.__code__)
        yield from (value.__globals__[name] for name in sorted(names) if callable(value.__globals__.get(name)))
        if "__wrapped__" in names:
            yield getattr(value, "__wrapped__", None)
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif callable(value) and not isinstance(value, (type, *PLAIN)):
        # An object with __call__, or a decorator written in C such as lru_cache's.
        yield getattr(value, "__wrapped__", None)
        yield from getattr(value, "__dict__", {}).values()


def _names(code: CodeType) -> set[str]:
    """Names of the globals and attributes that a function uses, inner functions included."""
    names = set(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            names |= _names(inner)
    return names


def _plain(value: Any) -> Any:
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def _module_of(value: Any) -> str:
    """The module that defines ``value``; not ``__module__``, which ``functools.wraps`` copies to wrappers."""
    value = _plain(value)
    if inspect.ismodule(value):
        return value.__name__
    written = getattr(value, "__globals__", {}).get("__name__")
    return str(written or getattr(value, "__module__", None) or type(value).__module__)


def _whereabouts(value: Any, name: str) -> tuple[str, str, str]:
    """(module, name, file) of an object; ``name`` is used if the object has no name."""
    value = value.func if isinstance(value, partial) else _plain(value)
    module, code = _module_of(value), getattr(value, "__code__", None)
    if code is not None:
        return module, getattr(code, "co_qualname", code.co_name), code.co_filename
    file = getattr(sys.modules.get(module), "__file__", None) or "no file"
    if inspect.ismodule(value):
        return module, "", file
    return module, getattr(value, "__qualname__", None) or name or type(value).__name__, file

"""Declarative patches with exact undo; independent of Megatron.

A ``Patch`` names one attribute by its dotted path, says how to build the replacement from the original, and why. The
manager applies all patches or none, rebinds the copies that other modules hold (``from x import y``), and restores
every attribute to the identical object in reverse order.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from mindspeed_cp.patches.owners import ABSENT, Ownership, is_foreign, ownership, said_of, way_out, way_out_of_class


class PatchError(RuntimeError):
    """A patch cannot be applied, and the failed ``apply`` was undone; or somebody else replaced a patched name."""


@dataclass(frozen=True)
class Patch:
    """One attribute to replace.

    Args:
        target: dotted path of a module attribute or of a class attribute, such as "package.module.Class.method".
        build: original -> replacement. It gets the plain function of a staticmethod or classmethod, and None for an
            attribute that does not exist yet (``create``).
        reason: why, in one sentence; shown to the user.
        when: () -> why the patch is not needed here, or "" to apply it.
        create: the attribute may be absent; undo then removes it.
        inherited: a class may inherit the attribute; undo then removes the class's own. Otherwise an inherited
            attribute counts as missing, because the base class's function is not the one to replace.
        essential: results would be wrong if somebody else replaced the name; False if it only prints something.
    """

    target: str
    build: Callable[[Any], Any]
    reason: str
    when: Callable[[], str] = field(default=lambda: "")
    create: bool = False
    inherited: bool = False
    essential: bool = True


@dataclass(frozen=True)
class PatchRow:
    """One line of ``PatchManager.report``.

    Args:
        target, reason: those of the Patch.
        status: "applied", "wrapped by" or "replaced by" somebody, or why it is not applied.
        applied: whether calls of the target reach the replacement now.
        is_lost: whether it was applied and somebody else has replaced the name since.
    """

    target: str
    reason: str
    status: str
    applied: bool
    is_lost: bool = False


@dataclass
class _Replacement:
    """One attribute that was set; ``before`` is the previous value in its owner's own ``__dict__``, or ABSENT."""

    owner: Any
    name: str
    before: Any
    after: Any

    def undo(self) -> None:
        if self.before is ABSENT:
            # Another tool may have removed it already.
            if self.name in vars(self.owner):
                delattr(self.owner, self.name)
            if inspect.ismodule(self.after) and sys.modules.get(self.after.__name__) is self.after:
                del sys.modules[self.after.__name__]
        else:
            setattr(self.owner, self.name, self.before)


class _Copies:
    """An index from objects to the module attributes that hold them; each module is read once.

    The entries for an object form a chain in flat lists of numbers and names, because garbage collection of a hundred
    thousand tuples would take longer than everything else.

    Args:
        skipped: top-level packages that are not searched.
    """

    def __init__(self, skipped: Collection[str]) -> None:
        self._skipped, self._read = skipped, set[str]()
        self._last: dict[int, int] = {}  # id of an object -> its newest place
        self._before: list[int | None] = []
        self._modules: list[str] = []
        self._names: list[str] = []

    def rebind(self, old: Any, new: Any, home: str | None = None) -> list[_Replacement]:
        """Set every module attribute that is ``old`` to ``new``, except in ``home``; returns the replacements."""
        if not (callable(old) or inspect.ismodule(old)):  # a plain value such as True is not a copy of the target
            return []
        self._read_modules()
        rebound: list[_Replacement] = []
        place = self._last.get(id(old))
        while place is not None:
            key, name = self._modules[place], self._names[place]
            module = sys.modules.get(key)
            if key != home and inspect.ismodule(module) and vars(module).get(name) is old:
                rebound.append(_Replacement(module, name, old, new))
                setattr(module, name, new)
                self._add(new, key, name)
            place = self._before[place]
        return rebound[::-1]

    def note(self, copy: _Replacement) -> None:
        """Record that a module attribute holds its previous value again."""
        self._add(copy.before, copy.owner.__name__, copy.name)

    def _read_modules(self) -> None:
        for key in sorted(sys.modules.keys() - self._read):
            self._read.add(key)
            if key.partition(".")[0] not in self._skipped and inspect.ismodule(sys.modules[key]):
                for name, value in list(vars(sys.modules[key]).items()):
                    self._add(value, key, name)

    def _add(self, value: Any, key: str, name: str) -> None:
        self._before.append(self._last.get(id(value)))
        self._last[id(value)] = len(self._names)
        self._modules.append(key)
        self._names.append(name)


class PatchManager:
    """Applies all patches or none, and undoes them exactly.

    Args:
        patches: Patch objects; ``add`` appends more.
        subject: () -> what is patched, with its version, for error messages ("megatron-core 0.16.1").
        skip_copies_in: top-level packages whose copies of an original are not rebound (torch keeps its own references).
        is_wrapped: whether another package's class that replaced the class to patch may inherit the patched method.
    """

    def __init__(
        self,
        patches: Iterable[Patch] = (),
        *,
        subject: Callable[[], str] = lambda: "the installed version",
        skip_copies_in: Collection[str] = ("torch",),
        is_wrapped: Callable[[type], bool] = lambda owner: False,
    ) -> None:
        self._patches = list(patches)
        self._subject = subject
        self._is_wrapped = is_wrapped
        self._skip_copies_in = frozenset(skip_copies_in)
        # Index of the patch -> its _Replacement objects, in the order of application.
        self._done: dict[int, list[_Replacement]] = {}
        self._status: dict[int, str] = {}

    def add(self, patches: Iterable[Patch]) -> None:
        """Append patches; the next ``apply`` applies them."""
        self._patches += patches

    @property
    def num_applied(self) -> int:
        return len(self._done)

    def apply(self) -> None:
        """Apply every patch that is not applied yet; on failure, undo this call's patches and raise PatchError."""
        fresh, copies = [], _Copies(self._skip_copies_in)
        try:
            for index, patch in enumerate(self._patches):
                if index in self._done:
                    continue
                self._status[index] = patch.when()
                if not self._status[index]:
                    self._done[index] = []
                    fresh.append(index)
                    self._apply_one(patch, self._done[index], copies)
        except BaseException:
            for index in reversed(fresh):
                self._undo_one(index, copies)
            raise

    def undo(self, indices: Iterable[int] | None = None) -> None:
        """Restore every attribute to its original object, newest patch first; a second call does nothing.

        Args:
            indices: indices of the patches to undo; default all.
        """
        copies = _Copies(self._skip_copies_in)
        for index in sorted(self._done if indices is None else indices, reverse=True):
            self._undo_one(index, copies)

    def report(self) -> list[PatchRow]:
        """One PatchRow with the current status per patch, in the order of application."""
        owners = dict(self._owners(range(len(self._patches))))
        return [
            PatchRow(patch.target, patch.reason, str(owners[index]), not owners[index].is_lost, owners[index].is_lost)
            if index in owners
            else PatchRow(patch.target, patch.reason, self._status.get(index) or "not applied", False)
            for index, patch in enumerate(self._patches)
        ]

    def check(self, targets: Collection[str]) -> None:
        """Check that the names of all applied patches in ``targets`` still lead to this project's functions.

        Raises:
            PatchError: somebody else replaced a name and does not call this project's function.
        """
        indices = [index for index, patch in enumerate(self._patches) if patch.target in targets]
        lost = [(self._patches[index], owner) for index, owner in self._owners(indices) if owner.is_lost]
        if lost:
            self._refuse(lost)

    def wrap_anew(self, targets: Collection[str], packages: Collection[str]) -> None:
        """Wrap the functions by which ``packages`` replaced this project's, as if they had been there first.

        Args:
            targets: targets of the patches to inspect.
            packages: top-level packages; replacements by others are left for ``check`` to reject.
        """
        copies = _Copies(self._skip_copies_in)
        indices = [index for index, patch in enumerate(self._patches) if patch.target in targets]
        for index, owner in list(self._owners(indices)):
            if owner.kind == "replaced" and owner.package in packages:
                renewed: list[_Replacement] = []
                self._apply_one(self._patches[index], renewed, copies)
                self._done[index] = renewed + self._done[index][1:]  # copies elsewhere still hold the older one

    def _refuse(self, lost: Sequence[tuple[Patch, Ownership]]) -> NoReturn:
        named = "; ".join(f"{patch.target} was {owner}" for patch, owner in lost[:4])
        more = f"; and {len(lost) - 4} more" if len(lost) > 4 else ""
        patch, owner = lost[0]
        raise PatchError(
            f"context parallelism is not whole: {named}{more}. Without this project's {patch.target} results would be "
            f"wrong (its reason: {patch.reason}). {way_out(owner.package, patch.target)}"
        )

    def _owners(self, indices: Iterable[int]) -> Iterator[tuple[int, Ownership]]:
        """(index, who owns its target now) of applied patches; the newest of several on one name decides for all."""
        newest = {(id(first.owner), first.name): first for first in (done[0] for done in self._done.values())}
        for index in indices:
            if index in self._done:
                first = newest[id(self._done[index][0].owner), self._done[index][0].name]
                yield index, ownership(self._patches[index].target, first.owner, first.after)

    def copies(self) -> list[tuple[str, str]]:
        """(target, "module.attribute") of every copy in another module that holds a replacement now."""
        return [
            (self._patches[index].target, f"{copy.owner.__name__}.{copy.name}")
            for index, replacements in self._done.items()
            for copy in replacements[1:]
        ]

    def _apply_one(self, patch: Patch, replacements: list[_Replacement], copies: _Copies) -> None:
        owner, name = self._resolve(patch)
        before = vars(owner).get(name, ABSENT)
        original = before if before is not ABSENT else inspect.getattr_static(owner, name, ABSENT)
        if before is ABSENT and not patch.create:
            if original is ABSENT:
                raise self._missing(patch, f"{_describe(owner)} has no attribute {name!r}")
            if not patch.inherited and not (isinstance(owner, type) and self._is_wrapped(owner)):
                raise self._missing(
                    patch,
                    f"{_describe(owner)} has no {name!r} of its own, it inherits it from {_heritage(owner, name)}",
                    owner,
                )
        after = _rebuild(original, patch.build)
        replacements.append(_Replacement(owner, name, before, after))
        setattr(owner, name, after)
        if original is ABSENT and inspect.ismodule(after):
            sys.modules[after.__name__] = after  # import statements look here
        if inspect.ismodule(owner) and original is not ABSENT:
            replacements += copies.rebind(original, after)

    def _undo_one(self, index: int, copies: _Copies) -> None:
        replacements = self._done.pop(index)
        first = replacements[0] if replacements else None
        for replacement in reversed(replacements):
            replacement.undo()
        for copy in replacements[1:]:
            copies.note(copy)
        # Modules imported after apply() hold copies of the replacement, which are restored too. The module that defines
        # the replacement is excluded, because the next apply() uses it.
        if first is not None and inspect.ismodule(first.owner) and first.before is not ABSENT:
            copies.rebind(first.after, first.before, home=getattr(first.after, "__module__", None))

    def _resolve(self, patch: Patch) -> tuple[Any, str]:
        """(owner, attribute name) of a dotted path: the longest importable module path, then attributes."""
        parts = patch.target.split(".")
        owner: Any = None
        used = 0
        for count in range(1, len(parts)):
            module_name = ".".join(parts[:count])
            try:
                owner, used = importlib.import_module(module_name), count
            except ModuleNotFoundError as error:
                # Distinguish a missing dependency of the module from a path that ends in a class.
                if error.name is None or not module_name.startswith(error.name):
                    raise self._missing(patch, f"importing {module_name} failed: {error}") from error
                break
        if owner is None:
            raise self._missing(patch, f"no module named {parts[0]!r}")
        for part in parts[used:-1]:
            if not hasattr(owner, part):
                raise self._missing(patch, f"{_describe(owner)} has no attribute {part!r}")
            owner = getattr(owner, part)
        return owner, parts[-1]

    def _missing(self, patch: Patch, detail: str, owner: Any = None) -> PatchError:
        """The error for a name that cannot be patched; ``owner`` is the class that lacks it, if any."""
        says = f"cannot patch {patch.target} in {self._subject()}: {detail}. No patch was applied. "
        if isinstance(owner, type) and is_foreign(owner, patch.target):
            return PatchError(f"{says}Somebody put {said_of(owner)} there. {way_out_of_class(owner)}")
        return PatchError(
            f"{says}Install a version that mindspeed_cp names as tried, or adapt this row of mindspeed_cp/patches "
            f"(its reason: {patch.reason})"
        )


def _describe(owner: Any) -> str:
    return f"{'module' if inspect.ismodule(owner) else 'class'} {getattr(owner, '__name__', owner)}"


def _heritage(owner: Any, name: str) -> str:
    """Name of the class from which ``owner`` inherits ``name``."""
    bases = (*getattr(owner, "__mro__", ()), *type(owner).__mro__)
    return str(next(base.__name__ for base in bases if name in vars(base)))


def _rebuild(original: Any, build: Callable[[Any], Any]) -> Any:
    """The replacement, wrapped as staticmethod or classmethod if the original is."""
    if original is ABSENT:
        return build(None)
    if isinstance(original, (staticmethod, classmethod)):
        return type(original)(build(original.__func__))
    return build(original)

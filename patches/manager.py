"""Declarative patches with exact undo; this module knows nothing of Megatron.

A ``Patch`` names one attribute by its dotted path, says how to build the replacement from the original, and why. The
manager applies all patches or none, rebinds the copies that other modules hold (``from x import y``), and restores
every attribute to the identical object in reverse order.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

_ABSENT = object()


class PatchError(RuntimeError):
    """A patch cannot be applied; nothing of the failed ``apply`` remains."""


@dataclass(frozen=True)
class Patch:
    """One attribute to replace.

    Args:
        target: dotted path of a module attribute or of a class attribute, such as "package.module.Class.method".
        build: original -> replacement. Gets the plain function of a staticmethod or classmethod, and None for an
            attribute that does not exist yet (``create``).
        reason: why, in one sentence; it is shown to the user.
        when: () -> why the patch is not needed here, or "" to apply it.
        create: the attribute may be absent; undo then removes it again.
        inherited: a class may have the attribute from a base alone; undo then removes the class's own. Without it such
            an attribute counts as gone: what the base has is another function than the one to replace.
    """

    target: str
    build: Callable
    reason: str
    when: Callable[[], str] = field(default=lambda: "")
    create: bool = False
    inherited: bool = False


@dataclass(frozen=True)
class PatchRow:
    """One line of ``PatchManager.report``; ``status`` is "applied" or says why not."""

    target: str
    reason: str
    status: str

    @property
    def applied(self):
        return self.status == "applied"


@dataclass
class _Replacement:
    """One attribute that was set; ``before`` is what its owner's own ``__dict__`` held, or _ABSENT."""

    owner: object
    name: str
    before: object
    after: object

    def undo(self):
        if self.before is _ABSENT:
            # Another tool may have removed it already.
            if self.name in vars(self.owner):
                delattr(self.owner, self.name)
            if inspect.ismodule(self.after) and sys.modules.get(self.after.__name__) is self.after:
                del sys.modules[self.after.__name__]
        else:
            setattr(self.owner, self.name, self.before)


class _Copies:
    """Which module attributes hold an object; every module is read once, when it is there.

    Chains in flat lists of numbers and names: of a hundred thousand tuples garbage collection would take more time than
    all of this.

    Args:
        skipped: top-level packages that are not looked at.
    """

    def __init__(self, skipped):
        self._skipped, self._read = skipped, set()
        self._last, self._before, self._modules, self._names = {}, [], [], []  # id of an object -> its newest place

    def rebind(self, old, new, home=None):
        """Set every module attribute that is ``old`` to ``new``, but for the module ``home``; returns what was set."""
        if not (callable(old) or inspect.ismodule(old)):  # a plain value such as True is not a copy of the target
            return []
        self._read_modules()
        rebound, place = [], self._last.get(id(old))
        while place is not None:
            key, name = self._modules[place], self._names[place]
            module = sys.modules.get(key)
            if key != home and inspect.ismodule(module) and vars(module).get(name) is old:
                rebound.append(_Replacement(module, name, old, new))
                setattr(module, name, new)
                self._add(new, key, name)
            place = self._before[place]
        return rebound[::-1]

    def note(self, copy):
        """A module attribute holds again what it held before."""
        self._add(copy.before, copy.owner.__name__, copy.name)

    def _read_modules(self):
        for key in sorted(sys.modules.keys() - self._read):
            self._read.add(key)
            if key.partition(".")[0] not in self._skipped and inspect.ismodule(sys.modules[key]):
                for name, value in list(vars(sys.modules[key]).items()):
                    self._add(value, key, name)

    def _add(self, value, key, name):
        self._before.append(self._last.get(id(value)))
        self._last[id(value)] = len(self._names)
        self._modules.append(key)
        self._names.append(name)


class PatchManager:
    """Applies patches all or none, and takes them back exactly.

    Args:
        patches: Patch objects; ``add`` takes more.
        subject: () -> what is patched with its version, for error messages ("megatron-core 0.16.1").
        skip_copies_in: top-level packages whose copies of an original are left alone (torch keeps references of its
            own).
    """

    def __init__(self, patches=(), *, subject=lambda: "the installed version", skip_copies_in=("torch",)):
        self._patches = list(patches)
        self._subject = subject
        self._skip_copies_in = frozenset(skip_copies_in)
        self._done = {}  # index of the patch -> its _Replacement objects, in the order of application
        self._status = {}

    def add(self, patches):
        """Append patches; the next ``apply`` applies them."""
        self._patches += patches

    @property
    def num_applied(self):
        return len(self._done)

    def apply(self):
        """Apply every patch that is not applied yet; a failure takes this call's patches back and raises PatchError."""
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

    def undo(self, indices=None):
        """Restore every attribute to the object it was, newest patch first; a second call does nothing.

        Args:
            indices: of the patches to take back; default all.
        """
        copies = _Copies(self._skip_copies_in)
        for index in sorted(self._done if indices is None else indices, reverse=True):
            self._undo_one(index, copies)

    def report(self):
        """One PatchRow per patch, in the order of application."""
        return [
            PatchRow(
                patch.target,
                patch.reason,
                "applied" if index in self._done else self._status.get(index) or "not applied",
            )
            for index, patch in enumerate(self._patches)
        ]

    def copies(self):
        """(target, "module.attribute") of every copy in another module that holds a replacement now."""
        return [
            (self._patches[index].target, f"{copy.owner.__name__}.{copy.name}")
            for index, replacements in self._done.items()
            for copy in replacements[1:]
        ]

    def _apply_one(self, patch, replacements, copies):
        owner, name = self._resolve(patch)
        before = vars(owner).get(name, _ABSENT)
        original = before if before is not _ABSENT else inspect.getattr_static(owner, name, _ABSENT)
        if before is _ABSENT and not patch.create:
            if original is _ABSENT:
                raise self._missing(patch, f"{_describe(owner)} has no attribute {name!r}")
            if not patch.inherited:
                raise self._missing(
                    patch,
                    f"{_describe(owner)} has no {name!r} of its own, it inherits it from {_heritage(owner, name)}",
                )
        after = _rebuild(original, patch.build)
        replacements.append(_Replacement(owner, name, before, after))
        setattr(owner, name, after)
        if original is _ABSENT and inspect.ismodule(after):
            sys.modules[after.__name__] = after  # import statements look here
        if inspect.ismodule(owner) and original is not _ABSENT:
            replacements += copies.rebind(original, after)

    def _undo_one(self, index, copies):
        replacements = self._done.pop(index)
        first = replacements[0] if replacements else None
        for replacement in reversed(replacements):
            replacement.undo()
        for copy in replacements[1:]:
            copies.note(copy)
        # Modules imported after apply() hold copies of the replacement; they get the original too.
        # The module that defines the replacement holds no copy: the next apply() builds from it.
        if first is not None and inspect.ismodule(first.owner) and first.before is not _ABSENT:
            copies.rebind(first.after, first.before, home=getattr(first.after, "__module__", None))

    def _resolve(self, patch):
        """(owner, attribute name) of a dotted path: the longest importable module, then attributes."""
        parts = patch.target.split(".")
        owner, used = None, 0
        for count in range(1, len(parts)):
            module_name = ".".join(parts[:count])
            try:
                owner, used = importlib.import_module(module_name), count
            except ModuleNotFoundError as error:
                # A dependency of the module that is missing is another matter than a path that ends in a class.
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

    def _missing(self, patch, detail):
        return PatchError(
            f"cannot patch {patch.target} in {self._subject()}: {detail}. No patch was applied. "
            "Install a version that mindspeed_cp names as tried, or adapt this row of mindspeed_cp/patches "
            f"(its reason: {patch.reason})"
        )


def _describe(owner):
    return f"{'module' if inspect.ismodule(owner) else 'class'} {getattr(owner, '__name__', owner)}"


def _heritage(owner, name):
    """Name of the class from which ``owner`` has ``name``."""
    bases = (*getattr(owner, "__mro__", ()), *type(owner).__mro__)
    return next(base.__name__ for base in bases if name in vars(base))


def _rebuild(original, build):
    """The replacement in the wrapping (staticmethod, classmethod) of the original."""
    if original is _ABSENT:
        return build(None)
    if isinstance(original, (staticmethod, classmethod)):
        return type(original)(build(original.__func__))
    return build(original)

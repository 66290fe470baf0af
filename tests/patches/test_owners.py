"""Who owns a patched name now, on toy modules: ours, wrapped by somebody who calls ours, or replaced."""

import functools

import pytest
from toy_modules import module_from

from mindspeed_cp.patches import Patch, PatchError, PatchManager

LIBRARY = """
def double(x):
    return 2 * x

class Attention:
    def forward(self, x):
        return x

    @staticmethod
    def helper(x):
        return x
"""
TARGETS = ("toy_library.double", "toy_library.Attention.forward", "toy_library.Attention.helper")
# Each defines wrap(original), as other packages write it.
WRAPPERS = {
    "closure": "def wrap(f):\n    return lambda *args: f(*args)\n",
    "inner closure": "def wrap(f):\n    def outer(*args):\n        return (lambda: f(*args))()\n    return outer\n",
    "wraps": (
        "import functools\ndef wrap(f):\n    @functools.wraps(f)\n    def call(*a): return f(*a)\n    return call\n"
    ),
    "partial": "import functools\ndef wrap(f):\n    return functools.partial(lambda g, *args: g(*args), f)\n",
    "default": "def wrap(f):\n    def call(*args, f=f): return f(*args)\n    return call\n",
    "global": "def wrap(f):\n    global saved\n    saved = f\n    return lambda *args: saved(*args)\n",
    "lru_cache": "import functools\ndef wrap(f):\n    return functools.lru_cache(f)\n",
    "object": (
        "class Wrapper:\n    def __init__(self, f): self.f = f\n    def __call__(self, *args): return self.f(*args)\n"
        "wrap = Wrapper\n"
    ),
    "own __wrapped__": (
        "import functools\ndef wrap(f):\n    @functools.wraps(f)\n    def call(*args): return call.__wrapped__(*args)\n"
        "    return call\n"
    ),
    "twice": "def wrap(f):\n    def one(*a): return f(*a)\n    def two(*a): return one(*a)\n    return two\n",
}
# Each replaces what it is given; the last two look like wrappers.
THIEVES = {
    "other function": "def wrap(f):\n    return lambda *args: 0\n",
    "wraps without a call": (
        "import functools\ndef wrap(f):\n    @functools.wraps(f)\n    def call(*args): return 0\n    return call\n"
    ),
    "partial of another": "import functools\ndef wrap(f):\n    return functools.partial(max, 0)\n",
}


@pytest.fixture
def library(monkeypatch):
    return module_from("toy_library", LIBRARY, monkeypatch)


@pytest.fixture
def manager(library):
    made = PatchManager(
        [Patch(target, lambda original: lambda *args: original(*args), "results would be wrong") for target in TARGETS]
    )
    made.apply()
    return made


def take(library, target, wrap):
    """Set ``target`` to ``wrap`` of what it is now."""
    parts = target.split(".")[1:]
    owner = functools.reduce(getattr, parts[:-1], library)
    setattr(owner, parts[-1], wrap(vars(owner)[parts[-1]]))


def statuses(manager):
    return {row.target: (row.status, row.applied) for row in manager.report()}


def test_what_nobody_touched_is_ours(manager):
    manager.check(TARGETS)
    assert set(statuses(manager).values()) == {("applied", True)}


@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("target", TARGETS[:2])
def test_somebody_who_calls_ours_is_named_and_permitted(manager, library, monkeypatch, target, how):
    other = module_from("toy_profiler", WRAPPERS[how], monkeypatch)
    take(library, target, other.wrap)
    manager.check(TARGETS)
    status, applied = statuses(manager)[target]
    assert applied and status.startswith("wrapped by ")
    if how not in ("lru_cache", "partial"):
        assert "toy_profiler" in status
    assert [status for name, (status, _) in statuses(manager).items() if name != target] == ["applied"] * 2


@pytest.mark.parametrize("how", THIEVES)
@pytest.mark.parametrize("target", TARGETS[:2])
def test_somebody_who_does_not_call_ours_is_an_error_that_names_module_and_file(
    manager, library, monkeypatch, target, how
):
    other = module_from("toy_thief", THIEVES[how], monkeypatch)
    take(library, target, other.wrap)
    status, applied = statuses(manager)[target]
    assert not applied and status.startswith("replaced by ")
    with pytest.raises(PatchError) as error:
        manager.check(TARGETS)
    says = [target, "results would be wrong", "before mindspeed_cp.megatron_adaptor", "leave the change of"]
    if how != "partial of another":  # of a builtin
        says += ["toy_thief.wrap", "/somewhere/toy_thief.py", "Import toy_thief before"]
    assert [part for part in says if part not in str(error.value)] == []
    manager.check([name for name in TARGETS if name != target])  # only what was asked for counts


def test_a_static_method_is_asked_as_its_function(manager, library, monkeypatch):
    other = module_from("toy_profiler", WRAPPERS["closure"], monkeypatch)
    library.Attention.helper = staticmethod(other.wrap(library.Attention.helper))
    assert statuses(manager)["toy_library.Attention.helper"][0].startswith("wrapped by toy_profiler.")
    library.Attention.helper = staticmethod(lambda x: x)
    with pytest.raises(PatchError, match="toy_library.Attention.helper was replaced by"):
        manager.check(TARGETS)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("    pass", "applied"),
        ("    def forward(self, x): return super().forward(x)", "wrapped by toy_speed.Fast"),
        ("    def forward(self, x): return x", "replaced by toy_speed.Fast (/somewhere/toy_speed.py)"),
    ],
    ids=["inherits", "super", "overrides"],
)
def test_a_subclass_in_the_place_of_the_class_is_asked_for_the_method(manager, library, monkeypatch, body, kind):
    other = module_from(
        "toy_speed", f"from toy_library import Attention\nclass Fast(Attention):\n{body}\n", monkeypatch
    )
    library.Attention = other.Fast
    status, applied = statuses(manager)["toy_library.Attention.forward"]
    assert status.startswith(kind) and applied == (not kind.startswith("replaced"))
    assert statuses(manager)["toy_library.Attention.helper"] == ("applied", True)


def test_a_class_of_another_family_in_its_place_is_named(manager, library, monkeypatch):
    source = "class Other:\n    def forward(self, x): return x\n"
    library.Attention = module_from("mindspeed.core.attention", source, monkeypatch).Other
    with pytest.raises(PatchError) as error:
        manager.check(TARGETS)
    says = ["mindspeed.core.attention.Other", "/somewhere/mindspeed.core.attention.py", "without them",
            "import mindspeed.megatron_adaptor before", "toy_library.Attention.helper was removed"]  # fmt: skip
    assert [part for part in says if part not in str(error.value)] == []


def test_megatrons_own_set_back_is_said_as_that(library):
    original, manager = library.double, PatchManager([Patch(TARGETS[0], lambda original: print, "a test")])
    manager.apply()
    library.double = original
    with pytest.raises(PatchError, match="toy_library has its own again"):
        manager.check(TARGETS)


def test_a_name_that_is_gone_was_removed(manager, library):
    del library.double
    assert statuses(manager)["toy_library.double"] == ("removed from toy_library (/somewhere/toy_library.py)", False)
    del library.Attention
    with pytest.raises(PatchError, match="toy_library.Attention.forward was removed"):
        manager.check(TARGETS)


def test_of_two_patches_on_one_name_the_newest_answers_for_both(library, monkeypatch):
    manager = PatchManager([Patch(TARGETS[0], lambda original: lambda x: 0, reason) for reason in ("one", "two")])
    manager.apply()
    assert [row.status for row in manager.report()] == ["applied", "applied"]
    library.double = module_from("toy_thief", THIEVES["other function"], monkeypatch).wrap(None)
    assert [row.applied for row in manager.report()] == [False, False]


def test_what_is_not_applied_is_not_asked(library):
    manager = PatchManager([Patch(TARGETS[0], lambda original: print, "a test", when=lambda: "not here")])
    manager.apply()
    library.double = None
    manager.check(TARGETS)
    assert statuses(manager) == {TARGETS[0]: ("not here", False)}


def test_after_undo_nothing_is_ours_and_nothing_is_missed(manager):
    manager.undo()
    manager.check(TARGETS)
    assert set(statuses(manager).values()) == {("not applied", False)}


def test_a_class_that_lay_there_before_is_named_with_what_to_do(library, monkeypatch):
    for package, way_out in (("mindspeed", "without them"), ("toy_speed", "Import toy_speed after")):
        other = module_from(f"{package}.cp", "class MindSpeedCPDotProductAttention:\n    pass\n", monkeypatch)
        monkeypatch.setattr(library, "Attention", other.MindSpeedCPDotProductAttention)
        with pytest.raises(PatchError) as error:
            PatchManager([Patch(f"toy_library.Attention.{name}", print, "a test") for name in ("__init__",)]).apply()
        says = [f"MindSpeedCPDotProductAttention of {package}.cp (/somewhere/{package}.cp.py)", "No patch was applied"]
        assert [part for part in (*says, way_out) if part not in str(error.value)] == []
        assert "Install a version" not in str(error.value)

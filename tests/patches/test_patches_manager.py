"""The patch manager on toy modules: all or none, copies included, and undo to the identical objects. No Megatron
here.
"""

import sys
from types import ModuleType

import pytest
from toy_modules import module_from

from mindspeed_cp.patches import Patch, PatchError, PatchManager


def plus_one(original):
    return lambda *args: original(*args) + 1


def shout(original):
    return lambda *args: original(*args).upper()


def own_attributes(*owners):
    """The attributes that owners hold themselves; compared by identity below."""
    return [dict(vars(owner)) for owner in owners]


def assert_identical(before, *owners):
    for attributes, owner in zip(before, owners, strict=True):
        now = dict(vars(owner))
        assert now.keys() == attributes.keys()
        assert [name for name in now if now[name] is not attributes[name]] == []


def test_copies_imported_by_value_are_rebound_and_come_back(library, user):
    before = own_attributes(library, user)
    manager = PatchManager([Patch("toy_library.double", plus_one, "a test")])
    manager.apply()
    assert (library.double(3), user.double(3), user.twice(3)) == (7, 7, 7)
    assert library.double is user.double is user.twice
    manager.undo()
    assert_identical(before, library, user)


def test_copies_are_listed_while_they_hold_the_replacement(library, user):
    manager = PatchManager(
        [Patch("toy_library.triple", plus_one, "nobody copied it"), Patch("toy_library.double", plus_one, "a test")]
    )
    assert manager.copies() == []
    manager.apply()
    assert manager.copies() == [("toy_library.double", "toy_user.double"), ("toy_library.double", "toy_user.twice")]
    manager.undo()
    assert manager.copies() == []


def test_a_copy_made_after_apply_gets_the_original_back(library, monkeypatch):
    original = library.double
    manager = PatchManager([Patch("toy_library.double", plus_one, "a test")])
    manager.apply()
    late = module_from("toy_late", "from toy_library import double\n", monkeypatch)
    assert late.double(3) == 7
    manager.undo()
    assert late.double is original


def test_a_copy_made_between_two_patches_of_one_target_gets_the_original_back(library, monkeypatch):
    original = library.double

    def importing(triple):
        module_from("toy_between", "from toy_library import double\n", monkeypatch)
        return triple

    rows = [("double", plus_one), ("triple", importing), ("double", plus_one), ("triple", plus_one)]
    manager = PatchManager([Patch(f"toy_library.{name}", build, "a test") for name, build in rows])
    manager.apply()
    between = sys.modules["toy_between"]
    assert between.double(3) == 8
    manager.undo()
    assert between.double is original


def test_undo_leaves_the_replacement_in_the_module_that_defines_it(library, monkeypatch):
    home = module_from("toy_home", "class Better:\n    pass\n", monkeypatch)
    better = home.Better
    manager = PatchManager([Patch("toy_library.Child", lambda original: home.Better, "a test")])
    for _ in range(2):  # without it the second apply would build from the original
        manager.apply()
        assert library.Child is better
        manager.undo()
        assert library.Child is not better and home.Better is better


def test_copies_in_skipped_packages_stay(library, monkeypatch):
    kept = module_from("toy_kept.inside", "from toy_library import double\n", monkeypatch)
    manager = PatchManager([Patch("toy_library.double", plus_one, "a test")], skip_copies_in=("toy_kept",))
    manager.apply()
    assert (library.double(3), kept.double(3)) == (7, 6)
    manager.undo()


def test_equal_plain_values_are_not_copies_of_the_target(library, user):
    manager = PatchManager([Patch("toy_library.FLAG", lambda original: False, "a test")])
    manager.apply()
    assert library.FLAG is False and user.FLAG is True  # True is everywhere; only the target itself may change
    manager.undo()
    assert library.FLAG is True


@pytest.mark.parametrize(
    ("target", "owner", "kept_there"),
    [
        ("toy_library.Child.walk", "Child", True),
        ("toy_library.Child.speak", "Child", False),
        ("toy_library.Child.helper", "Child", True),
        ("toy_library.Child.name", "Child", True),
        ("toy_library.Base.speak", "Base", True),
    ],
)
def test_undo_restores_class_attributes_own_and_inherited(library, target, owner, kept_there):
    name = target.rpartition(".")[2]
    before = own_attributes(library, library.Base, library.Child)
    assert (name in vars(getattr(library, owner))) is kept_there
    manager = PatchManager(
        [Patch(target, lambda original: lambda *args: "patched", "a test", inherited=not kept_there)]
    )
    manager.apply()
    assert name in vars(getattr(library, owner))
    manager.undo()
    assert_identical(before, library, library.Base, library.Child)


def test_static_and_class_methods_keep_their_kind(library):
    manager = PatchManager(
        [Patch("toy_library.Child.helper", plus_one, "a test"), Patch("toy_library.Child.name", shout, "a test")]
    )
    manager.apply()
    assert (library.Child.helper(1), library.Child().helper(1), library.Child.name()) == (2, 2, "CHILD")
    manager.undo()


def test_patching_an_inherited_method_leaves_the_base_alone(library):
    manager = PatchManager([Patch("toy_library.Child.speak", shout, "a test", inherited=True)])
    manager.apply()
    assert (library.Child().speak(), library.Base().speak()) == ("BASE", "base")
    manager.undo()
    assert library.Child().speak() == "base" and "speak" not in vars(library.Child)


@pytest.mark.parametrize("name", ["speak", "__repr__"])
def test_an_attribute_that_only_a_base_class_has_is_missing(library, user, name):
    before = own_attributes(library, library.Base, library.Child, user)
    manager = PatchManager(
        [
            Patch("toy_library.double", plus_one, "works"),
            Patch(f"toy_library.Child.{name}", shout, "it would be wrong otherwise"),
        ],
        subject=lambda: "toy-library 7.1",
    )
    with pytest.raises(PatchError) as error:
        manager.apply()
    says = [
        f"cannot patch toy_library.Child.{name} in toy-library 7.1",
        f"class Child has no {name!r} of its own",
        f"inherits it from {'Base' if name == 'speak' else 'object'}",
        "No patch was applied",
    ]
    assert [part for part in says if part not in str(error.value)] == []
    assert_identical(before, library, library.Base, library.Child, user)


def test_inherited_is_permission_and_not_creation(library):
    manager = PatchManager([Patch("toy_library.Child.gone", shout, "a test", inherited=True)])
    with pytest.raises(PatchError, match="class Child has no attribute 'gone'"):
        manager.apply()


def test_an_attribute_that_was_absent_is_absent_again(library):
    before = own_attributes(library)
    manager = PatchManager([Patch("toy_library.new", lambda original: (original, "made"), "a test", create=True)])
    manager.apply()
    assert library.new == (None, "made")
    manager.undo()
    assert_identical(before, library)


def test_a_created_module_can_be_imported_until_undo(library):
    manager = PatchManager(
        [Patch("toy_library.extra", lambda original: ModuleType("toy_library.extra"), "a test", create=True)]
    )
    manager.apply()
    assert sys.modules["toy_library.extra"] is library.extra
    manager.undo()
    assert "toy_library.extra" not in sys.modules and not hasattr(library, "extra")


def test_a_second_apply_changes_nothing(library):
    manager = PatchManager([Patch("toy_library.double", plus_one, "a test")])
    manager.apply()
    once = library.double
    manager.apply()
    assert library.double is once and library.double(3) == 7 and manager.num_applied == 1
    manager.undo()
    manager.undo()
    assert library.double(3) == 6 and manager.num_applied == 0


def test_added_patches_are_applied_by_the_next_apply_and_apply_works_after_undo(library):
    before = own_attributes(library)
    manager = PatchManager([Patch("toy_library.double", plus_one, "a test")])
    manager.apply()
    manager.add([Patch("toy_library.triple", plus_one, "a test")])
    manager.apply()
    assert (library.double(1), library.triple(1)) == (3, 4)
    manager.undo()
    assert_identical(before, library)
    manager.apply()
    assert (library.double(1), library.triple(1)) == (3, 4)
    manager.undo()
    assert_identical(before, library)


def test_two_patches_of_one_target_are_undone_in_reverse_order(library, user):
    before, seen = own_attributes(library, user), []

    def remember(original):
        seen.append(original)
        return lambda x: original(x) * 10

    manager = PatchManager(
        [Patch("toy_library.double", plus_one, "inner"), Patch("toy_library.double", remember, "outer")]
    )
    manager.apply()
    assert library.double(1) == user.twice(1) == 30 and seen[0] is not before[0]["double"]
    manager.undo()
    assert_identical(before, library, user)


def fails(original):
    raise RuntimeError("cannot build")


@pytest.mark.parametrize(
    "broken",
    [
        Patch("toy_library.triple", fails, "its build fails"),
        Patch("toy_library.Child.gone", plus_one, "the attribute is gone"),
        Patch("toy_library.triple", plus_one, "its condition fails", when=lambda: fails(None)),
    ],
    ids=["build", "missing", "when"],
)
def test_a_failure_takes_back_what_was_done(library, user, broken):
    before = own_attributes(library, library.Child, user)
    manager = PatchManager(
        [Patch("toy_library.double", plus_one, "works"), Patch("toy_library.Child.walk", shout, "works"), broken]
    )
    with pytest.raises(RuntimeError):
        manager.apply()
    assert_identical(before, library, library.Child, user)
    assert manager.num_applied == 0 and not any(row.applied for row in manager.report())


def test_a_failure_keeps_what_an_earlier_apply_did(library):
    manager = PatchManager([Patch("toy_library.double", plus_one, "works")])
    manager.apply()
    manager.add(
        [Patch("toy_library.Child.walk", shout, "works"), Patch("toy_library.triple", fails, "its build fails")]
    )
    with pytest.raises(RuntimeError, match="cannot build"):
        manager.apply()
    assert (library.double(3), library.Child().walk(), library.triple(3)) == (7, "child", 9)
    manager.undo()
    assert library.double(3) == 6


@pytest.mark.parametrize(
    ("target", "detail"),
    [
        ("toy_library.gone", "module toy_library has no attribute 'gone'"),
        ("toy_library.Child.gone", "class Child has no attribute 'gone'"),
        ("toy_library.Gone.walk", "module toy_library has no attribute 'Gone'"),
        ("toy_nowhere.double", "no module named 'toy_nowhere'"),
    ],
)
def test_a_missing_target_names_path_version_and_way_out(library, target, detail):
    manager = PatchManager([Patch(target, plus_one, "it would be wrong otherwise")], subject=lambda: "toy-library 7.1")
    with pytest.raises(PatchError) as error:
        manager.apply()
    says = [
        f"cannot patch {target} in toy-library 7.1",
        detail,
        "No patch was applied",
        "Install a version",
        "mindspeed_cp/patches",
        "it would be wrong otherwise",
    ]
    assert [part for part in says if part not in str(error.value)] == []


def test_a_missing_dependency_of_the_target_is_not_a_missing_name(tmp_path, monkeypatch):
    (tmp_path / "toy_needs.py").write_text("import toy_dependency_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        PatchError, match="importing toy_needs failed: No module named 'toy_dependency_that_nobody_has'"
    ):
        PatchManager([Patch("toy_needs.double", plus_one, "a test")]).apply()


def test_report_says_what_applied_and_why_not(library):
    manager = PatchManager(
        [
            Patch("toy_library.double", plus_one, "doubling was wrong"),
            Patch("toy_library.gone", plus_one, "only where gone exists", when=lambda: "nothing is gone here"),
        ]
    )
    rows = manager.report()
    assert [row.status for row in rows] == ["not applied", "not applied"]
    manager.apply()
    rows = manager.report()
    assert [(row.target, row.reason, row.status, row.applied) for row in rows] == [
        ("toy_library.double", "doubling was wrong", "applied", True),
        ("toy_library.gone", "only where gone exists", "nothing is gone here", False),
    ]
    assert manager.num_applied == 1
    manager.undo()
    assert not any(row.applied for row in manager.report())


def test_what_a_named_package_put_in_our_place_is_wrapped_as_if_it_had_been_there_first(library, monkeypatch):
    manager = PatchManager([Patch("toy_library.double", plus_one, "doubling was wrong")])
    manager.apply()
    theirs = module_from("toy_framework", "def double(x):\n    return 20 * x\n", monkeypatch).double
    other = module_from("toy_other", "def double(x):\n    return 200 * x\n", monkeypatch).double
    library.double = other
    manager.wrap_anew(["toy_library.double"], ["toy_framework"])
    assert library.double is other, "of packages that are not named nothing is touched"
    library.double = theirs
    manager.wrap_anew(["toy_library.double"], ["toy_framework"])
    manager.check(["toy_library.double"])
    assert library.double(3) == 61
    manager.undo()
    assert library.double is theirs

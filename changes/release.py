"""Make a release: CHANGELOG.md's Unreleased part and the files of changes/ become a version.

python changes/release.py 0.2.0            writes CHANGELOG.md and mindspeed_cp/version.py, removes the files
python changes/release.py --notes 0.2.0    prints the changes of a version: the message of its tag
"""

import argparse
import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FRAGMENT = re.compile(r"[a-z0-9][a-z0-9_-]*\.(added|changed|removed|fixed)\.md")
VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
UNRELEASED = "## [Unreleased]\n\nFurther changes lie in [changes/](changes/README.md), one file each.\n"


def fragments(root: Path) -> list[Path]:
    """The files of changes/.

    Raises:
        ValueError: a file's name has no kind of change, or its text is not a list.
    """
    found = sorted(path for path in (root / "changes").glob("*.*") if path.name not in ("README.md", "release.py"))
    for path in found:
        if not FRAGMENT.fullmatch(path.name) or not path.read_text(encoding="utf-8").startswith("* "):
            raise ValueError(
                f"changes/{path.name} must be NAME.added.md, or changed, removed, fixed, and begin with '* '."
            )
    return found


def section_of(root: Path, name: str) -> str:
    """Return the changelog's section of a version, or of "Unreleased", without its title.

    Raises:
        ValueError: there is none.
    """
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(rf"^## \[{re.escape(name)}\].*\n((?:(?!## \[).*\n?)*)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"CHANGELOG.md has no part [{name}].")
    return found[1].strip() + "\n"


def joined(root: Path) -> str:
    """Return the unreleased changes as text, by kind of change."""
    _, *parts = re.split(r"^### (.+)\n", section_of(root, "Unreleased"), flags=re.MULTILINE)
    kinds = {kind: text.strip() for kind, text in zip(parts[::2], parts[1::2])}
    for path in fragments(root):
        kind = path.name.split(".")[1].capitalize()
        kinds[kind] = f"{kinds.get(kind, '')}\n{path.read_text(encoding='utf-8').strip()}".strip()
    return "\n\n".join(f"### {kind}\n\n{text}" for kind, text in kinds.items()) + "\n"


def release(root: Path, version: str, day: str) -> None:
    """Make the unreleased changes the section of ``version``, and write the version number.

    Raises:
        ValueError: the version is not later than the current one.
    """
    number, log = root / "mindspeed_cp/version.py", root / "CHANGELOG.md"
    source = number.read_text(encoding="utf-8")
    old = VERSION.search(source)[1]
    plain = re.fullmatch(r"\d+\.\d+\.\d+", version)
    if not plain or [*map(int, version.split("."))] <= [*map(int, old.split("."))]:
        raise ValueError(f"{version} must be three numbers and later than {old}.")
    text, new = log.read_text(encoding="utf-8"), joined(root)
    before, _, rest = text.partition("## [Unreleased]\n")
    released = rest.partition("\n## [")
    parts = (before, UNRELEASED, f"\n## [{version}] - {day}\n\n", new, *released[1:])
    log.write_text("".join(parts), encoding="utf-8")
    number.write_text(source.replace(f'"{old}"', f'"{version}"'), encoding="utf-8")
    for path in fragments(root):
        path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", action="store_true", help="print, and change nothing")
    parser.add_argument("version", help="three numbers")
    options = parser.parse_args()
    try:
        if options.notes:
            print(section_of(ROOT, options.version), end="")
        else:
            release(ROOT, options.version, datetime.date.today().isoformat())
    except ValueError as error:
        print(f"release.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The documentation agrees with the program: flags, files, links, examples, both languages; nothing of one machine.

Python blocks marked ``python run`` run in one process, those marked ``python torchrun=N`` on N processes.
"""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from mindspeed_cp import ContextParallelConfig
from mindspeed_cp.arguments import add_context_parallel_arguments, mindspeed_flags, validate, yaml_file
from mindspeed_cp.arguments.flags import GROUP_TITLE
from mindspeed_cp.arguments.launch import read_flags
from mindspeed_cp.kernels import KERNELS
from mindspeed_cp.patches import versions
from mindspeed_cp.settings.algorithms import ALGORITHMS, REFUSED
from mindspeed_cp.settings.fields import KV_CACHE_POLICIES

ROOT = Path(__file__).resolve().parents[2]
READMES = ["README.md", "README.zh-CN.md"]
DOCS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*READMES, "CONTRIBUTING.md", "CHANGELOG.md", *DOCS]
FLAG_PAGES = ["docs/flags.md", "docs/zh-CN/flags.md"]
# English page -> the same page in Chinese.
TRANSLATIONS = {"README.md": "README.zh-CN.md"} | {
    page.replace("/zh-CN/", "/"): page for page in DOCS if page.startswith("docs/zh-CN/")
}
README_LINES = 230
BADGE = "../../actions/workflows/"  # of the repository on GitHub, wherever it is
# What users or runs make, and other people's files; everything else that looks like a path here must exist.
ELSEWHERE = {
    "mindspeed_cp/kernels/mine.py",
    "data/topics",
    "latest.txt",
    "loss.png",
    "here.yaml",
    "plan.png",
    "attend.py",
    "report.md",
    "config.yaml",
    "FILE.yaml",
    "posttrain_gpt.py",
    "pretrain_deepseek4.py",
    "pretrain_gpt.py",
    "pretrain_mamba.py",
    "pretrain_vlm.py",
    "set_env.sh",
}
# What the tests run with.
PINNED = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
OUTPUT = re.compile(r"^```python ([^\n]*)\n(.*?)^```$(?:(?!^```).)*?^```text output\n(.*?)^```$", re.M | re.S)
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, info):
    """(info string, code) of the fenced blocks whose info string begins with ``info``."""
    return [(found, code) for found, code in FENCE.findall(text_of(page)) if found.startswith(info)]


def prose(page):
    return FENCE.sub("", text_of(page))


def actions(title=GROUP_TITLE):
    """Every flag of one of the project's argument groups."""
    parser = add_context_parallel_arguments(argparse.ArgumentParser())
    (group,) = [group for group in parser._action_groups if group.title == title]
    return group._group_actions


def flag_table(page):
    """flag -> cells of its row in the flag table."""
    table = next(part for part in re.split(r"\n\n", text_of(page)) if "\n| `--context-parallel-size` |" in part)
    lines = [line for line in table.splitlines() if line.startswith("| `--")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({row[0] for row in rows}) == len(rows), f"{page} has two rows for a flag"
    return {row[0].split("`")[1]: row for row in rows}


@pytest.mark.parametrize("page", FLAG_PAGES)
@pytest.mark.parametrize("action", actions(), ids=lambda action: action.option_strings[0])
def test_the_flag_table_gives_every_flag_with_its_default_and_choices(page, action):
    name, default, choices, rule = flag_table(page)[action.option_strings[0]]
    assert all(f"`{other}`" in name for other in action.option_strings), name
    if action.default not in (None, False):
        assert default == str(action.default)
    for choice in action.choices or []:
        assert re.search(rf"\b{re.escape(str(choice))}\b", choices), f"{choice} is not among {choices}"
    assert rule


@pytest.mark.parametrize("page", FLAG_PAGES)
def test_the_flag_table_has_no_flag_that_does_not_exist(page):
    assert set(flag_table(page)) == {action.option_strings[0] for action in actions()}


@pytest.mark.parametrize("page", [*FLAG_PAGES, "docs/migration-from-mindspeed.md"])
def test_every_flag_that_is_accepted_without_effect_is_named(page):
    flags = [flag for action in actions(mindspeed_flags.GROUP_TITLE) for flag in action.option_strings]
    assert [flag for flag in flags if not re.search(rf"`{flag}(?![\w-])", text_of(page))] == []
    assert [name for name in REFUSED if name not in text_of(page)] == []


def test_every_algorithm_kernel_and_policy_is_documented():
    pages = "".join(text_of(page) for page in DOCS if page.startswith("docs/algorithms"))
    assert all(name in pages for name in ALGORITHMS)
    for page in FLAG_PAGES:
        assert all(re.search(rf"(?<!\w){name}(?!\w)", text_of(page)) for name in [*ALGORITHMS, *KERNELS])
    for page in READMES:
        assert all(name in text_of(page) for name in ALGORITHMS)
    for page in ("docs/choosing.md", "docs/zh-CN/choosing.md"):
        assert all(f"| {policy} |" in text_of(page) for policy in KV_CACHE_POLICIES if policy)


@pytest.mark.parametrize("page", READMES)
def test_the_readme_is_short(page):
    assert len(text_of(page).splitlines()) <= README_LINES


@pytest.mark.parametrize("index", ["docs/README.md", "docs/zh-CN/README.md"])
def test_every_page_is_in_the_index_in_its_language(index):
    linked = {((ROOT / index).parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)", text_of(index))}
    pages = [page for page in DOCS if "/zh-CN/" not in page and page != "docs/README.md"]
    if "/zh-CN/" in index:
        pages = [TRANSLATIONS.get(page, page) for page in pages]
    assert not [page for page in pages if (ROOT / page).resolve() not in linked]


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page))
    assert links or page not in READMES
    for link in links:
        if link.startswith(("https://", BADGE)):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.is_file(), f"{page}: {link}"
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: no heading for {link}"


def anchors(text):
    """The anchors of the headings, by GitHub's rule: lower case, spaces to dashes, punctuation dropped."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_file_named_in_the_text_exists(page):
    ours = (path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != ".")
    folders = "|".join(sorted(set(ours) - {"runs", "data"}))  # those are what the page's own commands make
    pattern = rf"(?<![\w./-])((?:{folders})/[\w./*-]+|[\w-]+\.(?:py|sh|md|toml|txt|yaml|png))(?![\w-])"
    names = re.findall(pattern, text_of(page))
    bases = [ROOT, (ROOT / page).parent, ROOT / "mindspeed_cp"]
    missing = {
        name
        for name in (name.rstrip("./") for name in names)
        if name not in ELSEWHERE and not any(list(base.glob(name)) for base in bases)
    }
    assert not missing, f"{page} names files that do not exist"


@pytest.mark.parametrize("page", PAGES)
def test_every_test_named_in_the_text_exists(page):
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text_of(page)):
        assert f"def {name}(" in tests, name


def default_patches():
    """How many patches a run on megatron-core alone counts: the line of the example that really runs."""
    (line,) = [output for _, _, output in OUTPUT.findall(text_of("docs/megatron.md"))]
    return int(re.search(r"(\d+) patches", line).group(1))


def described_configurations():
    """Every phrase that the documents may use for what is on."""
    for algorithm in ALGORITHMS:
        for size in (2, 4, 8):
            degree = 2 if algorithm == "hybrid_cp_algo" else None
            if degree != size:
                config = ContextParallelConfig(context_parallel_size=size, algorithm=algorithm, ulysses_degree=degree)
                yield config.describe()


@pytest.mark.parametrize("page", PAGES)
def test_every_startup_line_is_what_the_program_would_say(page):
    lines = re.findall(r"Context parallelism: (.+), kernel (\w+), (\d+) patches", text_of(page))
    for phrase, kernel, patches in lines:
        assert phrase in set(described_configurations()), phrase
        assert kernel in KERNELS
        # With a Megatron-LM checkout there are those of its training code as well.
        assert int(patches) == default_patches() or kernel == "npu"


@pytest.mark.parametrize("page", READMES)
def test_the_worked_command_resolves_to_the_line_below_it(page):
    ((label, script),) = blocks(page, "bash torchrun=")
    command = shlex.split(script.replace("\\\n", " ").splitlines()[-1])
    size = int(label.partition("=")[2])
    assert command[:3] == ["torchrun", "--nproc-per-node", str(size)]
    args, _ = read_flags(command[command.index("pretrain_gpt.py") + 1 :])
    config, setup = validate(args, size)
    assert not setup.notices
    assert f"Context parallelism: {config.describe()}, kernel npu, " in text_of(page)


@pytest.mark.parametrize("page", READMES)
def test_versions_in_the_readme_are_those_of_the_package(page):
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    lowest = re.search(r"torch>=([\d.]+)", setup).group(1), re.search(r'python_requires=">=([\d.]+)"', setup).group(1)
    schemas = sorted(
        (ROOT / "tests/helpers/fake_torch_npu/schemas").glob("*.txt"), key=lambda path: version_key(path.stem)
    )
    tried = versions.OLDEST, versions.DEFAULT, schemas[0].stem, schemas[-1].stem
    for version in (*lowest, *tried, PINNED["torch"], PINNED["megatron-core"]):
        assert re.search(rf"(?<![\d.]){re.escape(version)}(?![\d])", text_of(page)), version


def test_the_page_of_versions_has_the_table_that_everything_goes_by():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text_of("docs/versions.md").splitlines()]
    for row in versions.MEGATRONS:
        assert [row.version, " to ".join(row.pythons), row.notes] in rows
    assert ["Python", ", ".join(versions.PYTHONS)] in [row[:2] for row in rows]
    assert ["torch", f"{versions.LOWEST_TORCH} to {versions.TORCH}"] in [row[:2] for row in rows]
    assert PINNED["torch"] == versions.TORCH and PINNED["megatron-core"] == versions.DEFAULT


def test_the_chinese_page_of_versions_has_the_same_versions():
    page = text_of("docs/zh-CN/versions.md")
    rows = [f"| {row.version} | {' 到 '.join(row.pythons)} |" for row in versions.MEGATRONS]
    rows += [f"| Python | {'、'.join(versions.PYTHONS)} |", f"| torch | {versions.LOWEST_TORCH} 到 {versions.TORCH} |"]
    assert [row for row in rows if row not in page] == []
    assert len(re.findall(r"^\| \d", page, re.M)) == len(versions.MEGATRONS)


def version_key(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def without_prose(text):
    return FENCE.sub("", text)


@pytest.mark.parametrize("english, chinese", TRANSLATIONS.items())
def test_both_languages_have_the_same_structure_and_the_same_code(english, chinese):
    if english == "docs/README.md":  # an index says which pages exist in its language
        return
    texts = text_of(english), text_of(chinese)
    for pattern in (r"^#{1,3} ", r"^\| ?`?--", r"^\|", r"^<!-- .* -->$", r"^\* "):
        counts = [len(re.findall(pattern, without_prose(text), re.M)) for text in texts]
        assert counts[0] == counts[1], f"{pattern}: {counts}"
    code = [[re.sub(r"#.*", "", block).split() for info, block in FENCE.findall(text) if info] for text in texts]
    assert code[0] == code[1]
    formulas = [sorted(re.findall(r"`([^`\n]*)`", without_prose(text))) for text in texts]
    assert formulas[0] == formulas[1]


@pytest.mark.parametrize("english, chinese", TRANSLATIONS.items())
def test_each_language_of_a_page_begins_with_a_link_to_the_other(english, chinese):
    for page, other in ((english, chinese), (chinese, english)):
        top = "\n".join(text_of(page).splitlines()[:4])
        links = [((ROOT / page).parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)\)", top)]
        assert (ROOT / other).resolve() in links


@pytest.mark.parametrize("page", ["docs/launching.md", "docs/zh-CN/launching.md"])
def test_the_page_on_launching_has_the_presets_and_every_key_of_the_yaml_file(page):
    page = text_of(page)
    presets = re.findall(
        r"(\w+)\) SEQ_LENGTH=\d+ preset=\((\d+) (\w+) (\S+) (\d+)\)", text_of("scripts/launch/common.sh")
    )
    assert len(presets) == 3
    for length, size, algorithm, degree, window in presets:
        assert re.search(rf"\| {length} \| {size} \| {algorithm} \| {degree.strip(chr(34))} ?\| {window} \|", page), (
            length
        )
    assert not [
        key for key in yaml_file.known_keys() if f"`{key}`" not in page and f"`{key.rpartition('.')[2]}`" not in page
    ]


def test_every_algorithm_page_says_when_what_and_needs():
    for page in (page for page in DOCS if page.startswith("docs/algorithms")):
        for heading in ("## What it communicates", "## What it needs", "## Example"):
            assert heading in text_of(page), f"{page}: {heading}"
        assert "## When" in text_of(page) or "## How the length is found" in text_of(page), page
        assert blocks(page, "text"), f"{page} has no picture"


def repository_texts():
    """(path, text) of every text file that belongs to the repository."""
    tops = [
        path
        for path in ROOT.iterdir()
        if path.name in ("mindspeed_cp", "patches", "arguments", "tests", "scripts", "docs", ".ci", ".github")
    ]
    files = [path for top in tops for path in top.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files += [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]  # a file in a worktree
    endings = (".py", ".sh", ".md", ".toml", ".txt", ".yml", ".yaml", ".cfg", "")
    for path in files:
        if path.suffix in endings and path.stat().st_size < 1 << 20:
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


# Classes of one character keep this file from finding itself.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.])/(?:[w]ork|[r]oot|[h]ome|[U]sers)/\w",
    "a package index": r"[i]ndex-url|[t]rusted-host|[p]ypi\.org"
    r"|https?://[^\s/)]*/(?:simple|pypi|artifactory|nexus|repository)\b",
    "a bare address": r"https?://\d+\.\d+\.\d+\.\d+",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_names_one_machine_or_a_package_index(what):
    found = [
        f"{path}: {match.group()}" for path, text in repository_texts() for match in re.finditer(FORBIDDEN[what], text)
    ]
    assert not found, f"{what} in {found}"

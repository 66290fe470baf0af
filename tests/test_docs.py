"""The documentation agrees with the program: flags, files, links, examples, both languages; nothing of one machine.

Python blocks marked ``python run`` run in one process, those marked ``python torchrun=N`` on N processes.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mindspeed_cp.arguments import add_context_parallel_arguments

from mindspeed_cp.algorithms import ALGORITHMS
from mindspeed_cp.config import KV_CACHE_POLICIES
from mindspeed_cp.kernels import KERNELS

ROOT = Path(__file__).resolve().parent.parent
READMES = ["README.md", "README.zh-CN.md"]
PAGES = READMES + [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
# What users or runs make, and other people's files; everything else that looks like a path here must exist.
ELSEWHERE = {
    "data/topics",
    "loss.png",
    "attend.py",
    "report.md",
    "config.yaml",
    "FILE.yaml",
    "pretrain_gpt.py",
    "set_env.sh",
}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, info):
    """(info string, code) of the fenced blocks whose info string begins with ``info``."""
    return [(found, code) for found, code in FENCE.findall(text_of(page)) if found.startswith(info)]


def prose(page):
    return FENCE.sub("", text_of(page))


def actions():
    """Every flag of the project's argument group."""
    parser = add_context_parallel_arguments(argparse.ArgumentParser())
    return [action for action in parser._actions if action.dest != "help"]


def flag_table(page):
    """flag -> cells of its row in the flag table."""
    table = next(part for part in re.split(r"\n\n", text_of(page)) if "\n| `--context-parallel-size` |" in part)
    lines = [line for line in table.splitlines() if line.startswith("| `--")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({row[0] for row in rows}) == len(rows), f"{page} has two rows for a flag"
    return {row[0].split("`")[1]: row for row in rows}


@pytest.mark.parametrize("page", READMES)
@pytest.mark.parametrize("action", actions(), ids=lambda action: action.option_strings[0])
def test_the_flag_table_gives_every_flag_with_its_default_and_choices(page, action):
    name, default, choices, rule = flag_table(page)[action.option_strings[0]]
    assert all(f"`{other}`" in name for other in action.option_strings), name
    if action.default not in (None, False):
        assert default == str(action.default)
    for choice in action.choices or []:
        assert re.search(rf"\b{re.escape(str(choice))}\b", choices), f"{choice} is not among {choices}"
    assert rule


@pytest.mark.parametrize("page", READMES)
def test_the_flag_table_has_no_flag_that_does_not_exist(page):
    assert set(flag_table(page)) == {action.option_strings[0] for action in actions()}


def test_every_algorithm_kernel_and_policy_is_documented():
    pages = "".join(text_of(page) for page in PAGES if page.startswith("docs/algorithms"))
    assert all(name in pages for name in ALGORITHMS)
    for page in READMES:
        assert all(re.search(rf"(?<!\w){name}(?!\w)", text_of(page)) for name in [*ALGORITHMS, *KERNELS])
        assert all(f"| {policy} |" in text_of(page) for policy in KV_CACHE_POLICIES if policy)


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page))
    assert links or page not in READMES
    for link in links:
        if link.startswith("https://"):
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
    folders = "|".join(sorted(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."))
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
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text_of(page)):
        assert f"def {name}(" in tests, name


def run_block(code, num_processes, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    launcher = launcher if num_processes > 1 else []
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "MINDSPEED_CP_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *launcher, script],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def unique_blocks(info):
    """pytest parameters; blocks that both READMEs share, comments aside, run once."""
    found = {
        tuple(re.sub(r"#.*", "", code).split()): (code, label, page)
        for page in reversed(PAGES)
        for label, code in blocks(page, info)
    }
    return [
        pytest.param(code, label, id=f"{page}-{number}") for number, (code, label, page) in enumerate(found.values())
    ]


@pytest.mark.cpu_only
@pytest.mark.parametrize("code, label", unique_blocks("python run"))
def test_examples_for_one_process_run(code, label, tmp_path):
    run_block(code, 1, tmp_path)


@pytest.mark.cpu_only
@pytest.mark.megatron
@pytest.mark.parametrize("code, label", unique_blocks("python torchrun="))
def test_examples_for_several_processes_run(code, label, tmp_path):
    run_block(code, int(label.partition("=")[2]), tmp_path)


@pytest.mark.cpu_only
@pytest.mark.parametrize("page", READMES)
def test_the_picture_of_the_split_is_what_the_program_prints(page, tmp_path):
    picture = next(code for _, code in blocks(page, "text") if code.startswith("token "))
    code = next(code for _, code in blocks(page, "python run") if "SequenceLayout.build" in code)
    printed = [line.split() for line in run_block(code, 1, tmp_path).splitlines()]
    assert printed == [line.split() for line in picture.splitlines()]


def test_both_languages_have_the_same_structure_and_the_same_code():
    english, chinese = (text_of(page) for page in READMES)
    for pattern in (r"^#{1,3} ", r"^\| ?`?--", r"^\|", r"^<!-- .* -->$", r"^\* "):
        counts = [len(re.findall(pattern, FENCE.sub("", text), re.M)) for text in (english, chinese)]
        assert counts[0] == counts[1], f"{pattern}: {counts}"
    code = [
        [re.sub(r"#.*", "", block).split() for info, block in FENCE.findall(text) if info]
        for text in (english, chinese)
    ]
    assert code[0] == code[1]
    formulas = [re.findall(r"`([^`\n]*)`", FENCE.sub("", text)) for text in (english, chinese)]
    assert sorted(formulas[0]) == sorted(formulas[1])


def test_every_algorithm_page_says_when_what_and_needs():
    for page in (page for page in PAGES if page.startswith("docs/algorithms")):
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
    files += [path for path in ROOT.iterdir() if path.is_file()]
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

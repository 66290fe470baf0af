"""One truth for each fact of the docs: versions, masks, forms of arguments, the picture, the site, a checkout."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from inspect import Parameter, signature
from pathlib import Path

import pytest
import torch
import yaml
from test_docs import BADGE, DOCS, PAGES, READMES, ROOT, actions, text_of

import mindspeed_cp
from mindspeed_cp import (
    ContextParallelConfig,
    ContextParallelGroups,
    SequenceLayout,
    context_parallel_attention,
)
from mindspeed_cp.arguments import validate
from mindspeed_cp.arguments.launch import read_flags
from mindspeed_cp.patches import versions

NUMBERS = {word: n for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS |= {"五": 5, "六": 6, "七": 7, "八": 8, "九": 9}


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_every_page_says_the_same_of_the_versions_that_were_tried(page):
    newest, text = versions.MEGATRONS[-1].version, text_of(page)
    for last in re.findall(rf"{re.escape(versions.OLDEST)} (?:to|到) (\d+\.\d+\.\d+)", text):
        assert last == newest, f"0.12.1 to {last}"
    for word in re.findall(
        r"(?:script|checkouts?|脚本).{0,12}? on (\w+) (?:versions|checkouts)|([五六七八九])个版本的 Mega", text
    ):
        assert NUMBERS["".join(word)] == sum(row.on_checkout for row in versions.MEGATRONS), word


def test_no_ratio_of_a_command_stands_on_two_pages():
    assert not (ROOT / "docs/performance.md").exists()
    assert text_of("docs/measurements.md").count("<!-- bench_attention -->") == 1


def test_every_keyword_of_the_api_has_its_form():
    table = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text_of("docs/python-api.md"), re.M))
    keywords = [
        name
        for name, parameter in signature(context_parallel_attention).parameters.items()
        if parameter.kind is Parameter.KEYWORD_ONLY and name not in ("config", "groups", "layout")
    ]
    assert set(keywords) <= set(table) and all(table.values())


def test_a_mask_of_the_batch_and_the_causal_type_are_said_to_hide_together():
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    mask[:2, :2] = False  # a prefix of two
    outs = {}
    for kind in ("causal", "general", "full"):
        config = ContextParallelConfig(context_parallel_size=1, attention_mask_type=kind)
        groups, layout = ContextParallelGroups(config.hierarchy, 0, (0,)), SequenceLayout.build(config, 4)
        query = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 1, 2)
        keywords = dict(config=config, groups=groups, layout=layout)
        outs[kind] = context_parallel_attention(query, query, query, **keywords, attention_mask=mask)
        plain = context_parallel_attention(query, query, query, **keywords)
        assert (kind == "causal") == torch.equal(outs[kind], plain) or kind == "general"
    assert torch.equal(outs["general"], outs["full"]) and not torch.equal(outs["general"], outs["causal"])
    page = text_of("docs/python-api.md")
    assert "applies on top of the causal mask where the configuration's mask type is causal" in page
    for each in (page, text_of("docs/zh-CN/python-api.md")):  # said once
        assert each.count('attention_mask_type="general"') == 1


@pytest.mark.parametrize("page", ["docs/migration-from-mindspeed.md", "docs/zh-CN/migration-from-mindspeed.md"])
def test_every_flag_of_ours_is_on_the_page_of_migration(page):
    flags = [flag for action in actions() for flag in action.option_strings]
    assert [flag for flag in flags if not re.search(rf"`{flag}(?![\w-])", text_of(page))] == []


def test_a_length_that_aligned_ulysses_refuses_is_a_matter_of_the_flags_alone():
    flags = "--context-parallel-size 2 --num-attention-heads 4 --num-layers 1 --hidden-size 8 --seq-length"
    with pytest.raises(ValueError, match="--seq-length 15 must be divisible by"):
        validate(read_flags([*flags.split(), "15"])[0], 2)
    config = ContextParallelConfig(context_parallel_size=2, algorithm="ulysses_cp_algo")
    lengths = [SequenceLayout.build(config, 15).length(rank) for rank in range(2)]
    assert lengths == [8, 7]
    (row,) = re.findall(r"^\| lengths that P does not divide \| ([^|]+) \|", text_of("docs/features.md"), re.M)
    assert row == "raises: use `--gather-size-calculator dynamic` (API: works)"
    assert "work with every algorithm here, aligned Ulysses included" in text_of("docs/python-api.md")


def test_the_map_of_the_code_has_every_room_and_no_other():
    map_of_code = re.search(r"^## Where things are\n\n```text\n(.*?)^```", text_of("CONTRIBUTING.md"), re.M | re.S)[1]
    inside, outside = (set(re.findall(rf"{indent}([a-z_]+)/", map_of_code, re.M)) for indent in ("^  ", "^"))
    inside |= set(re.findall(r"^  \w+/, (\w+)/", map_of_code, re.M))
    rooms = {path.name for path in (ROOT / "mindspeed_cp").iterdir() if (path / "__init__.py").is_file()}
    assert inside == rooms - {"patches", "arguments"}
    assert outside == {"mindspeed_cp", "patches", "arguments", "scripts", "tests", "changes"}


def test_both_readmes_give_the_same_dates():
    dates = [re.findall(r"20\d\d-\d\d-\d\d", text_of(page)) for page in READMES]
    assert dates[0] == dates[1] != []


@pytest.mark.parametrize("page", READMES)
def test_a_picture_and_a_number_stand_at_the_top_of_the_readme(page):
    top = "\n".join(text_of(page).splitlines()[:20])
    (picture,) = re.findall(r"!\[[^\]]+\]\((docs/[^)]+)\)", top)
    drawn = text_of(picture)
    for algorithm, cells in re.findall(r'<g data-layout="(\w+)">(.*?)</g>', drawn):
        degree = 2 if algorithm == "hybrid_cp_algo" else None
        config = ContextParallelConfig(context_parallel_size=4, algorithm=algorithm, ulysses_degree=degree)
        layout = SequenceLayout.build(config, 16)
        owner = {token: rank for rank in range(4) for token in layout.positions(rank).tolist()}
        assert [int(rank) for rank in re.findall(r">(\d)</text>", cells)] == [owner[token] for token in range(16)]
    (number,) = re.findall(r"\*\*([\d.e-]+)\*\*", top)
    assert f"largest relative difference of a loss: {number}, " in text_of(page)


class SiteLoader(yaml.SafeLoader):
    """Reads a name of Python (``!!python/name:``) as its text."""


SiteLoader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, name, node: name)


def test_the_site_has_every_page_in_its_menu():
    site = yaml.load(text_of("mkdocs.yml"), SiteLoader)
    named = set(re.findall(r"[\w/-]+\.md", str(site["nav"])))
    assert {page.removeprefix("docs/") for page in DOCS} <= named and all(
        (ROOT / "docs" / page).is_file() for page in named
    )
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["version"] == mindspeed_cp.__version__


def test_ci_builds_the_site_and_the_badges_are_of_workflows_that_are_there():
    workflows = ROOT / ".github" / "workflows"
    jobs = yaml.safe_load((workflows / "tests.yml").read_text(encoding="utf-8"))["jobs"]
    assert "mkdocs build --strict" in [step.get("run") for step in jobs["documentation"]["steps"]]
    for page in READMES:
        named = set(re.findall(rf"{re.escape(BADGE)}([\w.]+)", text_of(page)))
        assert named == {"tests.yml", "nightly.yml"} and all((workflows / name).is_file() for name in named)


def test_every_page_says_the_same_number_of_patches_beside_a_checkout():
    (alive,) = re.findall(r"^\| patches all (\d+) alive$", text_of("docs/megatron.md"), re.M)
    for page in READMES:  # of the worked command, in a checkout
        assert re.findall(r"zigzag, causal, kernel npu, (\d+) patches", text_of(page)) == [alive]


@pytest.mark.skipif(
    "MEGATRON_LM_PATH" not in os.environ or not find_spec("six"), reason="needs MEGATRON_LM_PATH, six, regex, pydantic"
)
def test_the_readmes_four_commands_train_a_checkout_on_a_users_text(tmp_path):
    lines = [f'{{"text": "Line {n} of a text of {n * n} words."}}\n' for n in range(200)]
    (tmp_path / "my.jsonl").write_text("".join(lines))
    for name in ("mindspeed_cp", "patches", "arguments", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "Megatron-LM").symlink_to(os.environ["MEGATRON_LM_PATH"])
    dataset, commands = (
        re.search(rf"^```bash {name}\n(.*?)^```", text_of("README.md"), re.M | re.S)[1]
        for name in ("own-text", "megatron-cpu")
    )
    _, _, *rest = commands.splitlines(keepends=True)  # the checkout and its packages are here
    script = dataset.splitlines(keepends=True)[0] + "".join(rest)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # The packages that the second command installs, wherever they are here.
    script = script.replace("PYTHONPATH=", "PYTHONPATH=$PYTHONPATH:")
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    assert "Context parallelism: Ring, cp=4, zigzag, causal, kernel cpu" in done.stdout
    assert (tmp_path / "data" / "megatron.png").stat().st_size > 5_000 and "within the tolerance" in done.stdout
    (block,) = re.findall(r"^\+-- context parallelism -.*?^\+-+$", text_of("docs/megatron.md"), re.M | re.S)
    assert done.stdout.count(block) == 1


@pytest.mark.parametrize("name", ["own-text", "megatron-cpu"])
def test_both_readmes_have_the_same_commands_for_a_new_user(name):
    (english,), (chinese,) = (
        re.findall(rf"^```bash {name}\n(.*?)^```", text_of(page), re.M | re.S) for page in READMES
    )
    assert english == chinese
    commands = re.findall(r"^\S", re.sub(r"\\\n *|\n(?=  |done)", " ", english), re.M)
    assert len(commands) == {"own-text": 3, "megatron-cpu": 4}[name]

"""The examples of the documentation run, and print what stands below them."""

import re

import pytest
from alone import run_script
from test_docs import FENCE, OUTPUT, PAGES, READMES, blocks, text_of


def run_block(code, num_processes, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    return run_script(script, num_processes, MINDSPEED_CP_DEVICE="cpu")


def unique_blocks(info):
    """pytest parameters (code, label, printed text or None); blocks that two pages share, comments aside, run once."""
    printed = {code: output for page in PAGES for _, code, output in OUTPUT.findall(text_of(page))}
    found = {
        tuple(re.sub(r"#.*", "", code).split()): (code, label, printed.get(code), page)
        for page in reversed(PAGES)
        for label, code in blocks(page, info)
    }
    return [
        pytest.param(code, label, output, id=f"{page}-{number}")
        for number, (code, label, output, page) in enumerate(found.values())
    ]


@pytest.mark.cpu_only
@pytest.mark.parametrize("code, label, output", unique_blocks("python run"))
def test_examples_for_one_process_run(code, label, output, tmp_path):
    printed = run_block(code, 1, tmp_path)
    assert output is None or printed == output


@pytest.mark.cpu_only
@pytest.mark.parametrize("code, label, output", unique_blocks("python torchrun="))
def test_examples_for_several_processes_run(code, label, output, tmp_path):
    printed = run_block(code, int(label.partition("=")[2]), tmp_path)
    assert output is None or printed == output


@pytest.mark.cpu_only
@pytest.mark.parametrize("page", READMES)
def test_the_picture_of_the_split_is_what_the_program_prints(page, tmp_path):
    picture = next(code for _, code in blocks(page, "text") if code.startswith("token "))
    code = next(code for _, code in blocks("docs/batch-layouts.md", "python run") if "SequenceLayout.build" in code)
    printed = [line.split() for line in run_block(code, 1, tmp_path).splitlines()]
    assert printed == [line.split() for line in picture.splitlines()]


def test_the_picture_of_the_kinds_of_layouts_is_what_the_program_prints():
    page = text_of("docs/batch-layouts.md")
    picture = next(code for info, code in FENCE.findall(page) if info == "text")
    assert picture in [output for _, _, output in OUTPUT.findall(page)]  # which the examples' test compares with a run

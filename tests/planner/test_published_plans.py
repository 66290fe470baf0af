"""The planner finds trainings that were published, and the documentation has its table of them."""

from pathlib import Path

import published_plans as published
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["docs/choosing.md", "docs/zh-CN/choosing.md"])
def test_the_table_of_published_trainings_stands_in_the_docs(page):
    rows = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if "| tp " in line and "%" in line]
    assert len(rows) == len(published.PUBLISHED) >= 8
    for (name, training), row in zip(published.PUBLISHED.items(), rows):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        split = ", ".join(f"{size} {value}" for size, value in training.split.items())
        assert cells[:3] == [name, f"{training.devices:,}", split] and cells[4] == f"{training.mfu:.0%}"
        assert ("**miss**" in cells[6]) == (name in published.MISSES)


@pytest.mark.parametrize("name", ["Llama 3 70B, 8k", "Pangu Ultra 135B, 4k, 910B", "Mixtral 8x7B, 4k"])
def test_a_published_training_is_found_and_its_speed_is_predicted(name):
    training = published.PUBLISHED[name]
    row = published.row_of(training)
    assert 1 <= row.place <= published.FIRST and 1 / published.WITHIN < row.mfu / training.mfu < published.WITHIN

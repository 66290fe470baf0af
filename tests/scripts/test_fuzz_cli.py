"""The command lines that tests/check fuzz draws, and what it compares them with."""

import random

import pytest
from drawing import SHARING, draw
from trainer.arguments import build_parser

pytestmark = pytest.mark.cpu_only


def drawn(seed, count=60):
    rng = random.Random(seed)
    return [draw(rng) for _ in range(count)]


def test_one_seed_draws_one_sequence_of_command_lines():
    assert drawn(3) == drawn(3) != drawn(4)


def test_every_drawn_flag_exists_and_most_values_are_sound():
    parser, refused = build_parser(), 0
    for line in drawn(5):
        assert {flag for flag, _ in line.settings} <= set(parser._option_string_actions)
        try:
            parser.parse_args(line.flags())
        except SystemExit:
            refused += 1
    assert 0 < refused < 15


def test_the_reference_differs_in_how_the_sequence_is_shared_alone():
    for line in drawn(6):
        try:
            plain = line.without_context_parallelism()
        except ValueError:
            continue  # nonsense for a parallel size: it is refused before it would be compared
        assert {flag for flag, _ in plain.settings}.isdisjoint(SHARING)
        assert set(line.settings) - set(plain.settings) == {pair for pair in line.settings if pair[0] in SHARING}
        sizes = dict(plain.settings)
        assert plain.world_size == int(sizes.get("--tensor-model-parallel-size") or 1) * int(
            sizes.get("--pipeline-model-parallel-size") or 1
        )

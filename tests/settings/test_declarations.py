"""A setting is one field: one is added at run time, and parser, conversion, files, comparison and documents have it."""

import random
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest
from contributing import diff_of
from drawing import draw
from flags import make_parser, parse

from mindspeed_cp import ContextParallelConfig
from mindspeed_cp.arguments import FrameworkSettings, compared_arguments, compared_config, config_from_args, declared
from mindspeed_cp.arguments.documentation import flag_table, with_table
from mindspeed_cp.arguments.launch import misspelt
from mindspeed_cp.settings.notices import ContextParallelWarning
from mindspeed_cp.settings.setting import declarations, setting

ROOT = Path(__file__).resolve().parents[2]
RING, ULYSSES = "megatron_cp_algo", "ulysses_cp_algo"


class Documented:
    """The field that CONTRIBUTING.md adds to the configuration."""

    exec(diff_of("a setting")["mindspeed_cp/settings/fields.py"])


@dataclass(frozen=True, kw_only=True)
class Extended(ContextParallelConfig):
    """A configuration with two settings more."""

    echo: Documented.__annotations__["echo"] = Documented.echo
    depth: int | Literal["auto"] = setting(
        1, flag="--cp-depth", help="steps at once", rule="1 or more", takes="N", least=1, least_means="1 is one by one"
    )


@pytest.fixture
def extended(monkeypatch):
    monkeypatch.setattr(declared, "CONFIG", Extended)


def test_the_parser_knows_a_new_setting_with_its_choices_and_its_help(extended, capsys):
    action = make_parser()._option_string_actions["--cp-echo"]
    assert (action.default, action.choices, action.option_strings) == (
        "soft",
        ["soft", "loud"],
        ["--cp-echo", "--echo"],
    )
    assert (
        action.help
        == "how a rank answers. Default: soft. Choices: soft: hardly; loud: to all. Rule: rings have an echo."
    )
    for flag, text, says in (
        ("--echo", "mute", "choose one of soft, loud"),
        ("--cp-depth", "0", "at least 1, or one of"),
    ):
        with pytest.raises(SystemExit):
            parse(flag, text)
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    assert misspelt(["--cp-ecko", "loud"]) == {"--cp-ecko": "--cp-echo"}


@pytest.mark.parametrize(("text", "depth"), [("3", 3), ("auto", "auto")])
def test_arguments_become_a_configuration_with_the_new_setting(extended, text, depth):
    flags = f"--context-parallel-size 2 --context-parallel-algo {RING} --echo loud --cp-depth {text}"
    config = config_from_args(parse(*flags.split()))
    assert isinstance(config, Extended) and (config.echo, config.depth) == ("loud", depth)
    assert declared.flags_of(config).endswith(f"--cp-echo loud --cp-depth {text}")
    assert declared.variables_of(config)["ECHO"] == "loud"


def test_a_framework_and_a_file_may_give_the_new_setting(extended, tmp_path):
    for name in ("cp_echo", "echo"):
        settings = FrameworkSettings.read({"context_parallel_size": 2, "context_parallel_algo": RING, name: "loud"})
        config = settings.resolve().config
        assert config.echo == "loud" and FrameworkSettings({}).keeping(config).values["cp_echo"] == "loud"
    path = tmp_path / "model.yaml"
    path.write_text("parallel_config: {context_parallel: 2, echo: loud}")
    assert config_from_args(parse("--cp-config", str(path))).echo == "loud"
    path.write_text("parallel_config: {echo: mute}")
    with pytest.raises(SystemExit):
        parse("--cp-config", str(path))


def test_wrong_values_and_algorithms_that_ignore_the_new_setting_are_said(extended):
    with pytest.raises(ValueError, match="--cp-echo mute is not known; choose one of soft, loud"):
        Extended(echo="mute")
    with pytest.raises(ValueError, match="--cp-depth 0 must be a whole number of at least 1, or auto; 1 is one by one"):
        Extended(depth=0)
    says = f"--cp-echo loud is ignored: --context-parallel-algo {ULYSSES} has no echo, {RING} or hybrid_cp_algo have."
    with pytest.warns(ContextParallelWarning, match=re.escape(says)):
        Extended(context_parallel_size=2, echo="loud")


def test_ranks_compare_the_new_setting(extended):
    assert compared_arguments({"cp_echo": "loud"}) == {"--cp-echo": "loud"}
    assert compared_config(Extended(depth=2))["--cp-depth"] == "2"


def test_the_documentation_and_drawn_command_lines_have_the_new_setting(extended):
    row = "| `--cp-echo` (also `--echo`) | soft | soft, loud | How a rank answers (soft: hardly; loud: to all). "
    assert f"{row}Rings have an echo. Ignored by ulysses_cp_algo, kvallgather_cp_algo |\n" in flag_table()
    assert "| `--cp-depth` | 1 | auto, N >= 1 | Steps at once. 1 or more |\n" in flag_table()
    rng = random.Random(1)
    assert {"--cp-echo", "--cp-depth"} <= {flag for _ in range(60) for flag, _ in draw(rng).settings}


def test_a_setting_that_nobody_declares_is_nowhere():
    assert "--cp-echo" not in flag_table() and "--cp-echo" not in make_parser()._option_string_actions


def test_the_page_of_flags_has_the_table_that_the_settings_declare():
    page = (ROOT / "docs/flags.md").read_text(encoding="utf-8")
    assert flag_table() in page, "run python -m mindspeed_cp.arguments.documentation docs/flags.md"
    assert with_table(page) == page and with_table(page.replace("| N >= 1 |", "| N |")) == page


def test_every_field_of_the_configuration_is_declared_with_what_it_needs():
    assert [each.name for each in declarations(ContextParallelConfig)] == [
        each.name for each in fields(ContextParallelConfig)
    ]
    for each in declared.our_flags():
        assert each.help and each.rule and not each.rule.endswith("."), each.flag
        assert not each.literals or set(each.literals) == set(each.meanings_by_choice), each.flag
        assert bool(each.taken_by) == bool(each.ignored), each.flag


def test_every_variable_of_a_setting_is_one_of_the_launch_scripts():
    script = (ROOT / "scripts/launch/common.sh").read_text(encoding="utf-8")
    variables = declared.variables_of(ContextParallelConfig())
    assert "CP_ALGO" in variables and not [name for name in variables if not re.search(rf"\$\{{?{name}\b", script)]


def test_no_two_settings_have_one_name():
    names = [name for each in declared.declared() for name in (each.dest, *each.names[1:], *each.keys, *each.also)]
    assert len(names) == len(set(names))


def test_what_the_adaptor_gets_as_keywords_is_compared_by_value_and_functions_by_name():
    def end():
        return 0

    found = compared_config(
        ContextParallelConfig(), kernel="cpu", documents_from_position_ids=True, end_of_document=end
    )
    assert found["--cp-kernel"] == "cpu" and found["documents_from_position_ids"] == "True"
    assert found["end_of_document"] == f"{__name__}.{end.__qualname__}"
    assert "end_of_document" not in compared_config(ContextParallelConfig())

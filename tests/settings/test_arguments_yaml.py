"""MindFormers' YAML files: the samples of its guide verbatim, precedence, and every error."""

import re

import pytest
from flags import parse

from mindspeed_cp.arguments import config_from_args, read_cp_yaml, validate
from mindspeed_cp.arguments.mindformers import KNOWN
from mindspeed_cp.arguments.yaml_file import known_keys
from mindspeed_cp.settings.notices import ContextParallelWarning

SEQUENCE_PARALLEL_SAMPLE = """\
parallel_config:
  context_parallel: 2
  use_seq_parallel: False
"""
MASK_SAMPLE = """\
# model config
model:
  model_config:
    use_attn_mask_compression: True
"""
ULYSSES_SAMPLE = """\
parallel:
  ...
  enable_alltoall: True  # 允许插入alltoall算子
  ...
parallel_config:
  ...
  context_parallel: 2
  context_parallel_algo: ulysses_cp  # 使能ulysses序列并行
  ...
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "model.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_sequence_parallel_sample_is_a_ring_of_two(write):
    config = config_from_args(parse("--cp-config", write(SEQUENCE_PARALLEL_SAMPLE)))
    assert (config.context_parallel_size, config.algorithm) == (2, "megatron_cp_algo")  # the file's own default


def test_mask_sample_changes_nothing(write):
    assert config_from_args(parse("--cp-config", write(MASK_SAMPLE))) == config_from_args(parse())


@pytest.mark.parametrize("alltoall", [True, False])
def test_ulysses_sample(write, alltoall):
    path = write(ULYSSES_SAMPLE.replace("enable_alltoall: True", f"enable_alltoall: {alltoall}"))
    config = config_from_args(parse("--cp-config", path))
    assert (config.context_parallel_size, config.algorithm, config.alltoall) == (2, "ulysses_cp_algo", alltoall)


def test_every_key_is_read(write):
    args = parse(
        "--cp-config",
        write(
            "parallel_config: {data_parallel: 2, model_parallel: 2, context_parallel: 4, pipeline_stage: 2,\n"
            "                  context_parallel_algo: colossalai_cp, use_seq_parallel: False, keep_attention: True}\n"
            "model: {model_config: {use_flash_attention: True, use_attn_mask_compression: True}}\n"
        ),
    )
    config, setup = validate(args, world_size=32)
    assert config.describe() == "Ring, cp=4, zigzag, causal, attention kept across recomputation"
    assert (setup.tensor_parallel_size, setup.pipeline_parallel_size, setup.use_flash_attn) == (2, 2, True)


def test_device_num_must_be_the_number_of_processes(write):
    args = parse("--cp-config", write("parallel_config: {data_parallel: 2, context_parallel: 2}"))
    with pytest.raises(
        ValueError,
        match=r"device_num = data_parallel 2 x model_parallel 1 x context_parallel 2 x "
        r"pipeline_stage 1 = 4, and 8 processes run; start 4",
    ):
        validate(args, world_size=8)
    validate(args, world_size=4)


@pytest.mark.parametrize("order", [1, -1])
def test_command_line_wins_and_says_so_even_with_a_default_value(write, order):
    pieces = [
        ["--cp-config", write(ULYSSES_SAMPLE.replace("ulysses_cp ", "colossalai_cp "))],
        ["--context-parallel-algo=ulysses_cp_algo", "--use-flash-attn"],
    ]
    args = parse(*sum(pieces[::order], []))
    assert args.context_parallel_algo == "ulysses_cp_algo" and args.context_parallel_size == 2
    with pytest.warns(
        ContextParallelWarning,
        match="--context-parallel-algo ulysses_cp_algo on the command line wins over "
        "parallel_config.context_parallel_algo colossalai_cp of .*model.yaml",
    ):
        validate(args, world_size=2)


def test_a_flag_that_wins_over_the_files_default_says_that_the_file_does_not_name_it(write):
    args = parse("--cp-config", write(SEQUENCE_PARALLEL_SAMPLE), "--context-parallel-algo", "ulysses_cp_algo")
    (notice,) = args.cp_notices
    assert "--context-parallel-algo ulysses_cp_algo on the command line wins over colossalai_cp" in notice
    assert "MindFormers' default" in notice and "model.yaml names no parallel_config.context_parallel_algo" in notice
    assert args.context_parallel_algo == "ulysses_cp_algo" and args.context_parallel_size == 2


def test_a_flag_that_agrees_with_the_files_default_is_no_notice(write):
    args = parse("--cp-config", write(SEQUENCE_PARALLEL_SAMPLE), "--context-parallel-algo", "megatron_cp_algo")
    assert args.cp_notices == []


def test_use_seq_parallel_is_refused_with_context_parallelism_alone(write, capsys):
    text = "parallel_config: {context_parallel: 2, use_seq_parallel: True}"
    with pytest.raises(SystemExit) as exit_:
        parse("--cp-config", write(text))
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1
    assert "use_seq_parallel True" in error and "set use_seq_parallel: False" in error
    assert parse("--cp-config", write(text.replace("2,", "1,"))).sequence_parallel is True


def test_ulysses_without_context_parallelism_is_said(write):
    args = parse("--cp-config", write("parallel_config: {context_parallel_algo: ulysses_cp}"))
    with pytest.warns(ContextParallelWarning, match="ulysses_cp is ignored: it needs context_parallel above 1"):
        validate(args, world_size=1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "parallel_config: {context_paralel: 2}",
            "unknown key parallel_config.context_paralel; did you mean parallel_config.context_parallel?",
        ),
        ("paralel_config: {context_parallel: 2}", "unknown key paralel_config; did you mean parallel_config?"),
        ("model: {model_config: {use_flash_atention: True}}", "did you mean model.model_config.use_flash_attention?"),
        ("parallel: {enable_all2all: True}", "did you mean parallel.enable_alltoall?"),
        ("parallel_config: {context_parallel: two}", "parallel_config.context_parallel two must be a whole number"),
        ("parallel_config: {context_parallel: True}", "context_parallel True must be a whole number"),
        (
            "parallel_config: {context_parallel_algo: ring}",
            "context_parallel_algo ring must be ulysses_cp or colossalai_cp",
        ),
        ("parallel_config: {use_seq_parallel: 1}", "use_seq_parallel 1 must be True or False"),
        ("parallel_config: 2", "parallel_config 2 must be a mapping"),
        ("- 1", "must be a mapping"),
        ("a: b: c", "is not valid YAML"),
    ],
)
def test_file_errors_name_the_key_and_the_way_out(write, text, says):
    path = write(text)
    with pytest.raises(ValueError) as error:
        read_cp_yaml(path)
    assert says in str(error.value) and f"--cp-config {path}" in str(error.value)


# As the files of MindFormers have it: what is read here, and much that is not.
WHOLE_FILE = """\
seed: 0
use_parallel: True
moe_config: {expert_num: 8}
model_config: {hidden_size: 8}
recompute_config: {recompute: True}
parallel: {parallel_mode: 1, enable_alltoall: False, full_batch: True}
parallel_config:
  context_parallel_size: 4
  tensor_model_parallel_size: 2
  pipeline_model_parallel_size: 2
  sequence_parallel: False
  micro_batch_num: 4
  vocab_emb_dp: True
  data_parallel:
model: {arch: {type: X}, model_config: {use_ring_attention: True, use_incre_flash_attention: True}}
"""


def test_a_whole_file_of_mindformers_is_accepted_and_what_is_not_read_is_named_once(write):
    path = write(WHOLE_FILE)
    values, notices = read_cp_yaml(path)
    assert values["parallel_config.context_parallel_size"] == 4 and "parallel_config.data_parallel" not in values
    (notice,) = notices
    for key in ("seed", "use_parallel", "moe_config", "model_config", "model.model_config.use_incre_flash_attention"):
        assert re.search(rf"[ ]{key}[,.]", notice), key
    config, setup = validate(parse("--cp-config", path), world_size=16)
    assert (config.context_parallel_size, config.algorithm, config.alltoall) == (4, "megatron_cp_algo", False)
    assert (setup.tensor_parallel_size, setup.pipeline_parallel_size) == (2, 2)


@pytest.mark.parametrize("key", ["context_parallel: 2", "model: {use_flash_attention: True}"])
def test_a_key_in_a_section_where_it_does_not_belong_is_named_with_the_place_where_it_does(write, key):
    values, (notice,) = read_cp_yaml(write(key))
    assert values == {} and "(nearest known: " in notice


@pytest.mark.parametrize("name", ["hybrid_cp", "hybird_cp"])
@pytest.mark.parametrize(
    ("degree", "expected"),
    [
        ("ulysses_degree_in_cp: 4", ("hybrid_cp_algo", 4)),
        ("", ("hybrid_cp_algo", 4)),  # chosen, as on the command line
        ("ulysses_degree_in_cp: 1", ("megatron_cp_algo", None)),
        ("ulysses_degree_in_cp: 8", ("ulysses_cp_algo", None)),
    ],
)
def test_hybrid_of_a_file(write, name, degree, expected):
    text = f"parallel_config:\n  context_parallel: 8\n  context_parallel_algo: {name}\n  {degree}\n"
    config, _ = validate(parse("--cp-config", write(text), "--use-flash-attn"), world_size=8)
    assert (config.algorithm, config.ulysses_degree) == expected


def test_two_keys_of_one_setting_must_agree(write):
    sizes = "parallel_config: {{context_parallel: 2, context_parallel_size: {}}}"
    assert config_from_args(parse("--cp-config", write(sizes.format(2)))).context_parallel_size == 2
    with pytest.raises(SystemExit):
        parse("--cp-config", write(sizes.format(4)))


def test_no_key_that_is_read_counts_as_one_that_is_not():
    assert not KNOWN & set(known_keys())


def test_missing_file_is_named(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--cp-config", "no/such.yaml")
    assert exit_.value.code == 2
    assert "--cp-config no/such.yaml cannot be read" in capsys.readouterr().err


def test_other_keys_of_a_model_file_are_named_with_the_nearest_known_one(write):
    values, notices = read_cp_yaml(write("seed: 0\nparallel_config: {micro_batch_num: 4, model_parallel: 2}\n"))
    assert values == {"parallel_config.model_parallel": 2}
    assert (
        len(notices) == 1 and "seed" in notices[0] and "parallel_config.micro_batch_num (nearest known: " in notices[0]
    )

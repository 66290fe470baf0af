"""The doctor's --launch with MindSpeed: whose the flags of a line are, what they resolve to, and what nobody knows."""

import shlex

import pytest

from mindspeed_cp.doctor import launch_findings
from mindspeed_cp.megatron import flag_checks, unknown_flags

pytestmark = pytest.mark.cpu_only
MODEL = "--num-attention-heads 16 --hidden-size 1024 --num-layers 8 --seq-length 4096"
CP = "--context-parallel-size 4"
RUN = "torchrun --standalone --nproc-per-node 8"


@pytest.fixture(autouse=True)
def megatron_is_not_asked(monkeypatch):
    def ask(module, *flags, environment=None):
        return flag_checks.wrong_flags(flags) if module.endswith("checks") else None

    monkeypatch.setattr(launch_findings, "ask", ask)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("import mindspeed_cp.megatron_adaptor\n")
    return path


def said(script, flags, launcher=RUN):
    return launch_findings.examined(f"{launcher} {shlex.quote(str(script))} {MODEL} {flags}", "cpu")[0]


def texts(findings, level):
    return [finding.text for finding in findings if finding.level == level]


SAYS = {
    "unknown": ["--no-such-flag"],
    "refused": "",
    "owners": {"MindSpeed-LLM": ["--stage", "--neat-pack"], "MindSpeed": ["--use-fused-rmsnorm"]},
    "added": {"--mm-data": "mindspeed_mm/configs/config.py"},
}


@pytest.fixture
def of_mindspeed(tmp_path):
    path = tmp_path / "posttrain_gpt.py"
    path.write_text("from mindspeed_llm import megatron_adaptor\n")
    return path


def test_a_script_whose_parser_is_not_known_is_never_told_that_its_flags_are_right(script):
    (found,) = [each for each in said(script, "--no-such-flag 3 --cp-window-size 1") if "not checked" in each.text]
    assert found.level == "warning" and found.text == (
        "not checked, because train.py has a parser of its own: --no-such-flag"
    )


def test_the_owner_of_every_foreign_flag_is_named_and_what_nobody_knows_is_a_problem(of_mindspeed, monkeypatch):
    monkeypatch.setattr(launch_findings, "ask", lambda module, *flags, environment=None: SAYS)
    found = said(of_mindspeed, "--context-parallel-size 4 --stage sft --neat-pack --use-fused-rmsnorm --no-such-flag 3")
    assert "MindSpeed-LLM's own flags, which posttrain_gpt.py knows: --stage, --neat-pack" in texts(found, "ok")
    assert "MindSpeed's own flags, which posttrain_gpt.py knows: --use-fused-rmsnorm" in texts(found, "ok")
    assert "posttrain_gpt.py does not know --no-such-flag" in texts(found, "problem")
    assert [text for text in texts(found, "warning") if "--mm-data" in text] == [
        "not checked, because posttrain_gpt.py adds flags of its own: --mm-data (mindspeed_mm/configs/config.py)"
    ]


def test_flags_that_a_script_adds_itself_are_found_where_they_are_written(tmp_path):
    package = tmp_path / "mindspeed_mm" / "configs"
    package.mkdir(parents=True)
    (package / "config.py").write_text("group.add_argument('--mm-data', type=str)\n")
    script = tmp_path / "pretrain_vlm.py"
    script.write_text('from mindspeed_mm.configs.config import provider\nparser.add_argument("--own")\n')
    found = unknown_flags.added_by(script, ["--mm-data", "--own", "--no-such-flag"])
    assert found == {"--own": "pretrain_vlm.py", "--mm-data": "mindspeed_mm/configs/config.py"}


def test_a_script_of_mindspeed_needs_no_transformer_engine(of_mindspeed):
    megatron = of_mindspeed.rename(of_mindspeed.with_name("pretrain_gpt.py"))
    assert not texts(said(megatron, f"{CP} --use-flash-attn", f"{RUN} -m mindspeed_cp.run"), "problem")


def test_a_value_that_the_scripts_parser_refuses_is_a_problem(of_mindspeed, monkeypatch):
    refused = {**SAYS, "unknown": [], "refused": "argument --stage: invalid choice: 'sftt'"}
    monkeypatch.setattr(launch_findings, "ask", lambda module, *flags, environment=None: refused)
    found = said(of_mindspeed, "--context-parallel-size 4 --stage sftt")
    assert "posttrain_gpt.py refuses the line: argument --stage: invalid choice: 'sftt'" in texts(found, "problem")


@pytest.mark.parametrize(("named", "title"), [("", "Ring"), ("--context-parallel-algo ulysses_cp_algo", "Ulysses")])
def test_a_script_of_mindspeed_has_mindspeeds_default_algorithm(of_mindspeed, named, title):
    assert any(text.startswith(f"{title}, cp=4") for text in texts(said(of_mindspeed, f"{CP} {named}"), "ok"))


def test_an_algorithm_that_only_mindspeed_has_is_left_to_it(of_mindspeed, script):
    line = f"{CP} --context-parallel-algo mamba_cp_algo"
    assert texts(said(of_mindspeed, line), "note")[0].startswith(
        "--context-parallel-algo mamba_cp_algo is MindSpeed's own: context parallelism is left to MindSpeed"
    )
    assert any("mamba_cp_algo" in text for text in texts(said(script, line), "problem"))


def test_heads_and_length_that_a_line_does_not_give_are_unknown_and_not_one(of_mindspeed):
    line = f"{RUN} {of_mindspeed} {CP} --context-parallel-algo ulysses_cp_algo"
    found, _ = launch_findings.examined(line, "cpu")
    assert any("Ulysses, cp=4" in text and "unknown tokens on a rank" in text for text in texts(found, "ok"))
    assert "bytes and memory need --seq-length, --num-attention-heads" in " ".join(texts(found, "note"))
    assert not [text for text in texts(found, "problem") if "divisible" in text]


# Of MindSpeed-LLM's scripts, by kind; tests/check launch_lines reads all of them where there is a checkout.
PACKED = "--reset-attention-mask --attention-mask-type general"
LINES = {
    f"16 --context-parallel-algo ulysses_cp_algo --use-cp-send-recv-overlap {PACKED}": "Ulysses, cp=16, contiguous",
    "4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2 --use-cp-send-recv-overlap "
    "--kv-head-repeat-before-uly-alltoall --no-create-attention-mask-in-dataloader": "Hybrid (ulysses 2, ring 2), cp=4",
    f"4 --cp-window-size 2 --context-parallel-algo megatron_cp_algo {PACKED}": "Double Ring (window 2), cp=4, zigzag",
    "16 --context-parallel-algo megatron_cp_algo --use-cp-send-recv-overlap": "Ring, cp=16, zigzag, causal",
    "8 --context-parallel-algo kvallgather_cp_algo --attention-mask-type causal --fix-sub-seq-length 32768 "
    "--reset-attention-mask --reset-position-ids --variable-seq-lengths": "KV all-gather, cp=8, zigzag, causal",
}
HEADS = "--num-attention-heads 64 --group-query-attention --num-query-groups 8 --use-flash-attn --seq-length 131072"


@pytest.mark.parametrize("flags", LINES)
def test_lines_of_mindspeed_llm_mean_here_what_they_mean_there(of_mindspeed, flags):
    launcher = f"torchrun --nnodes 8 --nproc-per-node 16 --master-port 29733 -m mindspeed_cp.run {of_mindspeed}"
    found, _ = launch_findings.examined(f"{launcher} {HEADS} --context-parallel-size {flags}", "cpu")
    assert [text for text in texts(found, "ok") if text.startswith(LINES[flags])], found
    assert not texts(found, "problem")


def test_models_that_split_sequences_themselves_are_left_to_mindspeed(of_mindspeed):
    of_mindspeed.write_text("import mindspeed.megatron_adaptor\nfrom mindspeed_mm.training import pretrain\n")
    (first, *_) = said(of_mindspeed, f"{CP} --context-parallel-algo ulysses_cp_algo")
    assert first.level == "note" and first.text.startswith("MindSpeed-MM's models split sequences themselves: context")

"""The sizes of HCCL's buffers: the largest messages of the plan, and what a launch takes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mindspeed_cp import ContextParallelConfig, ContextParallelGroups
from mindspeed_cp.comm import parts
from mindspeed_cp.comm.hccl import LARGEST, SMALLEST, AttentionShape, buffers_of, largest_messages, megabytes_for
from mindspeed_cp.doctor import hccl
from mindspeed_cp.planner.events import Post
from mindspeed_cp.planner.trace import Problem, trace
from mindspeed_cp.settings.training_setup import TrainingSetup

SHAPE = AttentionShape(seq_len=131072, batch=1, heads=32, kv_heads=32, dk=128, dv=128, itemsize=2)


def config(algorithm="megatron_cp_algo", cp=8, **more):
    return ContextParallelConfig(context_parallel_size=cp, algorithm=algorithm, **more)


def largest_of_the_plan(cp_config, shape, alltoall):
    """Bytes of the largest message that the engine posts on rank 0: all that it sends, or what one peer gets."""
    problem = Problem(shape.seq_len, shape.heads, shape.kv_heads, shape.dk, shape.dv, shape.batch, torch.bfloat16)
    posts = [event for part in trace(cp_config, problem, 0) for event in part.events if isinstance(event, Post)]
    if alltoall:  # the trace leaves out what stays on the rank
        ulysses = cp_config.hierarchy[0]
        return max(sum(post.sent.values()) for post in posts) * ulysses // (ulysses - 1)
    return max(max(post.sent.values(), default=0) for post in posts)


@pytest.mark.parametrize("kv_heads", [32, 8, 1])
@pytest.mark.parametrize("algorithm", ["ulysses_cp_algo", "megatron_cp_algo", "kvallgather_cp_algo"])
def test_the_largest_message_is_the_plans(algorithm, kv_heads):
    shape = SHAPE._replace(seq_len=4096, kv_heads=kv_heads)
    found = largest_messages(config(algorithm), shape)
    assert found == {"cp": largest_of_the_plan(config(algorithm), shape, algorithm == "ulysses_cp_algo")}


def test_groups_of_several_levels_have_messages_of_their_own():
    hybrid = largest_messages(config("hybrid_cp_algo", ulysses_degree=2), SHAPE)
    assert set(hybrid) == {"ulysses", "ring"}
    double = largest_messages(config(window_size=2), SHAPE)
    assert set(double) == {"cp", "outer"} and double["cp"] == double["outer"]
    assert largest_messages(config(cp=1), SHAPE) == {}


def test_the_joint_message_of_ulysses_is_named_by_its_size():
    """16k tokens of a rank, 4096 wide: 402 MB, twice HCCL's buffer."""
    messages = largest_messages(config("ulysses_cp_algo"), SHAPE)
    assert messages == {"cp": 16384 * 3 * 4096 * 2}
    assert megabytes_for(messages["cp"]) == 385
    assert megabytes_for(1) == SMALLEST and megabytes_for(1 << 40) == LARGEST


def test_buffers_follow_from_what_the_launch_says():
    setup = TrainingSetup(num_attention_heads=32, seq_length=131072, head_dim=128, half_precision="bfloat16")
    assert buffers_of(config("hybrid_cp_algo", ulysses_degree=2), setup) == {"ulysses": 385, "ring": 257}
    assert buffers_of(config("hybrid_cp_algo", ulysses_degree=2), replace(setup, head_dim=None)) == {}


def test_the_adaptor_asks_for_them_on_hccl_unless_the_user_has(monkeypatch):
    from mindspeed_cp.megatron import start as machine

    setup = TrainingSetup(num_attention_heads=32, seq_length=131072, head_dim=128, half_precision="bfloat16")
    hybrid = config("hybrid_cp_algo", ulysses_degree=2)
    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    for backend, found in (("hccl", {"ulysses": 385, "ring": 257}), ("cpu:gloo,npu:hccl", None), ("gloo", {})):
        monkeypatch.setattr(machine.dist, "get_backend", lambda backend=backend: backend)
        assert machine.hccl_buffers(hybrid, setup) == (buffers_of(hybrid, setup) if found is None else found)
    monkeypatch.setattr(machine.dist, "get_backend", lambda: "hccl")
    assert machine.hccl_buffers(hybrid, None) == {}
    monkeypatch.setenv("HCCL_BUFFSIZE", "400")
    assert machine.hccl_buffers(hybrid, setup) == {}


@pytest.mark.parametrize(
    "algorithm, seq_len, dynamic, asked",
    [
        ("ulysses_cp_algo", 65536, False, 385),
        ("ulysses_cp_algo", 8192, False, None),
        ("ulysses_cp_algo", 65536, True, None),
    ],
)
def test_megatrons_own_group_gets_one_where_hccls_is_too_small(algorithm, seq_len, dynamic, asked, monkeypatch):
    from mindspeed_cp.megatron import adaptor as machine
    from mindspeed_cp.patches import process_groups

    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    monkeypatch.setattr(dist, "get_backend", lambda: "hccl")
    monkeypatch.setattr(process_groups, "group_options", lambda buffers, name: buffers.get(name))
    wanted = config(algorithm, 4)
    monkeypatch.setattr(process_groups, "agreed_config", lambda settings, given: wanted)
    monkeypatch.setattr(process_groups, "check_launch", lambda given: None)
    adaptor = machine.Adaptor()
    adaptor.settings.setup = TrainingSetup(
        num_attention_heads=32, seq_length=seq_len, head_dim=128, half_precision="bfloat16"
    )
    found = {}

    class MadeError(Exception):
        pass

    def original(hybrid_context_parallel=False):
        for name in ("cp", "dp"):
            found[name] = process_groups.get_nccl_options(adaptor, lambda *args: None, name, {})
        assert process_groups.get_nccl_options(adaptor, lambda *args: "the user's", "cp", {}) == "the user's"
        raise MadeError

    with pytest.raises(MadeError):
        process_groups.initialize_model_parallel(adaptor, original, hybrid_context_parallel=dynamic)
    assert found == {"cp": asked, "dp": None}


def test_the_adaptor_asks_for_them_around_a_group_that_somebody_else_made(monkeypatch):
    from mindspeed_cp.megatron import adaptor as machine

    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    given = {"get_backend": "hccl", "get_rank": 0, "get_process_group_ranks": list(range(4))}
    for name, value in given.items():
        monkeypatch.setattr(dist, name, lambda *args, value=value: value)
    monkeypatch.setattr(machine, "agree_in_group", lambda *args: None)
    monkeypatch.setattr(parts, "group_options", lambda buffers, name: buffers[name])
    made = {}
    monkeypatch.setattr(dist, "new_group", lambda ranks, pg_options, **more: made.update({tuple(ranks): pg_options}))
    monkeypatch.setattr(ContextParallelGroups, "_of", classmethod(lambda cls, *args: None))
    asking = machine.Adaptor()
    asking.settings.config = config("hybrid_cp_algo", 4, ulysses_degree=2)
    asking.settings.setup = TrainingSetup(
        num_attention_heads=32, seq_length=65536, head_dim=128, half_precision="bfloat16"
    )
    asking._adopt(SimpleNamespace(size=lambda: 4))
    assert made == {(0, 1): 385, (0, 2): 257}


@pytest.mark.parametrize(
    "flags, dim",
    [
        ("--hidden-size 4096 --num-attention-heads 32", 128),
        ("--hidden-size 4096 --num-attention-heads 32 --kv-channels 64", 64),
        ("--hidden-size 4096 --num-attention-heads 32 --multi-latent-attention", None),
        ("--num-attention-heads 32", None),
    ],
)
def test_the_flags_say_how_large_a_head_is(flags, dim):
    from mindspeed_cp.arguments import validate
    from mindspeed_cp.planner.megatron_flags import parsed

    line = f"{flags} --context-parallel-size 4 --seq-length 512 --micro-batch-size 3 --use-flash-attn".split()
    _, setup = validate(parsed(line)[0], 4)
    assert (setup.head_dim, setup.micro_batch_size) == (dim, 3)


def told(environment=(), shape=SHAPE, cp_config=None, **more):
    found = list(hccl.findings(cp_config or config("ulysses_cp_algo"), shape, dict(environment), **more))
    return {
        level: [f"{each.text}; {each.todo}" for each in found if each.level == level] for level in ("note", "warning")
    }


def test_a_message_above_the_buffer_is_a_warning_with_the_value_that_fits():
    (warning,) = told({"HCCL_BUFFSIZE": "200"})["warning"]
    assert "403 MB message of the cp group" in warning and "HCCL_BUFFSIZE=385" in warning
    assert told({"HCCL_BUFFSIZE": "385"})["warning"] == told()["warning"] == []


@pytest.mark.parametrize("of_run, of_layers", [("ulysses", "megatron"), ("megatron", "ulysses")])
def test_the_largest_message_is_that_of_the_layers(of_run, of_layers):
    layered = config(f"{of_run}_cp_algo", layer_algorithms=f"1-:{of_layers}_cp_algo")
    assert "largest message has 403 MB" in told(cp_config=layered, num_layers=2)["note"][0]
    every = config(f"{of_run}_cp_algo", layer_algorithms=f"0-:{of_layers}_cp_algo")
    (note,) = told(cp_config=every, num_layers=2)["note"]
    assert f"largest message has {403 if of_layers == 'ulysses' else 268} MB" in note


def test_communicators_and_their_memory_are_counted():
    (note,) = told(others=("tp", "dp"))["note"]
    assert "at least 3 communicators take 1,570 MB" in note
    (note,) = told(shape=SHAPE._replace(seq_len=8192), others=("tp", "dp"))["note"]
    assert "at least 3 communicators take 1,200 MB" in note  # never less than HCCL's own
    (note,) = told({"HCCL_BUFFSIZE": "400"})["note"]
    assert "at least 1 communicators take 800 MB" in note


@pytest.mark.parametrize(
    "changes, pairs",
    [({}, 2), ({"kv_exchange": "direct"}, 7), ({"window_size": 2}, 3)],
)
def test_single_messages_cost_a_communicator_for_each_pair(changes, pairs):
    ring = config(**changes)
    notes = told(cp_config=ring, single_messages=True)["note"]
    assert f"and {pairs} of single pairs" in notes[0] and "--cp-p2p batch" in notes[1]
    assert len(told(cp_config=ring)["note"]) == 1
    assert len(told(single_messages=True)["note"]) == 1  # Ulysses sends none


def test_the_doctor_says_it_of_a_launch(tmp_path):
    from mindspeed_cp.doctor.launch_findings import examined

    (script := tmp_path / "pretrain.py").write_text("import mindspeed_cp.megatron_adaptor\n")
    flags = "--num-layers 2 --hidden-size 4096 --num-attention-heads 32 --seq-length 131072 --bf16 --use-flash-attn "
    flags += "--context-parallel-size 8 --context-parallel-algo megatron_cp_algo"
    command = f"HCCL_BUFFSIZE=100 torchrun --standalone --nproc-per-node 16 {script} {flags}"
    texts = [finding.text for finding in examined(command, "npu")[0] if "HCCL" in finding.text]
    assert "268 MB (cp group, buffer 100 MB); at least 2 communicators take 400 MB" in texts[0]
    assert "cuts the 268 MB message" in texts[1] and len(texts) == 2
    virtual = f"{command} --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank=2"
    assert any("2 of single pairs" in finding.text for finding in examined(virtual, "npu")[0])
    assert not any("HCCL" in finding.text for finding in examined(command, "cpu")[0])


def test_aiv_is_a_warning_beside_several_communicators():
    aiv = {"HCCL_OP_EXPANSION_MODE": "AIV", "HCCL_BUFFSIZE": "400"}
    assert told(aiv)["warning"] == []
    (warning,) = told(aiv, others=("tp",))["warning"]
    assert "documents it for one communicator" in warning and "unset HCCL_OP_EXPANSION_MODE" in warning

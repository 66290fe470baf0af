"""Training on the real torch_npu: context parallelism gives the losses and gradient norms of one device."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import bed
import pytest

RING, ULYSSES = "megatron_cp_algo", "ulysses_cp_algo"


def same(got, wanted, tolerance=1e-5):
    assert len(got) == len(wanted) > 0
    for a, b in zip(got, wanted):
        assert list(a) == pytest.approx(list(b), rel=tolerance), (got, wanted)


@pytest.mark.parametrize("algorithm", [RING, ULYSSES])
def test_two_ranks_train_to_the_losses_of_one(server, algorithm):
    same(server.run("train", 2, algorithm=algorithm)[0], server.run("train")[0])


# In bfloat16 the order of the blocks rounds differently; the distributed optimizer, recompute and sequence parallelism
# must not add to that.
MODES = {
    "direct": (dict(cp_options=[["kv_exchange", "direct"]]), RING, 2, 1, 1e-5),
    "recompute": (dict(recompute="full"), RING, 2, 1, 1e-5),
    "recompute-ulysses": (dict(recompute="full"), ULYSSES, 2, 1, 1e-5),
    "sequence-parallel": (dict(sequence_parallel=True), RING, 4, 2, 1e-5),
    "bf16": (dict(bf16=True), RING, 2, 1, 1e-2),
    "bf16-distributed-optimizer": (dict(bf16=True, distributed_optimizer=True), ULYSSES, 2, 1, 1e-2),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_modes_of_training(server, mode):
    options, algorithm, world, tp, tolerance = MODES[mode]
    plain = {name: value for name, value in options.items() if name == "bf16"}
    same(
        server.run("train", world, algorithm=algorithm, tp=tp, options=options)[0],
        server.run("train", options=plain)[0],
        tolerance,
    )


def test_the_fused_update_trains_to_the_losses_of_one(server):
    if not server.run("has_fused_update")[0]:
        pytest.skip(f"torch_npu {bed.RELEASE} has no npu_ring_attention_update")
    losses, updates = server.run("train_with_fused_updates", 2, algorithm=RING)[0]
    same(losses, server.run("train")[0])
    assert updates > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm, more",
    [
        ("megatron_cp_algo", [["window_size", 2]]),
        ("kvallgather_cp_algo", []),
        ("hybrid_cp_algo", [["ulysses_degree", 2]]),
    ],
)
def test_four_ranks_train_to_the_losses_of_one(server, algorithm, more):
    same(server.run("train", 4, algorithm=algorithm, options=dict(cp_options=more))[0], server.run("train")[0])


def test_two_tasks_with_one_rank_in_a_batch_are_refused_as_by_hccl(server):
    with pytest.raises(bed.JobFailed, match="HcclBatchSendRecv"):
        server.run("duplicates_in_a_batch", 2)


@pytest.mark.parametrize("algorithm", [RING, ULYSSES])
def test_attention_does_not_make_the_host_wait_for_the_device(server, algorithm):
    assert server.run("host_waits", 2, algorithm=algorithm) == [[], []]
    assert server.run("host_waits", 2, algorithm=algorithm, window=[6, 0]) == [[], []]
    packed = server.run("host_waits", 2, algorithm=algorithm, packed=True)
    assert max(map(len, packed)) <= 1, packed  # the boundaries, where they lie on the device


NORM = "megatron.core.utils.local_multi_tensor_l2_norm"
# Of the host for the device in a step, whatever the number of layers; 0.12 makes three flags from lists on the host.
MOST_WAITS = {"0.12": 6, "0.16": 4}


@pytest.mark.parametrize("algorithm, world", [("", 1), (RING, 2), (ULYSSES, 2)])
def test_a_step_waits_for_the_device_as_often_whatever_the_number_of_layers(server, algorithm, world):
    most = MOST_WAITS[server.run("version")[0][:4]]
    for options in (dict(layers=2), dict(layers=4), dict(layers=3, bf16=True, distributed_optimizer=True)):
        for costs in server.run("step_costs", world, algorithm=algorithm, options=options):
            assert sum(costs["waits"].values()) <= most, (options, costs["waits"])
    without = server.run("step_costs", world, algorithm=algorithm, options=dict(layers=4), without=[NORM])
    assert min(sum(costs["waits"].values()) for costs in without) > 50  # one for each parameter


def test_the_gradient_norm_of_one_reduction_is_megatrons(server):
    same(server.run("train")[0], server.run("train", without=[NORM])[0])


def test_what_mindspeed_fuses_has_the_values_and_gradients_of_its_definition(server):
    assert server.run("fused_operators") == [[]]


def test_the_fakes_have_the_schemas_of_torch_npu_itself(server):
    import fake_torch_npu

    if bed.RELEASE not in fake_torch_npu.RELEASES:
        pytest.skip(f"no schemas of {bed.RELEASE} among the fakes")
    published = fake_torch_npu.schemas(bed.RELEASE)
    for name, schema in server.run("schemas")[0].items():
        assert _parsed(published[name]) == _parsed(schema), name


def _parsed(schema):
    import torch

    return str(torch._C.parse_schema(schema))


@pytest.mark.parametrize("adopts", [False, True], ids=["made", "adopted"])
def test_each_process_group_gets_the_buffer_of_its_largest_message(server, tmp_path, adopts):
    given = server.run("group_buffers", 4, folder=str(tmp_path), buffers={"ulysses": 385, "ring": 33}, adopts=adopts)
    for communicators in given:
        assert [pair for pair in communicators if pair[0] == 2] == [[2, 33], [2, 385]], communicators
        assert all(megabytes == 200 for size, megabytes in communicators if size == 4), communicators


def test_attention_that_builds_scores_on_an_npu_is_named_by_module(server):
    ((line,),) = server.run("plain_attention", asked=False)
    assert "decoder.layers.*.self_attention.core_attention (2). --use-flash-attn computes" in line
    assert server.run("plain_attention", asked=True) == [[]]


@pytest.mark.parametrize("seq_length, megabytes", [(32768, 385), (4096, 200)])
def test_megatrons_group_gets_the_buffer_of_its_largest_message(server, tmp_path, seq_length, megabytes):
    for given in server.run("megatron_buffers", 4, folder=str(tmp_path), seq_length=seq_length):
        assert max(given) == megabytes and set(given) <= {megabytes, 200}, given


@pytest.mark.parametrize("world", [2, 3])
def test_collectives_of_hccl_give_what_they_must(server, world):
    assert server.run("collectives", world) == [[]] * world


def test_a_distributed_checkpoint_comes_back(server, tmp_path):
    assert server.run("checkpoint", 2, folder=str(tmp_path / "saved")) == ["npu"] * 2


TRAINER = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --global-batch-size 2 --train-iters 5 "
    "--lr 5e-3 --use-flash-attn --clip-grad 1.0"
).split()


@pytest.mark.slow
def test_the_embedded_trainer_makes_five_steps(server, tmp_path):
    scripts, data = bed.REPOSITORY / "scripts", tmp_path / "topics"
    server.run("script", path=str(scripts / "prepare_data.py"), flags=["--output", str(data)])

    def run(world, *flags):
        log = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        flags = [*TRAINER, "--data-path", str(data), "--log-file", str(log), *flags]
        records = server.run("script", world, path=str(scripts / "pretrain_gpt.py"), flags=flags, records=str(log))[0]
        return [(record["loss"], record["grad_norm"]) for record in records if "loss" in record]

    alone = run(1)
    assert len(alone) == 5
    flags = [*TRAINER, "--data-path", str(data), "--train-iters", "1"]
    for asked, calls in (
        (flags, 4),
        ([flag for flag in flags if flag != "--use-flash-attn"], 0),
    ):  # two layers and rows
        assert server.run("attention_calls", path=str(scripts / "pretrain_gpt.py"), flags=asked) == [calls]
    for algorithm in (RING, ULYSSES):
        same(run(2, "--context-parallel-size", "2", "--context-parallel-algo", algorithm), alone)
    # Two pipeline ranks of two virtual stages, where HCCL forbids batches of messages. Four micro batches, so that a
    # rank sends forward and backward at once, to the same neighbour.
    stages = "--global-batch-size 4 --num-layers 4 --pipeline-model-parallel-size 2".split()
    stages += ["--num-virtual-stages-per-pipeline-rank", "2"]
    ring = ["--context-parallel-size", "2", "--context-parallel-algo", RING]
    same(run(4, *stages, *ring), run(2, *stages))
    with pytest.raises(bed.JobFailed, match="--cp-p2p batch cannot work with virtual pipeline stages"):
        run(4, *stages, *ring, "--cp-p2p", "batch")


def checkouts():
    """version -> folder of the Megatron-LM checkouts in MEGATRON_LM_FOLDER."""
    folder = os.environ.get("MEGATRON_LM_FOLDER")
    found = sorted(path.parent for path in Path(folder).glob("*/pretrain_gpt.py")) if folder else []
    return {path.name.removeprefix("core_v"): path for path in found}


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.12.1", "0.16.1"])
def test_megatron_lms_own_script_makes_five_steps(version):
    from megatron_lm_cases import LENGTH, MOCK, MODEL

    checkout = checkouts().get(version)
    if checkout is None:
        pytest.skip(f"no Megatron-LM checkout core_v{version} in MEGATRON_LM_FOLDER")
    pytest.importorskip("six", reason="Megatron-LM imports six: pip install six")
    flags = [*MODEL, *LENGTH.split(), *MOCK, "--train-iters", "5"]
    server = bed.Server(checkout)
    try:

        def run(world, *more):
            return server.run("megatron_lm", world, checkout=str(checkout), flags=[*flags, *more])[-1]

        alone = run(1)
        assert len(alone) == 5
        for algorithm in (RING, ULYSSES):
            same(run(2, "--context-parallel-size", "2", "--context-parallel-algo", algorithm), alone)
    finally:
        server.close()


@pytest.mark.slow
def test_fused_kernels_of_a_checkout_are_not_compiled():
    """Red without its row: Megatron asks for nvcc where CUDA_HOME is None. No later version than 0.17 has them."""
    checkout = checkouts().get("0.12.1")
    if checkout is None:
        pytest.skip("no Megatron-LM checkout core_v0.12.1 in MEGATRON_LM_FOLDER")
    pytest.importorskip("six", reason="Megatron-LM imports six: pip install six")
    server = bed.Server(checkout)
    try:
        server.run("load_fused_kernels")
        with pytest.raises(bed.JobFailed, match="TypeError.*NoneType"):
            server.run("load_fused_kernels", without=["megatron.legacy.fused_kernels.load"])
    finally:
        server.close()


@pytest.mark.slow
def test_a_proof_runs_on_the_devices_in_the_real_sizes(tmp_path):
    data = tmp_path / "topics"
    scripts = bed.REPOSITORY / "scripts"
    run = functools.partial(subprocess.run, env=bed.environment(), capture_output=True, text=True, timeout=900)
    run([sys.executable, scripts / "prepare_data.py", "--output", data], check=True)
    command = [sys.executable, "-m", "mindspeed_cp.prove", "--json", "--device", "npu", "--ranks", "2", "--real-sizes"]
    flags = [*TRAINER, "--data-path", data, "--context-parallel-algo", RING]
    done = run([*command, "--steps", "2", scripts / "pretrain_gpt.py", *flags])
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert done.returncode == 0 and found["equal"] and found["compared"]["output"] > 20, done.stdout + done.stderr
    assert found["limits"]["output"] > 5e-4 and not any("cpu" in line.lower() for line in found["not_covered"])

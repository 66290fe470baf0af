"""Functions that the tests of the CPU stand-in run in a separate process; see ``adaptor_runs.observe``."""

import logging


def stand_in():
    """The results of torch.cuda's functions on a CPU, and their results after undo."""
    import torch

    torch.cuda.is_available = lambda: True
    from mindspeed_cp import megatron_adaptor
    from mindspeed_cp.patches.machine import cpu
    from mindspeed_cp.patches.rows import patches_of

    targets = {patch.target for patch in patches_of([cpu])}
    # A name may be in both the table for CPUs, which comes first, and the one for NPUs.
    rows = {row.target: row.status for row in reversed(megatron_adaptor.report())}
    facts = {"rows": {target: rows[target] for target in targets}}
    facts |= _devices(torch) | _random_numbers(torch) | _streams(torch) | _groups(torch) | _norm_and_fork(torch)
    facts["scripted"] = [_scripted(torch), megatron_adaptor.undo(), _scripted(torch)]
    try:
        torch.zeros(1, device="cuda")
        facts["after_undo"] = ""
    except (AssertionError, RuntimeError) as error:
        facts["after_undo"] = str(error)
    return facts


def _devices(torch):
    one = torch.ones(2)
    made = {
        "current_device": torch.zeros(1, device=torch.cuda.current_device()),
        "device of index": torch.zeros(1, device=torch.device("cuda", torch.cuda.current_device())),
        "device of name": torch.zeros(1, device=f"cuda:{torch.cuda.current_device()}"),
        "factory": torch.zeros(1, device="cuda:0"),
        "index": torch.arange(3, device=0),
        "like": torch.rand_like(one, device=torch.device("cuda", 0)),
        "to": one.to("cuda"),
        "to_index": one.to(0),
        "to_keyword": one.to(device="cuda:1"),
        "tensor.cuda": one.cuda(),
        "module": torch.nn.Linear(1, 1).cuda().to("cuda").weight,
        "new_zeros": one.new_zeros(2, device="cuda"),
    }
    decorated = torch.compile(dynamic=False)(_devices)
    return {
        "devices": {name: tensor.device.type for name, tensor in made.items()},
        "meta": torch.zeros(1, device="meta").device.type,
        "to_dtype": str(one.to(torch.float64).dtype),
        "pinned": torch.ones(2, pin_memory=True).pin_memory().tolist(),
        "type": one.type(),
        "cast": str(one.type("torch.cuda.DoubleTensor").dtype),
        "compiled": [torch.compile(_devices) is _devices, decorated is _devices],
        "memory": torch.cuda.mem_get_info(torch.cuda.current_device()),
        "frees what is sent": _frees_what_is_sent(),
    }


def _frees_what_is_sent():
    from megatron.core.transformer import TransformerConfig

    asked = dict(num_layers=1, hidden_size=8, num_attention_heads=1, deallocate_pipeline_outputs=True)
    return TransformerConfig(**asked).deallocate_pipeline_outputs


def _scripted(torch):
    """The result of a scripted function that calls torch's factories; every element must be 12."""

    def factories(x):
        made = torch.zeros(3) + torch.ones_like(x) + torch.full([3], 2.0) + torch.tensor([4.0, 4.0, 4.0])
        return made + torch.arange(3) + torch.linspace(5.0, 3.0, 3) + torch.empty(3).fill_(0.0)

    return torch.jit.script(factories)(torch.ones(3)).tolist()


def _random_numbers(torch):
    from torch.cuda import random

    drawn, calls = [], []
    for seed in (torch.manual_seed, torch.cuda.manual_seed, torch.cuda.manual_seed_all, random.manual_seed):
        seed(17)
        drawn.append(torch.rand(4).tolist())
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    torch.cuda._lazy_call(lambda: calls.append(1))
    return {
        "seeded": drawn == drawn[:1] * 4,
        "state_restored": torch.equal(first, torch.rand(4)),
        "lazy_call_runs": bool(calls),
        "generator_is_cpu": torch.cuda.default_generators[torch.cuda.current_device()] is torch.default_generator,
    }


def _streams(torch):
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        value = 5
    stream.wait_stream(torch.cuda.current_stream())
    stream.wait_event(event)
    torch.cuda.synchronize()
    return {"streams": [stream.query(), stream.record_event().query(), event.elapsed_time(event), value]}


def _groups(torch):
    import tempfile

    dist = torch.distributed
    dist.init_process_group(
        "nccl",
        init_method=f"file://{tempfile.mkdtemp()}/store",
        rank=0,
        world_size=1,
        device_id=torch.device("cuda", 0),
    )
    groups = [
        dist.group.WORLD,
        dist.new_group([0], None, "nccl"),
        dist.new_group([0], backend="nccl", pg_options=object()),
    ]
    dist.barrier(device_ids=[0])
    return {"backends": [dist.get_backend(group) for group in groups]}


def _norm_and_fork(torch):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    parallel = TransformerConfig(**sizes, tensor_model_parallel_size=2, sequence_parallel=True)
    norm, plain = WrappedTorchNorm(parallel, 8), WrappedTorchNorm(TransformerConfig(**sizes), 8)
    marked = all(parameter.sequence_parallel for parameter in norm.parameters())
    tracker, logged = CudaRNGStatesTracker(), []
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logger.addHandler(handler)
    tracker.add("model-parallel-rng", 3)
    before = torch.get_rng_state()
    with tracker.fork():
        first = torch.rand(2)
    restored = torch.equal(before, torch.get_rng_state())
    with tracker.fork():
        goes_on = not torch.equal(first, torch.rand(2))
    return {
        "norm": [type(norm).__name__, marked, parallel.sequence_parallel, hasattr(plain.weight, "sequence_parallel")],
        "fork": [restored, logged, goes_on],
    }

"""Compare Megatron's core attention on two ranks with the original at context_parallel_size 1; ``compare`` runs on each
rank.
"""

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

from bridge_parts import (
    ALGORITHMS,
    DOCUMENTS,
    HEADS,
    SEQ,
    cases,
    initialize,
    masks,
    message_of,
    module,
    packed_params,
    record_of,
    run,
    tensors,
)


def compare(rank):
    """Rank's results: name -> largest difference from Megatron's own attention, and what the adaptor printed."""
    import torch
    import torch.distributed as dist
    from megatron.core import package_info, parallel_state  # noqa: F401  before the adaptor on purpose

    from mindspeed_cp import ContextParallelConfig, SequenceLayout, megatron_adaptor
    from mindspeed_cp.kernels import cpu
    from mindspeed_cp.megatron.documents import examine_mask
    from mindspeed_cp.settings.training_setup import TrainingSetup

    old, results = (
        tuple(map(int, package_info.__version__.split(".")[:2])) < (0, 15),
        {"examined": {}, "differences": {}, "dense": {}},
    )
    results["examined"] = {name: examine_mask(mask).documents for name, mask in masks().items()}
    results["announced alone"] = initialize(1)
    expected = {name: run(module(1, **settings), tensors(), mask) for name, (settings, mask) in cases(old).items()}
    parallel_state.destroy_model_parallel()
    for algorithm in ALGORITHMS:
        config = ContextParallelConfig(context_parallel_size=2, algorithm=algorithm)
        layout = SequenceLayout.build(config, SEQ)
        megatron_adaptor.configure(config)
        results[f"announced {algorithm}"] = initialize(2)
        for name, (settings, mask) in cases(old).items():
            results["differences"][f"{algorithm} {name}"], results["dense"][f"{algorithm} {name}"] = _difference(
                megatron_adaptor, layout, rank, settings, mask, expected[name]
            )
        results["differences"][f"{algorithm} packed"] = _packed(megatron_adaptor, layout, rank)
        results["differences"][f"{algorithm} wrapped"] = _wrapped(megatron_adaptor, layout, rank, expected["no mask"])
        results[f"recompute {algorithm}"] = _recompute(megatron_adaptor, rank)
        results[f"kept {algorithm}"] = _kept(megatron_adaptor, rank)
        results["refused"] = _refused(megatron_adaptor, layout, rank)
        parallel_state.destroy_model_parallel()
    setup = TrainingSetup(num_attention_heads=HEADS, half_precision="float16")
    megatron_adaptor.configure(config, setup=setup)
    with mock.patch.object(cpu, "is_slow", lambda dtype: dtype == torch.float16):
        results["said of float16"] = initialize(2)
    parallel_state.destroy_model_parallel()
    results["wrong size"] = _wrong_size(megatron_adaptor, parallel_state)
    results["num_patches"] = sum(row.applied for row in megatron_adaptor.report())
    results["stand_in"] = sum(
        row.applied and _is_stand_in(megatron_adaptor, row.target) for row in megatron_adaptor.report()
    )
    dist.barrier()
    return results


def _is_stand_in(adaptor, target):
    return any(
        patch.target == target
        for table in ("device", "libraries", "checkout device")
        for patch in adaptor._tables[table]
    )


def _shards(layout, rank, inputs):
    return [layout.shard(tensor, rank) for tensor in inputs]


def _difference(adaptor, layout, rank, settings, mask, expected):
    """(largest difference, whether attention was called with a dense mask)."""
    import torch.distributed as dist

    from mindspeed_cp.megatron import bridge

    real = bridge.context_parallel_attention
    with mock.patch.object(bridge, "context_parallel_attention", side_effect=real) as spy:
        local, offset = run(module(2, **settings), _shards(layout, rank, tensors()), mask)
    for gradient in offset:
        dist.all_reduce(gradient)
    whole, whole_offset = expected
    pairs = [
        *zip(local, [layout.shard(tensor, rank) for tensor in whole], strict=True),
        *zip(offset, whole_offset, strict=True),
    ]
    difference = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    return difference, any(call.kwargs["attention_mask"] is not None for call in spy.call_args_list)


def by_document(inputs):
    """Attention and gradients of each document separately, in float64."""
    import reference
    import torch

    pieces = [
        reference.attention_with_gradients(
            *(tensor[start:stop] for tensor in inputs), reference.allowed_pairs(stop - start, causal=True)
        )
        for start, stop in zip(DOCUMENTS, DOCUMENTS[1:])
    ]
    out, *gradients = [torch.cat([piece[name] for piece in pieces]) for name in ("out", "dq", "dk", "dv")]
    return [out.flatten(2), *gradients]


def packed_difference(cp_size, inputs, expected):
    results, _ = run(module(cp_size), [tensor.squeeze(1) for tensor in inputs], None, packed_params(DOCUMENTS))
    return max(float((ours - theirs.squeeze(1)).abs().max()) for ours, theirs in zip(results, expected, strict=True))


def _packed(adaptor, layout, rank):
    expected = [layout.shard(tensor, rank) for tensor in by_document(tensors(batch=1))]
    with adaptor.state().running(record_of(adaptor, SEQ)):
        return packed_difference(2, _shards(layout, rank, tensors(batch=1)), expected)


def _wrapped(adaptor, layout, rank, expected):
    """Ulysses around Megatron's core attention, as in MindSpeed's own tests, and around wrappers of it: there must be
    only one exchange.
    """
    import functools

    import torch
    from megatron.core import parallel_state

    from mindspeed_cp import UlyssesContextAttention

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module(2)

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    class Sub(type(module(2))):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    subclassed = module(2)
    subclassed.__class__ = Sub
    worst = 0.0
    for inner in (module(2), Holder(), subclassed, functools.partial(module(2))):
        attention = UlyssesContextAttention(inner, parallel_state.get_context_parallel_group())
        local, _ = run(attention, _shards(layout, rank, tensors()), None)
        pairs = zip(local, [layout.shard(tensor, rank) for tensor in expected[0]], strict=True)
        worst = max(worst, *(float((ours - theirs).abs().max()) for ours, theirs in pairs))
    return worst


def _recompute(adaptor, rank):
    """Difference of gradients when another length was split between a checkpointed forward pass and its backward
    pass.
    """
    from megatron.core.tensor_parallel import checkpoint

    from mindspeed_cp import SequenceLayout

    attention, results = module(2), []
    layout = SequenceLayout.build(adaptor.state().config, SEQ)
    for recomputed in (False, True):
        *qkv, grad_out = _shards(layout, rank, tensors())
        leaves = [tensor.clone().requires_grad_() for tensor in qkv]
        call = lambda *inputs: attention(*inputs, None)  # noqa: E731
        with adaptor.state().running(record_of(adaptor, SEQ)):
            out = checkpoint(call, False, *leaves) if recomputed else call(*leaves)
        with adaptor.state().running(record_of(adaptor, SEQ // 2)):
            out.backward(grad_out.flatten(-2))
        results.append([leaf.grad for leaf in leaves])
    return max(float((one - two).abs().max()) for one, two in zip(*results))


def _kept(adaptor, rank):
    """name -> (largest difference of gradients from a recomputation, bytes that each call of attention sent)."""
    import torch
    from megatron.core.tensor_parallel import checkpoint
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from mindspeed_cp import SequenceLayout
    from mindspeed_cp.comm import count_bytes

    state, plain = adaptor.state(), adaptor.state().config
    attention, layout = module(2, attention_dropout=0.2), SequenceLayout.build(plain, SEQ)
    *qkv, grad_out = _shards(layout, rank, tensors())

    def call(*inputs):
        with count_bytes() as traffic:
            out = attention(*inputs, None)
        sent.append(traffic.total_bytes)
        return out + torch.rand(1, dtype=out.dtype)  # advances the random state

    def nested(*inputs):
        return checkpoint(call, False, *inputs) * 2

    def two(*inputs):
        """Two micro-batches in flight: the first's backward pass runs after the second's forward pass."""
        out, later = checkpoint(call, False, *inputs), checkpoint(call, False, *(tensor * 0.5 for tensor in inputs))
        out.backward(grad_out.flatten(-2))
        return later

    found, functions = {}, {"alone": lambda *inputs: checkpoint(call, False, *inputs), "two": two}
    functions |= {"nested": lambda *inputs: checkpoint(nested, False, *inputs)}
    for name, function in functions.items():
        gradients = []
        for config in (plain, replace(plain, keep_attention=True)):
            adaptor.configure(config)
            sent, leaves = [], [tensor.clone().requires_grad_() for tensor in qkv]
            model_parallel_cuda_manual_seed(5)
            with state.running(record_of(adaptor, SEQ)):
                out = function(*leaves)
            out.backward(grad_out.flatten(-2))
            gradients.append([leaf.grad for leaf in leaves])
        found[name] = max(float((one - two).abs().max()) for one, two in zip(*gradients)), sent
    with torch.no_grad(), state.running(record_of(adaptor, SEQ)):
        sent = []
        checkpoint(call, False, *leaves)
    adaptor.configure(plain)
    return found | {"without a graph": (0.0, sent)}


def _refused(adaptor, layout, rank):
    """Name -> error message of attention."""
    query, key, value, _ = _shards(layout, rank, tensors())
    attention, local = module(2), masks()["neither"][:, :, : query.size(0)]  # as Megatron splits it
    calls = {
        "bias": {"attention_bias": query},
        "format": {"packed_seq_params": packed_params(DOCUMENTS, "sbhd")},
        "hybrid": {"packed_seq_params": SimpleNamespace(qkv_format="thd", local_cp_size=1)},
        "hybrid sbhd": {"packed_seq_params": SimpleNamespace(qkv_format="sbhd", local_cp_size=4)},
    }
    square = local[..., : query.size(0)]  # as a script slices it that considers only this rank
    with adaptor.state().running(record_of(adaptor, SEQ)):
        messages = {
            name: message_of(lambda kwargs=kwargs: attention(query, key, value, None, **kwargs))
            for name, kwargs in calls.items()
        }
        messages |= {
            "split mask": message_of(lambda: attention(query, key, value, local)),
            "short mask": message_of(lambda: attention(query, key, value, square)),
            "length": message_of(lambda: attention(query[1:], key[1:], value[1:], None)),
        }
    return messages | {"short mask, no batch": message_of(lambda: attention(query, key, value, square))}


def _wrong_size(adaptor, parallel_state):
    from mindspeed_cp import ContextParallelConfig

    adaptor.configure(ContextParallelConfig(context_parallel_size=2, algorithm="megatron_cp_algo"))
    message = message_of(lambda: parallel_state.initialize_model_parallel(context_parallel_size=1))
    return message, parallel_state.model_parallel_is_initialized()


class RecordingCalculator:
    """A user's calculator that takes the length from its own keyword argument and records its arguments."""

    calls = []

    def calculate(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return kwargs.get("gather_size")


def calculate_from_core_attention(rank):
    """(positional arguments, keyword arguments, number of returned tokens) of Megatron's core attention with a user's
    calculator.
    """
    from mindspeed_cp import ContextParallelConfig, SequenceLayout, TrainingSetup, megatron_adaptor

    config = ContextParallelConfig(context_parallel_size=2, algorithm="ulysses_cp_algo")
    setup = TrainingSetup(num_attention_heads=HEADS, gather_size_calculator="bridge_runs:RecordingCalculator")
    megatron_adaptor.configure(config, setup=setup)
    initialize(2)
    inputs = [SequenceLayout.build(config, SEQ - 1).shard(tensor, rank) for tensor in tensors(seq=SEQ - 1)[:3]]
    out = module(2)(*inputs, None, gather_size=SEQ - 1)
    ((args, kwargs),) = RecordingCalculator.calls
    return args, kwargs, out.shape[0]

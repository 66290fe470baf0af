"""Attention kept across recomputation: no kernel call and no byte in the second pass, and the same gradients bit by
bit.
"""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from cases import DTYPES, Case, arguments, local_inputs, setup_of
from distributed import run_ranks
from kept_bytes import expected_bytes
from setups import ALGORITHM_AND_SIZE, variants
from torch.utils.checkpoint import checkpoint

from mindspeed_cp import KeptAttention
from mindspeed_cp.comm import count_bytes
from mindspeed_cp.kernels import select_kernel

pytestmark = pytest.mark.cpu_only
AT_FOUR = [point for point in ALGORITHM_AND_SIZE if point.values[1] in (3, 4)]
RING = {"context_parallel_size": 2, "algorithm": "megatron_cp_algo"}
DOCUMENTS = (0, 5, 6, 23, 32)


class Counting:
    """A kernel that counts the blocks of its forward pass."""

    def __init__(self, kernel):
        self._kernel, self.calls = kernel, 0

    def __getattr__(self, name):
        return getattr(self._kernel, name)

    def forward(self, *args):
        self.calls += 1
        return self._kernel.forward(*args)


def problem(rank, case):
    """(layer, leaves, grad_out, passes): a layer of two attentions, and (blocks, bytes) of each pass of it."""
    from mindspeed_cp import context_parallel_attention

    config, groups = setup_of(case.config)
    layout, passes = case.layout(), []
    leaves, sinks, grad_out, mask = local_inputs(rank, case, layout)
    kernel = Counting(select_kernel(case.kernel, "cpu"))
    keywords = arguments(case, config, groups, layout, sinks, mask) | {"kernel": kernel}

    def layer(query, key, value, kept):
        before = kernel.calls
        with count_bytes() as traffic:
            first = context_parallel_attention(query, key, value, **keywords, kept=kept)
            keywords["layer_number"] = 2
            second = context_parallel_attention(query * 0.5, key, value * 2, **keywords, kept=kept)
            keywords["layer_number"] = 1
        passes.append((kernel.calls - before, traffic.total_bytes))
        return (first + second).sin() * (1 + torch.rand((), dtype=first.dtype))

    leaves = [*leaves, sinks] if case.sinks else leaves
    return layer, leaves, grad_out, passes


def trained(rank, case, kept):
    """(out and gradients, passes, bytes that were kept between the passes)."""
    layer, leaves, grad_out, passes = problem(rank, case)
    torch.manual_seed(5)
    contexts = {} if kept is None else {"context_fn": kept.contexts}
    out = checkpoint(layer, *leaves[:3], kept, use_reentrant=False, early_stop=False, **contexts)
    num_bytes = kept.num_bytes if kept else 0
    out.backward(grad_out)
    assert kept is None or kept.num_bytes == 0
    return [out.detach(), *(leaf.grad for leaf in leaves)], passes, num_bytes


def compared(rank, cases):
    """For each case: bytes kept. Everything else is asserted here."""
    found = []
    for case in cases:
        plain, twice, _ = trained(rank, case, None)
        ours, once, num_bytes = trained(rank, case, KeptAttention())
        assert all(map(torch.equal, plain, ours)), case
        assert twice[0] == twice[1] == once[0] and once[0][0] > 0 and once[0][1] > 0, (case, twice, once)
        assert once[1] == (0, 0), (case, once)
        found.append(num_bytes)
    return found


@pytest.mark.parametrize("algorithm, cp", AT_FOUR)
def test_the_second_pass_computes_and_sends_nothing_and_gradients_are_the_same(algorithm, cp):
    cases = [
        Case(config, seq_len=8 * cp, batch=2, heads=2 * cp, kv_heads=cp, dk=6, dv=4, dtype=dtype, seed=seed)
        for seed, config in enumerate(variants(algorithm, cp))
        for dtype in ("float64" if seed % 2 else "bfloat16",)
    ]
    for number, found in enumerate(run_ranks(cp, compared, cases)):
        orders = [select_kernel(None, "cpu").memory_order(DTYPES[case.dtype]) for case in cases]
        assert found == [expected_bytes(case, order, number) for case, order in zip(cases, orders)]


@pytest.mark.parametrize("algorithm", ["megatron_cp_algo", "ulysses_cp_algo", "hybrid_cp_algo", "kvallgather_cp_algo"])
def test_documents_dropout_masks_sinks_and_uneven_lengths_are_kept_alike(algorithm):
    config = {"context_parallel_size": 4, "algorithm": algorithm}
    config |= {"ulysses_degree": 2} if algorithm == "hybrid_cp_algo" else {}
    plain = Case(config, seq_len=32, heads=8, kv_heads=4)
    auto = {"batch_layout": "balanced", "kv_exchange": "auto"} if algorithm in RING.values() else {}
    cases = [
        replace(plain, cu_seqlens=DOCUMENTS).with_config(**auto),
        replace(plain, dropout_p=0.3),
        replace(plain, dropout_p=0.3, cu_seqlens=DOCUMENTS, sinks=True),
        replace(plain, dense="shared"),
        replace(plain, window=(5, 0), kernel="blockwise"),
        replace(plain, seq_len=29, kv_heads=1),
    ]
    if algorithm in ("ulysses_cp_algo", "hybrid_cp_algo"):
        cases += [replace(case, kv_heads=1).with_config(ulysses_chunks=2) for case in cases[1:4]]
    run_ranks(4, compared, cases)


def refused(rank, case):
    """name -> message of what does not match."""
    layer, leaves, grad_out, _ = problem(rank, case)
    seen = []

    def changing(change):
        """The layer, whose second pass is changed."""

        def function(query, key, value, kept):
            again, out = bool(seen), layer(query, key, value, kept)
            seen.append(1)
            return change(out, query, key, value, kept) if again else out

        return function

    def spoiled(query, key, value, kept):
        out = layer(query, key, value, kept)
        for call in kept._calls:
            call.computed.rounds[0].out.add_(1)
        return out

    functions = {
        "more": changing(lambda out, *args: out + layer(*args)),
        "changed in place": spoiled,
    }
    found = {}
    for name, function in functions.items():
        seen.clear()
        kept = KeptAttention()
        out = checkpoint(function, *leaves[:3], kept, use_reentrant=False, context_fn=kept.contexts, early_stop=False)
        with pytest.raises(ValueError) as error:
            out.backward(grad_out)
        found[name] = str(error.value)
    kept = KeptAttention()
    first, later = kept.contexts()
    with first:
        layer(*leaves[:3], kept)
    with pytest.raises(ValueError) as error, later:
        pass
    found["fewer"] = str(error.value)
    with pytest.raises(ValueError) as error, first:
        pass
    found["used twice"] = str(error.value)
    return found


def test_passes_that_differ_are_an_error():
    found = run_ranks(2, refused, Case(RING, dv=4))[0]
    assert "more often than the first pass" in found["more"]
    assert "left out 2 calls" in found["fewer"]
    assert "changed in place" in found["changed in place"]
    assert "belongs to one checkpoint" in found["used twice"]


def differing(rank, case):
    """Messages for a second pass with another scale, and one whose dropout draws from elsewhere."""
    layer, leaves, _, _ = problem(rank, case)
    found = []
    for change in (lambda: leaves[0].narrow(3, 0, 2), lambda: torch.rand(1) and leaves[0]):
        kept = KeptAttention()
        first, later = kept.contexts()
        torch.manual_seed(3)
        with first:
            layer(*leaves[:3], kept)
        torch.manual_seed(3)
        with pytest.raises(ValueError) as error, later:
            query = change()
            layer(query, leaves[1].narrow(3, 0, query.size(3)), leaves[2], kept)
        found.append(str(error.value))
    return found


def test_another_shape_and_other_random_numbers_are_errors_that_say_so():
    for shape, random in run_ranks(2, differing, Case(RING, dropout_p=0.2)):
        assert "layer 1" in shape and "query is" in shape
        assert "preserve_rng_state=True" in random


def lifetimes(rank, case):
    """What is left of kept tensors: without a graph, after a loss that nobody differentiates, after two backward
    passes.
    """
    layer, leaves, grad_out, passes = problem(rank, case)
    kept = KeptAttention()
    with torch.no_grad():
        checkpoint(layer, *leaves[:3], kept, use_reentrant=False, context_fn=kept.contexts)
    assert kept.num_bytes == 0 and not kept.is_active

    kept = KeptAttention()
    out = checkpoint(layer, *leaves[:3], kept, use_reentrant=False, context_fn=kept.contexts)
    memory = weakref.ref(kept._calls[0].computed.rounds[0].out)
    del out, kept
    gc.collect()
    assert memory() is None

    passes.clear()
    kept = KeptAttention()
    out = checkpoint(layer, *leaves[:3], kept, use_reentrant=False, context_fn=kept.contexts, early_stop=False)
    out.backward(grad_out, retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    with pytest.warns(UserWarning, match="runs again") if rank == 0 else torch.enable_grad():
        out.backward(grad_out)
    assert all(torch.equal(one, leaf.grad) for one, leaf in zip(first, leaves))
    assert passes[0] == passes[2] and passes[1] == (0, 0)


def test_nothing_is_kept_without_a_graph_or_after_it():
    run_ranks(2, lifetimes, Case(RING))


def inferring(rank, case):
    """Inside inference_mode nothing is kept; what was made there trains no worse afterwards."""
    layer, leaves, grad_out, _ = problem(rank, case)
    kept = KeptAttention()
    with torch.inference_mode():
        out = checkpoint(layer, *leaves[:3], kept, use_reentrant=True)
        first, _ = (again := KeptAttention()).contexts()
        with first:
            kept_out = layer(*leaves[:3], again)
        assert again.num_bytes == 0
    torch.manual_seed(5)
    kept = KeptAttention()
    trained_out = checkpoint(layer, *leaves[:3], kept, use_reentrant=False, context_fn=kept.contexts)
    trained_out.backward(grad_out)
    return out.shape == trained_out.shape == kept_out.shape and all(leaf.grad is not None for leaf in leaves)


def test_inference_mode_keeps_nothing():
    assert all(run_ranks(2, inferring, Case(RING)))

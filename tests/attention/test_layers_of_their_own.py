"""Layers of different algorithms in one model (--cp-layer-algo): exact through all of them, and each sends its own."""

import re
from pathlib import Path

import pytest
import torch
from cases import setup_of
from distributed import run_ranks
from reference import allowed_pairs, attention

from mindspeed_cp import ContextParallelConfig, SequenceLayout
from mindspeed_cp.comm import count_bytes
from mindspeed_cp.sequence.balance import imbalance
from mindspeed_cp.sequence.slice_mask import document_mask

HEADS, KV_HEADS, DIM, BATCH = 8, 4, 3, 2
EVERY = (
    "1:ulysses_cp_algo,2:hybrid_cp_algo:ulysses-degree-in-cp=2:context-parallel-kv-cache-policy=full,"
    "3:kvallgather_cp_algo,4:megatron_cp_algo:cp-window-size=2,5:megatron_cp_algo:cp-kv-exchange=mesh,"
    "6:ulysses_cp_algo:cp-ulysses-chunks=2"
)
LOCAL_AND_GLOBAL = "2-/3:ulysses_cp_algo"  # the others are local: a window, by direct exchange
RING = {"algorithm": "megatron_cp_algo"}
DOCUMENTS = (0, 3, 20, 21, 33)
# (configuration, length, windows of the layers that are not every third, documents)
MODELS = {
    "every algorithm": ({"context_parallel_size": 4, "layer_algorithms": EVERY, **RING}, 33, None, None),
    "local and global": (
        {"context_parallel_size": 4, "kv_exchange": "direct", "layer_algorithms": LOCAL_AND_GLOBAL, **RING},
        32, 5, None,
    ),
    "documents, balanced": (
        {"context_parallel_size": 4, "batch_layout": "balanced", "ulysses_degree": 2,
         "layer_algorithms": "1-:megatron_cp_algo,0:hybrid_cp_algo"}, 33, None, DOCUMENTS,
    ),
    "degrees without a common part": (
        {"context_parallel_size": 6, "algorithm": "hybrid_cp_algo", "ulysses_degree": 2, "kv_cache_policy": "half",
         "layer_algorithms": "1:hybrid_cp_algo:ulysses-degree-in-cp=3,2-:ulysses_cp_algo"}, 31, None, None,
    ),
}  # fmt: skip


def layers_of(name):
    return 7 if name == "every algorithm" else 3


def weights(num_layers):
    """Per layer (width, queries, keys and values), drawn alike on all ranks."""
    generator = torch.Generator().manual_seed(7)
    width = HEADS * DIM
    return [
        torch.randn(width, width + 2 * KV_HEADS * DIM, generator=generator, dtype=torch.float64) * width**-0.5
        for _ in range(num_layers)
    ]


def hidden(seq_len):
    generator = torch.Generator().manual_seed(8)
    return torch.randn(seq_len, BATCH, HEADS * DIM, generator=generator, dtype=torch.float64)


def through(x, matrices, attend):
    """Layers one after another; ``attend(number, query, key, value)``."""
    for number, matrix in enumerate(matrices, 1):
        parts = (x @ matrix).split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=-1)
        x = x + attend(number, *(part.unflatten(-1, (-1, DIM)) for part in parts)).flatten(2)
    return x


def window_of(number, window):
    return None if window is None or number % 3 == 0 else (window, 0)


def on_ranks(rank, name):
    """(own positions, output, gradient of the input, gradients of the weights, bytes of each layer forward)."""
    from mindspeed_cp import ContextParallelGroups, context_parallel_attention

    options, seq_len, window, documents = MODELS[name]
    config, groups = setup_of(options)
    if documents:  # as with a group that a framework has made
        groups = ContextParallelGroups.adopt(config, groups.cp_group, pool={})
    layout = SequenceLayout.build(config, seq_len, documents)
    x = layout.shard(hidden(seq_len), rank).clone().requires_grad_()
    matrices = [matrix.requires_grad_() for matrix in weights(layers_of(name))]
    sent = {}

    def attend(number, *tensors):
        with count_bytes() as counted:
            out = context_parallel_attention(
                *tensors,
                config=config,
                groups=groups,
                layout=layout,
                layer_number=number,
                sliding_window=window_of(number, window),
                cu_seqlens=documents,
            )
        sent[number] = {purpose: size for purpose, size in counted.bytes.items() if size}
        return out

    out = through(x, matrices, attend)
    (out.sin().sum() / 1000).backward()
    return layout.positions(rank), out.detach(), x.grad, [matrix.grad for matrix in matrices], sent


def on_one(name):
    options, seq_len, window, documents = MODELS[name]
    x = hidden(seq_len).requires_grad_()
    matrices = [matrix.requires_grad_() for matrix in weights(layers_of(name))]

    def attend(number, *tensors):
        seen = window_of(number, window)
        return attention(*tensors, allowed_pairs(seq_len, causal=True, window=seen, cu_seqlens=documents))

    out = through(x, matrices, attend)
    (out.sin().sum() / 1000).backward()
    return out.detach(), x.grad, [matrix.grad for matrix in matrices]


def check(name):
    """The bytes that every rank's layers send."""
    options, seq_len, *_ = MODELS[name]
    ranks = run_ranks(options["context_parallel_size"], on_ranks, name)
    out, grad, matrices = on_one(name)
    for positions, mine, mine_grad, _, _ in ranks:
        torch.testing.assert_close(mine, out[positions], rtol=0, atol=1e-10)
        torch.testing.assert_close(mine_grad, grad[positions], rtol=0, atol=1e-10)
    for index, matrix in enumerate(matrices):
        torch.testing.assert_close(sum(each[3][index] for each in ranks), matrix, rtol=0, atol=1e-10)
    return [each[4] for each in ranks]


def test_layers_of_every_algorithm_are_exact_one_after_another():
    check("every algorithm")


def test_local_layers_send_what_their_window_needs_and_global_ones_heads():
    """As in Gemma 3 and gpt-oss, on even lengths: bytes as equalities, layer by layer."""
    options, seq_len, window, _ = MODELS["local and global"]
    config = ContextParallelConfig(**options)
    layout, row, rows = SequenceLayout.build(config, seq_len), BATCH * 8 * DIM, seq_len // 4
    heads = {"q": HEADS, "kv": 2 * KV_HEADS, "out": HEADS}
    allowed = allowed_pairs(seq_len, causal=True, window=(window, 0))[0]
    for rank, sent in enumerate(check("local and global")):
        own = layout.positions(rank)
        others = [layout.positions(other) for other in range(4) if other != rank]
        needed = sum(int(allowed[theirs][:, own].any(0).sum()) for theirs in others)
        local = {"kv": needed * 2 * KV_HEADS * row}
        assert sent[1] == sent[2] == local and 0 < needed < 3 * rows
        assert sent[3] == {purpose: 3 * rows * row * count // 4 for purpose, count in heads.items()}


@pytest.mark.parametrize("name", ["documents, balanced", "degrees without a common part"])
def test_one_layout_serves_all_layers_in_balance(name):
    check(name)
    options, seq_len, _, documents = MODELS[name]
    config = ContextParallelConfig(**options)
    layout = SequenceLayout.build(config, seq_len * 40, documents and [40 * end for end in documents])
    for each in config.layer_configs:
        seen = layout.of_degree(each.hierarchy[0])
        ends = tuple(40 * end for end in documents or (0, seq_len))
        assert imbalance(seen.rings, document_mask(None, 0, ends)) < 1.1


def megabytes(window, layer, **options):
    """What the rank sends that sends the most of a layer of Gemma 3 27B, forward and backward."""
    from mindspeed_cp.planner.trace import Problem, trace

    problem = Problem(131072, 32, 16, 128, 128, sliding_window=window, layer_number=layer)
    config = ContextParallelConfig(context_parallel_size=8, **{**RING, **options})
    ranks = [trace(config, problem, rank) for rank in (0, 3, 7)]
    return max(sum(sum(each.sent.values()) for each in passes) for passes in ranks) / 1e6


def test_the_documentation_has_the_bytes_of_the_engine():
    page = Path(__file__, "..", "..", "..", "docs", "choosing.md").resolve().read_text(encoding="utf-8")
    rows = {}
    for name, window in (("local", (1023, 0)), ("global", None)):
        ways = ({"algorithm": "ulysses_cp_algo"}, {}, {"kv_exchange": "direct"})
        rows[name] = [megabytes(window, 1, **way) for way in ways]
        cells = " | ".join(f"{size:,.1f} MB" for size in rows[name])
        assert re.search(rf"^\| {name} layer[^|]*\| {re.escape(cells)} \|$", page, re.MULTILINE), cells
    each_its_own = {"kv_exchange": "direct", "layer_algorithms": "5-/6:ulysses_cp_algo"}
    local, whole = megabytes((1023, 0), 5, **each_its_own), megabytes(None, 6, **each_its_own)
    assert (local, whole) == (rows["local"][2], rows["global"][0])
    sums = [(52 * rows["local"][way] + 10 * rows["global"][way]) / 1e3 for way in (0, 2)]
    said = [f"{sums[0]:.1f} GB with Ulysses everywhere", f"{sums[1]:.1f} GB with the direct exchange everywhere"]
    said.append(f"{(52 * local + 10 * whole) / 1e3:.1f} GB with the line above")
    assert [text for text in said if text not in " ".join(page.split())] == []

"""Attention problems that are solved by the ranks and by the dense reference; used by most distributed tests."""

from dataclasses import dataclass, field, replace

import torch
from distributed import device_type, run_ranks
from kept_groups import KeptGroups
from reference import allowed_pairs, attention_with_gradients

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Accelerators have no float64 attention; there the same holds within float32 rounding of their matrix units.
EXACT_DTYPE = {"cpu": "float64", "cuda": "float32", "npu": "float32"}
TOLERANCE = {"float64": 1e-10, "float32": 2e-3}


@dataclass(frozen=True)
class Case:
    """A complete attention problem; everything random depends on ``seed``.

    Args:
        config: keyword arguments of ContextParallelConfig.
        dense: None, "shared" for an (S, S) mask, or "batch" for (batch, 1, S, S); the last query row sees no key.
        window: (left, right) or None. cu_seqlens: a tuple, a tuple of tuples (one per row), or None.
        slices: attention_slices, one list or one per row of the batch, or None.
        runs: positions that each rank holds; None for the configuration's own layout.
        share_from: messages of at least this many bytes go through shared memory; None for never.
    """

    config: dict
    seq_len: int = 24
    batch: int = 1
    heads: int = 4
    kv_heads: int = 4
    dk: int = 4
    dv: int = 4
    dtype: str = field(default_factory=lambda: EXACT_DTYPE[device_type()])
    cu_seqlens: tuple | None = None
    window: tuple | None = None
    dense: str | None = None
    sinks: bool = False
    softmax_scale: float | None = None
    dropout_p: float = 0.0
    layer_number: int = 1
    kernel: str | None = None
    fused_update: bool = False
    share_from: int | None = 0
    seed: int = 0
    runs: tuple | None = None
    slices: tuple | None = None

    @property
    def cp(self):
        return self.config.get("context_parallel_size", 1)

    def with_config(self, **changes):
        return replace(self, config={**self.config, **changes})

    def inputs(self):
        """Dict of global float tensors query, key, value, grad_out, and sinks and attention_mask (or None)."""
        generator = torch.Generator().manual_seed(self.seed)
        size, batch = self.seq_len, self.batch

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DTYPES[self.dtype])

        tensors = {
            "query": draw(size, batch, self.heads, self.dk),
            "key": draw(size, batch, self.kv_heads, self.dk),
            "value": draw(size, batch, self.kv_heads, self.dv),
            "grad_out": draw(size, batch, self.heads, self.dv),
        }
        tensors["sinks"] = draw(self.heads) if self.sinks else None
        tensors["attention_mask"] = None
        if self.dense:
            shape = (size, size) if self.dense == "shared" else (batch, 1, size, size)
            hidden = torch.rand(shape, generator=generator) < 0.4
            hidden[..., -1, :] = True
            tensors["attention_mask"] = hidden
        return tensors

    def allowed(self, attention_mask):
        mask_type = self.config.get("attention_mask_type", "causal")
        causal = mask_type == "causal" or (mask_type == "general" and attention_mask is None)
        documents = self.cu_seqlens if self.differs_by_row else [self.cu_seqlens]
        slices = self.slices if self.slices_differ_by_row else [self.slices]
        count = max(len(documents), len(slices))
        allowed = [
            allowed_pairs(
                self.seq_len,
                causal=causal and self.slices is None,
                window=self.window,
                cu_seqlens=documents[row % len(documents)],
                attention_mask=attention_mask,
                slices=slices[row % len(slices)],
            )
            for row in range(count)
        ]
        if len(allowed) == 1:
            return allowed[0]
        return torch.cat([pairs[index if len(pairs) > 1 else 0][None] for index, pairs in enumerate(allowed)])

    @property
    def differs_by_row(self):
        """Whether cu_seqlens holds boundaries for every row of the batch."""
        return self.cu_seqlens is not None and not isinstance(self.cu_seqlens[0], int)

    @property
    def slices_differ_by_row(self):
        """Whether slices holds a list for every row of the batch."""
        return bool(self.slices) and not isinstance(self.slices[0][-1], str)

    def layout(self):
        from mindspeed_cp import ContextParallelConfig, SequenceLayout

        config = ContextParallelConfig(**self.config)
        if self.runs is not None:
            return SequenceLayout.from_runs(config, self.runs)
        cu_seqlens = None if self.differs_by_row else self.cu_seqlens
        slices = None if self.slices_differ_by_row else self.slices
        return SequenceLayout.build(config, self.seq_len, cu_seqlens, slices)

    def __str__(self):
        flags = [
            f"{key.removeprefix('kv_')}={value}" for key, value in self.config.items() if key != "context_parallel_size"
        ]
        parts = [f"cp{self.cp}", *flags, f"S{self.seq_len}", f"h{self.heads}.{self.kv_heads}"]
        parts += [f"d{self.dk}.{self.dv}"] if self.dk != self.dv else []
        parts += [f"packed{len(self.cu_seqlens) - 1}"] if self.cu_seqlens else []
        parts += [f"window{self.window[0]}.{self.window[1]}"] if self.window else []
        parts += [f"slices{len(self.slices)}"] if self.slices is not None else []
        parts += [f"dense.{self.dense}"] if self.dense else []
        parts += ["sinks"] if self.sinks else []
        return "-".join(parts)


_setups, _kept = {}, []


def setup_of(config, share_from=0):
    """(ContextParallelConfig, ContextParallelGroups) of this rank; groups are made once per process and hierarchy, and
    share their communicators with those of other hierarchies.
    """
    from mindspeed_cp import ContextParallelConfig, ContextParallelGroups

    config = ContextParallelConfig(**config)
    key = config.hierarchy, config.layer_algorithms, config.p2p, share_from
    if key not in _setups:
        if not _kept:
            _kept.append(KeptGroups(torch.distributed, "new_group"))
        with _kept[0].reused():
            _setups[key] = ContextParallelGroups.build(config, share_from=share_from)
    return config, _setups[key]


def local_inputs(rank, case, layout):
    """This rank's leaves (query, key, value, sinks or None), grad_out shard and the global mask, on the session's
    device.
    """
    tensors = {name: None if tensor is None else tensor.to(device_type()) for name, tensor in case.inputs().items()}
    query, key, value, grad_out = (
        layout.shard(tensors[name], rank).clone() for name in ("query", "key", "value", "grad_out")
    )
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    sinks = None if tensors["sinks"] is None else tensors["sinks"].requires_grad_()
    return leaves, sinks, grad_out, tensors["attention_mask"]


def arguments(case, config, groups, layout, sinks, mask):
    """Keyword arguments of context_parallel_attention for this case."""
    cu_seqlens = case.cu_seqlens
    if cu_seqlens is not None and not case.differs_by_row:
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    return dict(
        config=config,
        groups=groups,
        layout=layout,
        softmax_scale=case.softmax_scale,
        attention_mask=mask,
        cu_seqlens=cu_seqlens,
        dropout_p=case.dropout_p,
        layer_number=case.layer_number,
        kernel=case.kernel,
        fused_update=case.fused_update,
        sliding_window=case.window,
        softmax_offset=sinks,
        attention_slices=case.slices,
    )


def attend(rank, case):
    """Forward and backward on this rank; dict of CPU tensors out, dq, dk, dv (local shards) and d_offset."""
    from mindspeed_cp import context_parallel_attention

    config, groups = setup_of(case.config, case.share_from)
    layout = case.layout()
    leaves, sinks, grad_out, mask = local_inputs(rank, case, layout)
    if case.dropout_p:  # only then, because until CUDA starts each call leaves a stack trace in a queue
        torch.manual_seed(case.seed + rank)
    out = context_parallel_attention(*leaves, **arguments(case, config, groups, layout, sinks, mask))
    assert out.dtype == leaves[0].dtype and out.shape == grad_out.shape, (out.dtype, out.shape)
    out.backward(grad_out)
    result = {"out": out.detach(), **{f"d{n}": leaf.grad for n, leaf in zip("qkv", leaves)}}
    if sinks is not None:
        result["d_offset"] = sinks.grad
    for name, leaf in zip(("dq", "dk", "dv"), leaves):
        assert result[name].dtype == leaf.dtype and result[name].shape == leaf.shape, name
    return {name: tensor.cpu() for name, tensor in result.items()}


def attend_many(rank, cases):
    return [attend(rank, case) for case in cases]


def whole(case, shards):
    """The ranks' results as global float64 tensors; the sinks' gradient is the sum over ranks."""
    layout = case.layout()
    return {
        name: (
            sum(shard[name].double() for shard in shards)
            if name == "d_offset"
            else layout.unshard([shard[name] for shard in shards]).double()
        )
        for name in shards[0]
    }


def expected(case):
    """The dense reference's result for this case."""
    tensors = case.inputs()
    return attention_with_gradients(
        *(tensors[name] for name in ("query", "key", "value", "grad_out")),
        case.allowed(tensors["attention_mask"]),
        softmax_scale=case.softmax_scale,
        sinks=tensors["sinks"],
    )


def largest_errors(got, want):
    """Dict name -> largest absolute difference; NaN counts as infinite."""
    return {name: float(torch.nan_to_num((got[name] - want[name]).abs(), nan=torch.inf).max()) for name in want}


def check_cases(cases):
    """Run cases of one context-parallel size and compare each with the dense reference; returns all ranks' results."""
    results = run_ranks(cases[0].cp, attend_many, cases)
    for index, case in enumerate(cases):
        errors = largest_errors(whole(case, [rank_results[index] for rank_results in results]), expected(case))
        wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= TOLERANCE[case.dtype]}
        assert not wrong, f"{case}: largest differences {wrong}\n{case!r}"
    return results

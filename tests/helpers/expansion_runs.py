"""Attention whose keys and values are computed from the tensors that travel, on real ranks and in one process."""

from dataclasses import dataclass

import reference
import torch
import torch.distributed as dist
from cases import DTYPES, Case, arguments, setup_of
from measured import drop_zero
from torch.utils.checkpoint import checkpoint

NAMES = ("out", "dq", "drope", "dlatent", "dweight")


@dataclass(frozen=True)
class LatentCase(Case):
    """A problem of multi-latent attention; ``dk`` is ``rope`` plus the part computed from the latent.

    Args:
        rank: elements of the latent. rope: elements of the key's part that all heads share.
        kept: whether it is recomputed, reusing attention from the first pass.
    """

    dk: int = 6
    dv: int = 3
    rope: int = 2
    rank: int = 5
    kept: bool = False

    @property
    def elements(self):
        """Number of elements per token that travels."""
        return self.rope + self.rank

    def tensors(self):
        """Global query, rope, latent, weight, grad_out; sinks and attention_mask (or None)."""
        generator = torch.Generator().manual_seed(self.seed + 100)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DTYPES[self.dtype])

        drawn = self.inputs()
        weight = draw(self.heads * (self.dk - self.rope + self.dv), self.rank) / self.rank**0.5
        rows = (draw(self.seq_len, self.batch, 1, width) for width in (self.rope, self.rank))
        return drawn["query"], *rows, weight, drawn["grad_out"], drawn["sinks"], drawn["attention_mask"]


def expected(case):
    """Dict of float64 tensors, by the textbook in one process."""
    *leaves, grad_out, sinks, mask = case.tensors()
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    query, rope, latent, weight = leaves
    nope = case.dk - case.rope
    made = (latent.squeeze(2) @ weight.t()).unflatten(-1, (case.heads, -1))
    key = torch.cat([made[..., :nope], rope.expand(-1, -1, case.heads, -1)], -1)
    out = reference.attention(query, key, made[..., nope:], case.allowed(mask), sinks=sinks)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, grad_out.double()))))


def prepared(rank, case):
    """(call of the leaves, leaves, this rank's gradient of out, groups)."""
    from mindspeed_cp import KeptAttention, LatentExpansion, context_parallel_attention

    config, groups = setup_of(case.config, case.share_from)
    layout = case.layout()
    query, rope, latent, weight, grad_out, sinks, mask = case.tensors()
    leaves = [layout.shard(tensor, rank).clone().requires_grad_() for tensor in (query, rope, latent)]
    leaves.append(weight.clone().requires_grad_())
    keywords = arguments(case, config, groups, layout, sinks, mask)

    def attend(query, rope, latent, weight, kept=None):
        expand = LatentExpansion(weight, case.heads, case.dk - case.rope, case.rope, case.dv)
        return context_parallel_attention(query, rope, latent, **keywords, expand=expand, kept=kept)

    def call():
        if not case.kept:
            return attend(*leaves)
        kept = KeptAttention()
        return checkpoint(attend, *leaves, kept, use_reentrant=False, context_fn=kept.contexts)

    return call, leaves, layout.shard(grad_out, rank), groups


def attend_many(rank, cases):
    """For each case: (dict of this rank's tensors, with the weight's gradient summed over the ranks; bytes by purpose
    of the forward and of the backward pass).
    """
    from mindspeed_cp.comm import count_bytes

    results = []
    for case in cases:
        call, leaves, grad_out, _ = prepared(rank, case)
        if case.dropout_p:
            torch.manual_seed(case.seed + rank)
        with count_bytes() as forward:
            out = call()
        with count_bytes() as backward:
            out.backward(grad_out)
        gradients = [leaf.grad for leaf in leaves]
        assert all(gradient.dtype == leaf.dtype for gradient, leaf in zip(gradients, leaves))
        gradients[-1] = gradients[-1].double()
        dist.all_reduce(gradients[-1])
        tensors = dict(zip(NAMES, (out.detach(), *gradients)))
        results.append((tensors, drop_zero(forward.bytes), drop_zero(backward.bytes)))
    return results


def whole(case, shards):
    """The ranks' tensors as global float64 ones."""
    layout = case.layout()
    found = {name: layout.unshard([shard[name] for shard in shards]).double() for name in NAMES[:-1]}
    return found | {"dweight": shards[0]["dweight"]}


def of_heads(case):
    """The same problem with exchange of the keys and values of all heads."""
    return case.with_config(mla_exchange="heads")


def peak_bytes(rank, case):
    """Most bytes alive at once in forward and backward, reused buffers included."""
    from mindspeed_cp.planner.memory import LiveBytes

    call, _, grad_out, groups = prepared(rank, case)
    groups.workspace.clear()
    for _ in range(2):
        call().backward(grad_out)
    with LiveBytes() as live:
        call().backward(grad_out)
    return live.peak + groups.workspace.num_bytes

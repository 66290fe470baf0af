"""A fake flash-linear-attention with its names and signatures, which computes token by token in float32.

After this module is imported, ``import fla`` finds it; Megatron looks for fla when its gated delta nets are imported.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
import torch.nn.functional as F
from delta_runs import normalize, rule


def l2norm(x, eps=1e-6, output_dtype=None):
    return normalize(x.float()).to(x.dtype)


def causal_conv1d(
    x,
    weight=None,
    bias=None,
    residual=None,
    initial_state=None,
    output_final_state=False,
    activation=None,
    backend="triton",
    cu_seqlens=None,
    **kwargs,
):
    """(b, s, c) and weight (c, w) -> ((b, s, c), None)."""
    assert initial_state is None and not output_final_state and residual is None and not kwargs
    ends = [0, x.size(1)] if cu_seqlens is None else cu_seqlens.tolist()
    assert ends[-1] == x.size(1) and (len(ends) == 2 or x.size(0) == 1)
    starts = torch.tensor([low for low, high in zip(ends, ends[1:]) for _ in range(high - low)])
    found = torch.zeros_like(x)
    for back in range(weight.size(1)):
        shifted = F.pad(x, (0, 0, back, 0))[:, : x.size(1)]
        inside = (torch.arange(x.size(1)) - back >= starts).unsqueeze(-1)
        found = found + torch.where(inside, shifted, 0) * weight[:, weight.size(1) - 1 - back]
    found = found if bias is None else found + bias
    return (F.silu(found) if activation in ("silu", "swish") else found), None


def chunk_gated_delta_rule(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
    **kwargs,
):
    assert scale is None and not use_qk_l2norm_in_kernel and not kwargs
    assert all(tensor.is_contiguous() for tensor in (q, k, v, g, beta))
    assert initial_state is None or initial_state.dtype == torch.float32
    rows = (tensor.float() for tensor in (q, k, v))
    out, state = rule(
        *rows,
        g=g.float(),
        beta=beta.float(),
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )
    return out.to(v.dtype), state


MODULES = {
    "fla": {},
    "fla.modules": {},
    "fla.modules.l2norm": {"l2norm": l2norm},
    "fla.modules.convolution": {"causal_conv1d": causal_conv1d},
    "fla.ops": {},
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": chunk_gated_delta_rule},
}
for name, values in MODULES.items():
    module = ModuleType(name)
    module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
    vars(module).update(values)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)

"""Textbook attention: one process, float64, a dense mask, gradients by autograd. Deliberately slow and simple.

Shapes (sequence first)::

    query (seq, batch, heads, dk)   key (seq, batch, kv_heads, dk)   value (seq, batch, kv_heads, dv)
    allowed (batch or 1, seq_q, seq_k) bool, True = the query sees the key   sinks (heads,)
"""

import torch


def document_ids(cu_seqlens, seq_len):
    """(seq_len,), the index of each position's document, counting empty documents."""
    ids = torch.empty(seq_len, dtype=torch.long)
    for index, (start, stop) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
        ids[start:stop] = index
    return ids


def sliced_pairs(slices, seq_len):
    """Bool (seq_len, seq_len), by MagiAttention's definition of slices, with rows and columns counted within each."""
    seen = torch.zeros(seq_len, seq_len, dtype=torch.bool)
    for (q_start, q_stop), (k_start, k_stop), kind in slices:
        part = seen[q_start:q_stop, k_start:k_stop]
        rows, columns = part.shape
        i, j = torch.arange(rows)[:, None], torch.arange(columns)[None]
        ends_in_corner, begins_in_corner = j - i <= columns - rows, j >= i
        shows = {
            "full": torch.ones_like(part),
            "causal": ends_in_corner,
            "inverse": begins_in_corner,
            "band": ends_in_corner & begins_in_corner,
        }
        part |= shows[kind]
    return seen


def allowed_pairs(seq_len, *, causal=False, window=None, cu_seqlens=None, attention_mask=None, slices=None):
    """Bool (batch or 1, seq_len, seq_len), True where the query (row) may see the key (column).

    Args:
        causal: keys after the query are hidden.
        window: (left, right); a query at p sees keys p - left to p + right, None or -1 is unlimited.
        cu_seqlens: document boundaries with 0 and the total; nothing is seen across a boundary.
        attention_mask: bool, True = hidden, (seq, seq) or (batch, 1, seq, seq).
        slices: the visible pairs; None for all.
    """
    position = torch.arange(seq_len)
    offset = position[None, :] - position[:, None]
    allowed = torch.ones(seq_len, seq_len, dtype=torch.bool)
    if causal:
        allowed &= offset <= 0
    if window is not None:
        left, right = (None if side in (None, -1) else side for side in window)
        if left is not None:
            allowed &= offset >= -left
        if right is not None:
            allowed &= offset <= right
    if cu_seqlens is not None:
        ids = document_ids(cu_seqlens, seq_len)
        allowed &= ids[None, :] == ids[:, None]
    if slices is not None:
        allowed &= sliced_pairs(slices, seq_len)
    allowed = allowed[None]
    if attention_mask is not None:
        hidden = attention_mask[None] if attention_mask.dim() == 2 else attention_mask[:, 0]
        allowed = allowed & ~hidden
    return allowed


def attention(query, key, value, allowed, *, softmax_scale=None, sinks=None, keep=None):
    """Dense attention; a row that sees no key gives 0.

    Args:
        sinks: one extra logit per head, whose value vector is 0.
        keep: (batch, heads, seq_q, seq_k), factors for the probabilities after softmax (dropout: 0 or 1 / (1 - p)).

    Returns:
        (seq, batch, heads, dv) in the inputs' dtype.
    """
    heads, kv_heads = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    key, value = (tensor.repeat_interleave(heads // kv_heads, dim=2) for tensor in (key, value))
    seen = allowed[:, None]
    scores = torch.einsum("ibhd,jbhd->bhij", query, key) * scale
    scores = scores.masked_fill(~seen, 0.0)
    top = scores.detach().masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks.detach()[None, :, None, None].to(top.dtype))
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = (scores - top).clamp(max=0.0).exp() * seen
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks[None, :, None, None] - top).exp()
    probs = weights / total.masked_fill(total == 0, 1.0)
    if keep is not None:
        probs = probs * keep
    return torch.einsum("bhij,jbhd->ibhd", probs, value)


def attention_with_gradients(query, key, value, grad_out, allowed, *, softmax_scale=None, sinks=None, keep=None):
    """Dict of float64 tensors out, dq, dk, dv, and d_offset when there are sinks."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    names = ["dq", "dk", "dv"]
    if sinks is not None:
        sinks = sinks.detach().double().requires_grad_()
        leaves.append(sinks)
        names.append("d_offset")
    out = attention(*leaves[:3], allowed, softmax_scale=softmax_scale, sinks=sinks, keep=keep)
    grads = torch.autograd.grad(out, leaves, grad_out.double())
    return {"out": out.detach(), **dict(zip(names, grads))}

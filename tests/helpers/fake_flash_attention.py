"""CPU implementations of the CUDA attention operators, with torch's own schemas and the operators' restrictions.

``installed()`` implements aten._flash_attention_forward and _backward, and the two cuDNN operators, for CPU tensors; a
CPU build of torch has their schemas but no kernels. Shapes follow torch's meta registrations; windows and the causal
diagonal count from the lower right corner, as in FlashAttention-2.
"""

from contextlib import contextmanager

import torch


@contextmanager
def installed():
    """Context manager in which the four operators take CPU tensors; yields the list of calls (operator, is_varlen)."""
    library, calls = torch.library.Library("aten", "IMPL"), []
    try:
        for name, function in (
            ("_flash_attention_forward", _flash_forward),
            ("_flash_attention_backward", _flash_backward),
            ("_scaled_dot_product_cudnn_attention", _cudnn_forward),
            ("_scaled_dot_product_cudnn_attention_backward", _cudnn_backward),
        ):
            library.impl(name, _recorded(name, function, calls), "CPU")
        yield calls
    finally:
        library._destroy()


def _recorded(name, function, calls):
    def run(*args, **kwargs):
        calls.append((name, args[0].dim() == 3))
        return function(*args, **kwargs)

    return run


def require(condition, message):
    if not condition:
        raise RuntimeError(message)


def _check(query, key, value):
    for tensor in (query, key, value):
        require(tensor.dtype in (torch.float16, torch.bfloat16), "FlashAttention only supports fp16 and bf16")
        require(tensor.stride(-1) == 1, "the last dimension must be contiguous")
        require(tensor.shape[-1] % 8 == 0 and tensor.shape[-1] <= 256, "head dimension must be 8, 16, ... 256")
    require(query.shape[-1] == key.shape[-1] == value.shape[-1], "head dimensions must be equal")
    require(query.shape[-2] % key.shape[-2] == 0, "query heads must be a multiple of KV heads")


def _sequences(query, cum_seq_q, cum_seq_k, max_q, max_k):
    """(query rows, key rows) selectors: batch entries of a dense call, slices of a varlen call."""
    if cum_seq_q is None:
        require(query.dim() == 4, "a dense call takes (batch, seq, heads, dim)")
        return [(index, index) for index in range(query.shape[0])]
    require(query.dim() == 3, "a varlen call takes (rows, heads, dim)")
    spans = []
    for cumulative, longest in ((cum_seq_q, max_q), (cum_seq_k, max_k)):
        require(cumulative.dtype == torch.int32 and cumulative[0] == 0, "cum_seq must be int32 with a leading 0")
        ends = cumulative.tolist()
        require(longest == max(b - a for a, b in zip(ends, ends[1:])), "max_q and max_k must be the longest lengths")
        spans.append([slice(a, b) for a, b in zip(ends, ends[1:])])
    require(spans[0][-1].stop == query.shape[0], "cum_seq_q must end with the number of rows")
    return list(zip(*spans))


def _hidden(rows, cols, is_causal, left, right):
    offset = torch.arange(cols) - torch.arange(rows).unsqueeze(1) - (cols - rows)
    left, right = (None if side in (None, -1) else side for side in (left, right))
    hidden = torch.zeros(rows, cols, dtype=torch.bool)
    if is_causal:
        right = 0
    if left is not None:
        hidden |= offset < -left
    if right is not None:
        hidden |= offset > right
    return hidden


def _heads_first(tensor, group=1):
    return tensor.float().transpose(-3, -2).repeat_interleave(group, -3)


def _keep(shape, dropout_p, generator):
    if not dropout_p:
        return torch.ones(shape)
    return (torch.rand(shape, generator=generator) >= dropout_p) / (1 - dropout_p)


def _scores(query, key, scale, hidden):
    group = query.shape[-2] // key.shape[-2]
    return (_heads_first(query) @ _heads_first(key, group).transpose(-1, -2) * scale).masked_fill(hidden, -torch.inf)


def _attend(query, key, value, scale, hidden, dropout_p, generator):
    scores = _scores(query, key, scale, hidden)
    lse = scores.logsumexp(-1)
    probs = (scores - lse.unsqueeze(-1)).exp()
    out = (probs * _keep(probs.shape, dropout_p, generator)) @ _heads_first(value, query.shape[-2] // key.shape[-2])
    return out.transpose(-3, -2).to(query.dtype), lse


def _attend_backward(grad, query, key, value, out, lse, scale, hidden, dropout_p, generator):
    kv_heads, group = key.shape[-2], query.shape[-2] // key.shape[-2]
    probs = (_scores(query, key, scale, hidden) - lse.unsqueeze(-1)).exp()
    keep, g = _keep(probs.shape, dropout_p, generator), _heads_first(grad)
    delta = (g * _heads_first(out)).sum(-1, keepdim=True)
    dscores = probs * (keep * (g @ _heads_first(value, group).transpose(-1, -2)) - delta) * scale
    dq = dscores @ _heads_first(key, group)
    dk, dv = (
        part.unflatten(-3, (kv_heads, group)).sum(-3)
        for part in (dscores.transpose(-1, -2) @ _heads_first(query), (probs * keep).transpose(-1, -2) @ g)
    )
    return [part.transpose(-3, -2).to(query.dtype) for part in (dq, dk, dv)]


def _flash_forward(
    query,
    key,
    value,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    **others,
):
    _check(query, key, value)
    require(not any(others.values()), f"the fake does not compute {others}")
    seed, out, lse = int(torch.randint(1 << 31, ())), torch.empty_like(query), []
    generator = torch.Generator().manual_seed(seed)
    for q, k in _sequences(query, cum_seq_q, cum_seq_k, max_q, max_k):
        hidden = _hidden(query[q].shape[0], key[k].shape[0], is_causal, window_size_left, window_size_right)
        out[q], part = _attend(query[q], key[k], value[k], scale, hidden, dropout_p, generator)
        lse.append(part)
    lse = torch.stack(lse) if cum_seq_q is None else torch.cat(lse, dim=-1)
    state = torch.tensor([seed, 0], dtype=torch.uint64)
    return out, lse, state, torch.empty((), dtype=torch.uint64), query.new_empty(0)


def _flash_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    rng_state,
    unused,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
):
    _check(query, key, value)
    require(grad_out.dtype == out.dtype == query.dtype, "dout and out must have the dtype of query")
    require(grad_out.shape == out.shape == query.shape, "dout and out must have the shape of query")
    require(logsumexp.dtype == torch.float32 and logsumexp.is_contiguous(), "logsumexp must be contiguous float32")
    grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
    generator = torch.Generator().manual_seed(int(rng_state[0]))
    for q, k in _sequences(query, cum_seq_q, cum_seq_k, max_q, max_k):
        hidden = _hidden(query[q].shape[0], key[k].shape[0], is_causal, window_size_left, window_size_right)
        lse = logsumexp[q] if cum_seq_q is None else logsumexp[:, q]
        parts = _attend_backward(
            grad_out[q], query[q], key[k], value[k], out[q], lse, scale, hidden, dropout_p, generator
        )
        for grad, rows, part in zip(grads, (q, k, k), parts):
            grad[rows] = part
    return tuple(grads)


def _cudnn_forward(
    query,
    key,
    value,
    attn_bias,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    return_debug_mask=False,
    *,
    scale=None,
):
    require(attn_bias is None and compute_log_sumexp, "the fake computes logsumexp and no bias")
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    _check(q, k, v)
    seed = int(torch.randint(1 << 31, ()))
    hidden = _hidden(q.shape[1], k.shape[1], is_causal, None, None)
    out, lse = _attend(q, k, v, scale, hidden, dropout_p, torch.Generator().manual_seed(seed))
    return (
        out.transpose(1, 2),
        lse.unsqueeze(-1),
        None,
        None,
        q.shape[1],
        k.shape[1],
        torch.tensor(seed),
        torch.tensor(0),
        query.new_empty(0),
    )


def _cudnn_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    philox_seed,
    philox_offset,
    attn_bias,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    *,
    scale=None,
):
    tensors = [tensor.transpose(1, 2) for tensor in (grad_out, query, key, value, out)]
    require(logsumexp.shape == (*query.shape[:3], 1), "logsumexp must be (batch, heads, rows, 1)")
    require(logsumexp.dtype == torch.float32, "logsumexp must be float32")
    require((max_q, max_k) == (query.shape[2], key.shape[2]), "max_q and max_k must be the lengths")
    hidden = _hidden(query.shape[2], key.shape[2], is_causal, None, None)
    generator = torch.Generator().manual_seed(int(philox_seed))
    grads = _attend_backward(*tensors, logsumexp[..., 0], scale, hidden, dropout_p, generator)
    return tuple(grad.transpose(1, 2) for grad in grads)

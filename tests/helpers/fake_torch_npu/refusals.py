"""The operators' restrictions, from the published documentation and the tilings in the CANN kernels' sources.

Violations raise RuntimeError, as in torch_npu.
"""

import torch

LAYOUTS = {"BSH": 3, "SBH": 3, "BNSD": 4, "BSND": 4, "TND": 3}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEADS, MAX_HEAD_DIM, MAX_DOCUMENTS, MASK_SIZE = 256, 768, 1024, 2048
LARGEST_INT32 = 2147483647
MAX_ROWS = 1 << 20  # S, and T in TND


def require(condition, message):
    if not condition:
        raise RuntimeError(message)


def head_dims(a):
    """(head dimension of query, of value)."""
    if a.input_layout in ("BSH", "SBH"):
        head_dim = a.query.shape[-1] // a.head_num
        return head_dim, a.value.shape[-1] // (a.key.shape[-1] // head_dim)
    return a.query.shape[-1], a.value.shape[-1]


def kv_head_num(a):
    if a.input_layout in ("BSH", "SBH"):
        return a.key.shape[-1] // (a.query.shape[-1] // a.head_num)
    return a.key.shape[{"BNSD": 1, "BSND": 2, "TND": 1}[a.input_layout]]


def check_attention(a):
    _check_tensors(a)
    _check_heads(a)
    require(0 < a.keep_prob <= 1, f"keep_prob {a.keep_prob} must lie in (0, 1]")
    require(a.softmax_layout in ("", "TND"), f"softmax_layout {a.softmax_layout!r} must be TND or empty")
    require(not a.softmax_layout or a.input_layout == "TND", "softmax_layout is for input_layout TND only")
    require(not a.softmax_layout or a.cann >= (8, 3), "softmax_layout is not supported")  # op-plugin's own message
    for name in ("pse", "padding_mask", "prefix", "sink", "dropout_mask"):
        require(getattr(a, name, None) is None, f"the fake torch_npu does not compute {name}")
    if a.input_layout == "TND":
        _check_documents(a)
    else:
        require(a.actual_seq_qlen is None and a.actual_seq_kvlen is None, "actual_seq_qlen is for TND only")
    extents = _extents(a)
    require(max(map(max, extents)) <= MAX_ROWS, f"S must not exceed {MAX_ROWS}")
    if a.input_layout == "TND":
        require(max(a.query.shape[0], a.key.shape[0]) <= MAX_ROWS, f"T must not exceed {MAX_ROWS}")
        require(all(cols for rows, cols in extents if rows), "a document with query rows must have key rows")
    _check_mask(a, extents)


def check_gradient(a, uninitialised):
    check_attention(a)
    if a.keep_prob == 1:
        garbage = {a.seed, a.offset, a.numels} & set(uninitialised)
        require(not garbage, "seed, offset and numels of a forward pass without dropout are uninitialised")
    packed = a.input_layout == "TND"
    rows = (a.query.shape[0], a.head_num) if packed else (_batch(a), a.head_num, _extents(a)[0][0])
    for name in ("softmax_max", "softmax_sum"):
        statistic = getattr(a, name)
        require(statistic is not None, f"{name} is needed")
        require(statistic.dtype == torch.float32, f"{name} must be float32")
        shape = tuple(statistic.shape)
        require(shape == (*rows, 8), f"{name} has shape {shape}, must be {(*rows, 8)}")
        lanes = statistic.nan_to_num(nan=-1e38)  # NaN lanes are equal too
        equal = torch.equal(lanes, lanes[..., :1].expand_as(lanes))
        require(equal, f"the eight lanes of {name} must be equal")
    require(a.attention_in is not None, "attention_in is needed")
    head_dim, value_dim = head_dims(a)
    out_shape = list(a.query.shape)
    out_shape[-1] = out_shape[-1] // head_dim * value_dim
    for name in ("attention_in", "dy"):
        tensor = getattr(a, name)
        require(tensor.dtype == a.query.dtype, f"{name} must have the dtype of query")
        require(list(tensor.shape) == out_shape, f"{name} has shape {tuple(tensor.shape)}, must be {tuple(out_shape)}")


def check_ring_update(a):
    require(a.input_layout in ("SBH", "TND"), f"input_layout {a.input_layout} must be SBH or TND")
    require(a.input_softmax_layout in ("", "SBH", "TND"), f"input_softmax_layout {a.input_softmax_layout!r} is unknown")
    out, statistics = a.prev_attn_out, (a.prev_softmax_max, a.prev_softmax_sum, a.cur_softmax_max, a.cur_softmax_sum)
    require(out.dtype in DTYPES and a.cur_attn_out.dtype == out.dtype, "both outputs must share a documented dtype")
    require(a.cur_attn_out.shape == out.shape and out.dim() == 3, "both outputs must share a three-dimensional shape")
    require(all(s.dtype == torch.float32 for s in statistics), "statistics must be float32")
    require(len({s.shape for s in statistics}) == 1, "statistics must share one shape")
    shape = statistics[0].shape
    if a.input_layout == "SBH":
        fits = len(shape) == 4 and (shape[2], shape[0], shape[3]) == (out.shape[0], out.shape[1], 8)
        require(fits and out.shape[2] % shape[1] == 0, f"statistics {tuple(shape)} do not fit SBH {tuple(out.shape)}")
    else:
        given = a.actual_seq_qlen is not None and a.actual_seq_qlen.dtype == torch.int64
        require(given, "TND needs actual_seq_qlen, int64")
        require(tuple(shape) == (*out.shape[:2], 8), f"statistics {tuple(shape)} do not fit TND {tuple(out.shape)}")
        require(out.shape[1] <= MAX_HEADS, f"TND takes at most {MAX_HEADS} heads")
        require(out.shape[2] % 64 == 0, "TND takes head dimensions that 64 divides")
    require(all(torch.isfinite(s).all() for s in statistics), "statistics must be finite")
    require(all((s > 0).all() for s in statistics[1::2]), "sums must be positive")


def _check_tensors(a):
    require(a.input_layout in LAYOUTS, f"input_layout {a.input_layout} must be one of {', '.join(LAYOUTS)}")
    for name in ("query", "key", "value"):
        tensor = getattr(a, name)
        require(tensor.dtype in DTYPES, f"{name} is {tensor.dtype}; must be float16, bfloat16 or float32")
        require(tensor.dtype == a.query.dtype, f"{name} must have the dtype of query")
        require(tensor.dim() == LAYOUTS[a.input_layout], f"{name} has {tensor.dim()} dimensions in {a.input_layout}")
        require(tensor.numel() > 0, f"{name} is empty; lengths start at 1")


def _check_heads(a):
    require(1 <= a.head_num <= MAX_HEADS, f"head_num {a.head_num} must lie in 1 to {MAX_HEADS}")
    if a.input_layout in ("BSH", "SBH"):
        require(a.query.shape[-1] % a.head_num == 0, "the hidden size of query must divide by head_num")
        head_dim = a.query.shape[-1] // a.head_num
        require(a.key.shape[-1] % head_dim == 0, "query and key must have the same head dimension")
        require(a.value.shape[-1] % (a.key.shape[-1] // head_dim) == 0, "key and value must have the same heads")
    else:
        dim = {"BNSD": 1, "BSND": 2, "TND": 1}[a.input_layout]
        require(a.query.shape[dim] == a.head_num, f"head_num {a.head_num} is not query's {a.query.shape[dim]}")
        require(a.key.shape[dim] == a.value.shape[dim], "key and value must have the same heads")
        require(a.query.shape[-1] == a.key.shape[-1], "query and key must have the same head dimension")
    require(a.head_num % kv_head_num(a) == 0, f"head_num {a.head_num} must be a multiple of {kv_head_num(a)} KV heads")
    head_dim, value_dim = head_dims(a)
    require(head_dim >= value_dim, f"the head dimension of value, {value_dim}, must not exceed key's {head_dim}")
    require(head_dim <= MAX_HEAD_DIM, f"head dimension {head_dim} must not exceed {MAX_HEAD_DIM}")


def _check_documents(a):
    for name, total in (("actual_seq_qlen", a.query.shape[0]), ("actual_seq_kvlen", a.key.shape[0])):
        ends = getattr(a, name)
        require(ends, f"{name} is needed in TND")
        require(all(low <= high for low, high in zip([0, *ends], ends)), f"{name} must not decrease")
        require(ends[-1] == total, f"{name} ends at {ends[-1]}, the tensor has {total} rows")
        require(len(ends) <= MAX_DOCUMENTS, f"{name} has {len(ends)} entries, at most {MAX_DOCUMENTS}")
        # Legal for the operator (an empty first document), but always a sign of cu_seqlens passed unchanged.
        require(ends[0] > 0, f"{name} must not begin with 0")
    require(len(a.actual_seq_qlen) == len(a.actual_seq_kvlen), "both lists of lengths must have as many entries")
    require(a.key.shape[0] == a.value.shape[0], "key and value must have the same rows")


def _batch(a):
    return a.query.shape[1 if a.input_layout == "SBH" else 0]


def _extents(a):
    """(query rows, key rows) of every sequence."""
    if a.input_layout == "TND":
        both = (a.actual_seq_qlen, a.actual_seq_kvlen)
        return list(zip(*([high - low for low, high in zip([0, *ends], ends)] for ends in both)))
    dim = {"BSH": 1, "SBH": 0, "BNSD": 2, "BSND": 1}[a.input_layout]
    batch_dim = 1 if a.input_layout == "SBH" else 0
    require(a.query.shape[batch_dim] == a.key.shape[batch_dim] == a.value.shape[batch_dim], "batch sizes must be equal")
    require(a.key.shape[dim] == a.value.shape[dim], "key and value must have the same rows")
    return [(a.query.shape[dim], a.key.shape[dim])]


def _check_mask(a, extents):
    require(0 <= a.sparse_mode <= (8 if a.input_layout == "TND" else 6), f"sparse_mode {a.sparse_mode} is out of range")
    require(a.sparse_mode <= 4, f"the fake torch_npu does not compute sparse_mode {a.sparse_mode}")
    if a.atten_mask is None:
        return
    mask = a.atten_mask
    require(mask.dtype in (torch.bool, torch.uint8), f"atten_mask is {mask.dtype}; must be bool or uint8")
    if a.sparse_mode in (2, 3, 4):
        require(
            tuple(mask.shape) == (MASK_SIZE, MASK_SIZE),
            f"sparse_mode {a.sparse_mode} takes the compressed mask "
            f"of {MASK_SIZE} x {MASK_SIZE}, got {tuple(mask.shape)}",
        )
        require(_is_triangle(mask), "the compressed mask is not a triangle")
        if a.sparse_mode == 3:
            require(all(rows <= cols for rows, cols in extents), "sparse_mode 3 needs as many key rows as query rows")
        if a.sparse_mode == 4:
            _check_band(a, extents)
        return
    rows, cols = max(q for q, _ in extents), max(k for _, k in extents)
    allowed = [(rows, cols)]
    if a.input_layout != "TND":
        allowed += [(*leading, rows, cols) for leading in ((1, 1), (_batch(a), 1), (_batch(a), a.head_num))]
    require(tuple(mask.shape) in allowed, f"atten_mask {tuple(mask.shape)} must be one of {allowed}")
    if a.input_layout == "TND":
        require(not mask.bool().all(-1).any(), "atten_mask must not hide a whole row in TND")


_triangles = set()  # (address, version) of masks known to be the triangle, whose four million elements are checked once


def _is_triangle(mask):
    seen = (mask.data_ptr(), mask._version)
    if seen not in _triangles and torch.equal(mask.bool(), torch.ones_like(mask, dtype=torch.bool).triu(1)):
        _triangles.add(seen)
    return seen in _triangles


def _check_band(a, extents):
    for name in ("pre_tockens", "next_tockens"):
        require(getattr(a, name) >= 0, f"a band with a negative {name} is refused")
    total = a.pre_tockens + a.next_tockens
    require(total <= LARGEST_INT32, f"pre_tockens + next_tockens is {total}, which one template adds in int32")

"""Summing low-precision parts into an accumulator of higher precision, without a converted copy of the whole part."""

CHUNK_ELEMENTS = 1 << 16  # a converted chunk of 256 KiB stays in a core's second-level cache


def row_chunks(tensor):
    """Slices of the first dimension that cover the tensor in pieces of about CHUNK_ELEMENTS; one piece off the CPU.

    Off the CPU a conversion is part of the arithmetic kernel and small launches would cost more.
    """
    rows = tensor.shape[0]
    if tensor.device.type != "cpu" or tensor.numel() <= CHUNK_ELEMENTS:
        return [slice(0, rows)]
    step = max(1, CHUNK_ELEMENTS * rows // tensor.numel())
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def add_in_place(total, part):
    """total += part; both (seq, ...), part in the same or a lower precision."""
    if part.dtype == total.dtype:
        total.add_(part)
        return
    # On the CPU a mixed addition converts its whole operand into fresh memory first; page faults dominate it.
    for rows in row_chunks(total):
        total[rows].add_(part[rows].to(total.dtype))

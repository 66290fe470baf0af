"""Lengths of --variable-seq-lengths; apart, so that it can be imported without Megatron."""


def micro_batch_length(index, seq_length):
    """A length of its own for every micro batch, between half of ``seq_length`` and all of it, mostly indivisible."""
    return seq_length - (index * index * 11 + index * 13 + 3) % max(seq_length // 2 - 1, 1)

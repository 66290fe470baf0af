"""Slices for tests: random ones, common masks, and the configurations that MagiAttention tests."""

from reference import sliced_pairs

KINDS = ("full", "causal", "inverse", "band")


def drawn_slices(rng, seq_len):
    """Disjoint random slices: a grid of ranges, each cell of which may be a slice of any kind; or arbitrary slices
    without those that overlap an earlier one. In random order; some may be empty.
    """
    if rng.random() < 0.5:
        rows, columns = (sorted(rng.randint(0, seq_len) for _ in range(rng.randint(2, 6))) for _ in "qk")
        cells = [(q, k, rng.choice(KINDS)) for q in zip(rows, rows[1:]) for k in zip(columns, columns[1:])]
        return tuple(rng.sample(cells, rng.randint(0, len(cells))))
    taken, kept = sliced_pairs((), seq_len), []
    for _ in range(rng.randint(0, 8)):
        ranges = (tuple(sorted((rng.randint(0, seq_len), rng.randint(0, seq_len)))) for _ in "qk")
        each = (*ranges, rng.choice(KINDS))
        pairs = sliced_pairs([each], seq_len)
        if not (pairs & taken).any():
            taken |= pairs
            kept.append(each)
    return tuple(kept)


# Common masks on 40 tokens.
PREFIX = (((0, 13), (0, 13), "full"), ((13, 40), (0, 40), "causal"))
IMAGES = (  # 5 to 15 and 22 to 29 see each other inside causal text
    ((0, 5), (0, 5), "causal"),
    ((5, 15), (0, 15), "full"),
    ((15, 22), (0, 22), "causal"),
    ((22, 29), (0, 29), "full"),
    ((29, 40), (0, 40), "causal"),
)
VIDEO = tuple(((frame, frame + 8), (0, frame + 8), "full") for frame in range(0, 40, 8))
TREE = (  # a prompt of 10 and two answers; the second branches again at 30
    ((0, 10), (0, 10), "causal"),
    ((10, 40), (0, 10), "full"),
    ((10, 20), (10, 20), "causal"),
    ((20, 30), (20, 30), "causal"),
    ((30, 40), (20, 30), "full"),
    ((30, 34), (30, 34), "causal"),
    ((34, 40), (34, 40), "causal"),
)
WINDOWS = (((0, 20), (0, 24), "band"), ((25, 40), (30, 40), "inverse"))  # 20 to 25 see nothing
NAMED = {"prefix": PREFIX, "images": IMAGES, "video": VIDEO, "tree": TREE, "windows": WINDOWS}


def _slices(unit, *given):
    """((first query, last + 1), (first key, last + 1), number of the kind) with lengths in units."""
    kinds = ("full", "causal", "inverse", "band")  # MagiAttention's 0, 1, 2, 3
    return tuple(((q[0] // unit, q[1] // unit), (k[0] // unit, k[1] // unit), kinds[kind]) for q, k, kind in given)


_BI_CAUSAL_QUERIES = [(n * 2048, (n + 1) * 2048) for n in range(6)] + [(1000, 4000), (10000, 12000)]
_BI_CAUSAL_KEYS = [
    (0, 3072), (0, 4096), (0, 6144), (6144, 12288), (8192, 12288), (9216, 12288), (8000, 12000), (0, 5000)
]  # fmt: skip
_FIRST, _LAST = (0, 2048), (8192, 10240)
# Names, ranges and kinds of SandAI-org/MagiAttention, tests/test_pipeline.py: facts, lengths divided to be short.
MAGI_ATTENTION = {
    "full_attn_14k": (28, _slices(512, ((0, 14336), (0, 14336), 0))),
    "varlen_full_attn_12k": (24, _slices(512, *(((n, n + 2048), (n, n + 2048), 0) for n in range(0, 12288, 2048)))),
    "varlen_block_causal_15k": (
        30,
        _slices(
            512,
            *(((n, n + 2048), (0, n + 2048), 0) for n in range(0, 8192, 2048)),
            ((8192, 10240), (8192, 10240), 0),
            ((10240, 12288), (8192, 12288), 0),
            ((12288, 15360), (12288, 15360), 0),
        ),
    ),
    "varlen_block_causal_12k_with_q_overlap": (
        24,
        _slices(
            512,
            *(((n, 8192), (n, n + 2048), 0) for n in range(0, 8192, 2048)),
            *(((n, 12288), (n, n + 2048), 0) for n in range(8192, 12288, 2048)),
        ),
    ),
    "bi_causal_12k_with_q_overlap": (
        96,
        _slices(128, *((q, k, 3) for q, k in zip(_BI_CAUSAL_QUERIES, _BI_CAUSAL_KEYS))),
    ),
    "continuous_multi_masks_10k_with_q_overlap": (
        40,
        _slices(
            256,
            (_FIRST, (0, 2048), 2),
            (_FIRST, (2048, 4096), 0),
            (_FIRST, (4096, 6144), 1),
            (_FIRST, (6144, 10240), 3),
            ((2048, 4096), (0, 2048), 2),
            ((3072, 5120), (2048, 4096), 1),
            ((5120, 7168), (0, 2048), 2),
            ((6144, 8192), (2048, 4096), 1),
            (_LAST, (0, 2048), 2),
            (_LAST, (2048, 4096), 0),
            (_LAST, (4096, 6144), 1),
            (_LAST, (6144, 10240), 3),
        ),
    ),
    "full_mask_assembled_from_samll_pieces_with_8k": (
        32,
        _slices(
            256,
            *(((q, q + 512), (k, k + 1024), 0) for q in range(0, 8192, 512) for k in range(0, 8192, 1024)),
        ),
    ),
}
# tests/test_dispatch/test_calc_self_attn_areas.py: (slices, length of a chunk, area of the queries of every chunk)
MAGI_ATTENTION_AREAS = (
    (
        _slices(
            1,
            ((0, 10), (0, 11), 0),
            ((10, 16), (5, 18), 1),
            ((16, 30), (18, 32), 1),
            ((30, 43), (32, 45), 1),
            ((43, 61), (45, 64), 0),
            ((61, 64), (53, 64), 0),
        ),
        8,
        (88, 85, 36, 72, 52, 131, 152, 128),
    ),
    (
        _slices(
            1,
            ((0, 2), (0, 2), 1),
            ((2, 5), (2, 5), 1),
            ((5, 8), (5, 8), 1),
            ((8, 10), (8, 16), 0),
            ((10, 14), (8, 16), 1),
            ((14, 16), (8, 16), 1),
            ((16, 22), (4, 20), 1),
            ((22, 29), (17, 24), 1),
            ((29, 32), (19, 31), 0),
        ),
        8,
        (15, 57, 84, 61),
    ),
)

"""The index of a Megatron dataset, PREFIX.idx: the dtype of its tokens, and lengths and offsets of its sequences."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, type of the tokens, sequences, documents
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}  # Megatron's codes


@dataclass(frozen=True)
class Index:
    """Args:
    dtype: dtype of the tokens. lengths: int32 (sequences,), tokens of each. places: int64 (sequences,), byte offset
        of each in PREFIX.bin.
    """

    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    places: NDArray[np.int64]


def read_index(path: str | Path) -> Index:
    """Read and check the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not valid; the message continues a sentence about it, such as "is empty".
    """
    data = Path(path).read_bytes()
    _require(len(data) > 0, "is empty")
    _require(data.startswith(MAGIC), "does not begin as Megatron's index files do (wrong magic)")
    _require(len(data) >= HEADER.size, f"ends within its header ({len(data)} of {HEADER.size} bytes)")
    _, version, code, sequences, documents = HEADER.unpack_from(data)
    _require(version == 1 and code in DTYPES, f"has version {version} and type code {code}")
    needed = HEADER.size + 12 * sequences + 8 * documents
    _require(len(data) >= needed, f"is truncated: {len(data):,} of {needed:,} bytes")
    lengths = np.frombuffer(data, "<i4", sequences, HEADER.size)
    _require(documents > 1 and int(lengths.sum(dtype=np.int64)) > 0, "counts no documents")
    places = np.frombuffer(data, "<i8", sequences, HEADER.size + 4 * sequences)
    return Index(np.dtype(DTYPES[code]), lengths, places)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)

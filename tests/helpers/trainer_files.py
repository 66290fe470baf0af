"""Write datasets and checkpoints without torch and Megatron, for tests of the trainer's messages."""

import struct
from pathlib import Path

from trainer.checkpoint_files import MODEL, PARALLEL, Checkpoint, complete, digest_of, now, prepare


def write_dataset(prefix, lengths=(5, 60, 35), version=1, magic=b"MMIDIDX\x00\x00"):
    """Write PREFIX.bin and PREFIX.idx in Megatron's format, with uint16 tokens below 256; returns the prefix as str."""
    places = [2 * sum(lengths[:index]) for index in range(len(lengths))]
    header = magic + struct.pack("<QBQQ", version, 8, len(lengths), len(lengths) + 1)
    body = struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *places)
    Path(f"{prefix}.idx").write_bytes(header + body + struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1)))
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{sum(lengths)}H", *(i % 256 for i in range(sum(lengths)))))
    return str(prefix)


def write_checkpoint(folder, iteration, args, keep_last=None):
    """Write a complete checkpoint of two shards, whose record contains the settings of the namespace ``args``."""
    name = prepare(str(folder), iteration)
    path = Path(folder, name)
    for shard in ("__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt"):
        Path(path, shard).write_bytes(f"{shard} of step {iteration} ".encode() * 100)
    files = {file.name: [file.stat().st_size, digest_of(file)] for file in path.iterdir()}
    model, parallel = ({key: getattr(args, key) for key in names} for names in (MODEL, PARALLEL))
    complete(Checkpoint(str(folder), name, iteration, now(), model, parallel, files), keep_last)
    return path

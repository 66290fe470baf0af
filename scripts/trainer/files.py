"""Check the files that flags name before any process group exists: the dataset, folders to write to, the checkpoint to
resume from.
"""

import importlib.util
import json
import tempfile
from pathlib import Path

import numpy as np

from mindspeed_cp.planner.documents import read_index
from mindspeed_cp.settings.rules import require
from trainer.checkpoint_files import Checkpoint, find_checkpoint, last_changed
from trainer.checks import of_same_name
from trainer.texts import ENDINGS, EOD

LOOKED_AT = 1 << 23  # number of tokens that are compared with the vocabulary size: all of a small dataset


def check_files(args) -> Checkpoint | None:
    """Check every path in the flags; returns the checkpoint to resume from, None to start from scratch.

    Raises:
        ValueError: a file is missing or damaged, or a folder cannot be written to.
    """
    require(
        args.data_path is not None,
        "--data-path is not given, and training needs a dataset; make one of your text with: python "
        "scripts/prepare_data.py --input FILE --output PREFIX, or of Python's help with --output data/topics alone, "
        "then use --data-path with that prefix.",
    )
    check_dataset(args.data_path, args.vocab_size)
    args.eod = end_of_document(args.data_path)
    fused_adam = any(importlib.util.find_spec(name) for name in ("apex", "transformer_engine"))
    require(
        fused_adam or not args.use_distributed_optimizer or not (args.save or args.load),
        "--use-distributed-optimizer does not go with --save or --load on this machine: megatron-core stores its state "
        "for the Adam of apex or Transformer Engine alone; leave --use-distributed-optimizer out, or install apex.",
    )
    checkpoint = find_checkpoint(args.load, args.save) if args.load is not None else None
    if checkpoint is not None:
        checkpoint.check(args)
    _check_writable(args)
    return checkpoint


def _check_writable(args):
    for name, folder in of_same_name(args, "save tensorboard_dir data_cache_path").items():
        if folder is not None:
            _try_to_write("--" + name.replace("_", "-"), folder, Path(folder))
    if args.log_file is not None:
        require(
            not Path(args.log_file).is_dir(),
            f"--log-file {args.log_file} is a folder, and the log is a file in it; use --log-file "
            f"{Path(args.log_file, 'run.jsonl')}.",
        )
        _try_to_write("--log-file", args.log_file, Path(args.log_file).parent)
    if args.data_cache_path is None and not any(Path(args.data_path, "cache", "GPTDataset_indices").glob("*.npy")):
        # Megatron writes its index caches to a folder named like the dataset.
        _try_to_write("--data-path", args.data_path, Path(args.data_path), "give a folder for the index caches by "
                      "--data-cache-path")  # fmt: skip


def _try_to_write(flag, value, folder, way_out="give a folder that can be written to"):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        raise ValueError(f"{flag} {value} cannot be written to ({error.strerror}); {way_out}.") from None


def check_dataset(prefix: str, vocab_size: int) -> None:
    """Raise ValueError unless PREFIX.idx is a complete Megatron index that fits PREFIX.bin and ``vocab_size``.

    Only the first 8 million tokens are read; the sizes of both files are always checked.
    """
    _check_prefix(prefix)
    tokens, indices = Path(prefix + ".bin"), Path(prefix + ".idx")
    try:
        index = read_index(indices)
    except ValueError as error:
        raise _damaged(prefix, indices, str(error)) from None
    size, end = tokens.stat().st_size, int((index.places + index.lengths.astype(np.int64) * index.dtype.itemsize).max())
    if size < end or int(index.places.min()) < 0 or int(index.lengths.min()) < 0:
        raise _damaged(prefix, tokens, f"holds {size:,} bytes, and {indices} counts {end:,}")
    largest = int(np.fromfile(tokens, index.dtype, LOOKED_AT).max())
    require(
        largest < vocab_size,
        f"--vocab-size {vocab_size} is too small for --data-path {prefix}, which holds the token {largest}; use "
        f"--vocab-size {largest + 1}.",
    )


def _check_prefix(prefix):
    """Raise ValueError unless both files exist; the message distinguishes texts and folders from a prefix."""
    given, own = Path(prefix), f"data/{Path(prefix).stem}"
    missing = next((prefix + ending for ending in (".bin", ".idx") if not Path(prefix + ending).is_file()), None)
    if given.is_file() or given.is_dir() and missing:
        what = f"a {given.suffix or 'plain'} file" if given.is_file() else "a folder"
        way_out = f"use --data-path {given.with_suffix('')}"
        if given.is_dir() or given.suffix in ENDINGS:
            made = f"python scripts/prepare_data.py --input {prefix} --output {own}"
            way_out = f"make one of it with: {made}, then use --data-path {own}"
        raise ValueError(f"--data-path {prefix} is {what}, not the prefix of a dataset; {way_out}.")
    require(
        missing is None,
        f"--data-path {prefix}: the file {missing} does not exist; make it of your text with: python "
        f"scripts/prepare_data.py --input FILE --output {prefix}",
    )


def _damaged(prefix, path, what):
    return ValueError(
        f"--data-path {prefix}: {path} {what} ({last_changed(path)}); write the dataset again, such as by: "
        f"python scripts/prepare_data.py --input FILE --output {prefix}"
    )


def end_of_document(prefix: str) -> int:
    """The end-of-document token from the file that prepare_data.py wrote with the dataset, else that of byte tokens.

    Raises:
        ValueError: the file cannot be read.
    """
    path = Path(prefix + ".json")
    if not path.is_file():
        return EOD
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["eod"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"--data-path {prefix}: {path} names no end-of-document token; write the dataset again."
        ) from None


def drop_broken_caches(args) -> None:
    """Remove index caches that an interrupted run left incomplete, and those of a dataset that was rewritten since,
    because Megatron would use both. One rank calls this before datasets are built.
    """
    folder = Path(args.data_cache_path or Path(args.data_path, "cache", "GPTDataset_indices"))
    written = Path(args.data_path + ".idx").stat().st_mtime
    for path in folder.glob("*.npy"):
        try:
            np.load(path, mmap_mode="r")
            stale = args.data_cache_path is None and path.stat().st_mtime < written
        except (OSError, ValueError, EOFError):
            stale = True
        if stale:
            path.unlink()

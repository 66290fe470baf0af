"""Checkpoints as files: which is the latest, whether it is complete, which may be removed. Needs no torch and no ranks.

FOLDER/latest.txt                    name of the latest complete checkpoint
FOLDER/iter_0000040/checkpoint.json  written last: step, time, settings, size and SHA-256 of every file
                   /...              Megatron's torch_dist format, and each rank's random state

torch's reader detects neither a truncated shard nor changed bytes in it, and safetensors has no checksum either.
"""

import hashlib
import json
import os
import re
import shutil
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LATEST, RECORD = "latest.txt", "checkpoint.json"
NAME = re.compile(r"iter_([0-9]{7,})")
# Flags that determine the weights; a checkpoint fits a run with the same values.
MODEL = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "group_query_attention",
    "num_query_groups", "position_embedding_type", "normalization", "swiglu", "add_bias_linear", "add_qkv_bias",
    "untie_embeddings_and_output_weights", "vocab_size",
)  # fmt: skip
PARALLEL = (
    "world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
    "num_virtual_stages_per_pipeline_rank",
)  # fmt: skip


def settings_of(args: Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """(flags of the model, parallel sizes) that a checkpoint's record contains."""
    model, parallel = ({name: getattr(args, name) for name in names} for names in (MODEL, PARALLEL))
    return model, parallel


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Args:
        folder: the folder of --load or --save, which contains ``name``.
        saved_at: local time at which it was completed.
        model, parallel: flags of the run that wrote it.
        files: name -> [size in bytes, SHA-256]; empty for one of version 0.1.0, which kept no record.
    """

    folder: str
    name: str
    iteration: int
    saved_at: str = "an unknown time"
    model: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return Path(self.folder, self.name)

    @classmethod
    def read(cls, folder: str, name: str) -> "Checkpoint":
        """Read its record; raises a ValueError that says what is damaged."""
        record = Path(folder, name, RECORD)
        try:
            return cls(folder, name, **json.loads(record.read_text(encoding="utf-8")))
        except FileNotFoundError:
            if all(Path(folder, name, part).is_file() for part in (".metadata", "common.pt")):
                return cls(folder, name, int(name[5:]))
            raise ValueError(f"{record.parent} is incomplete: its run ended while it was written") from None
        except (OSError, ValueError, TypeError):
            raise ValueError(f"{record} is damaged ({last_changed(record)})") from None

    def damaged(self, names: Iterable[str], digests: bool) -> list[str]:
        """What is wrong with the files ``names``, by their sizes, and with ``digests`` by their checksums."""
        wrong = []
        for name in names:
            path, (size, digest) = Path(self.path, name), self.files[name]
            if not path.is_file():
                wrong.append(f"{path} is missing")
            elif path.stat().st_size != size:
                wrong.append(f"{path} has {path.stat().st_size:,} bytes of {size:,} ({last_changed(path)})")
            elif digests and digest_of(path) != digest:
                wrong.append(f"{path} does not contain the bytes that were written ({last_changed(path)})")
        return wrong

    def check(self, args: Namespace) -> None:
        """Raise ValueError unless its files have the right sizes and it fits the flags."""
        if wrong := self.damaged(sorted(self.files), digests=False):
            raise ValueError(self.describe_damage(wrong))
        for name, value in self.model.items():
            if getattr(args, name) != value:
                given, kept = _as_flag(name, getattr(args, name)), _as_flag(name, value)
                raise ValueError(f"{given} does not fit the checkpoint of --load {self.folder}, which was trained with "
                                 f"{kept}; use {kept}, or another --load.")  # fmt: skip
        if self.iteration > args.train_iters:
            raise ValueError(
                f"--train-iters {args.train_iters} is fewer than the {self.iteration} steps that the checkpoint of "
                f"--load {self.folder} has behind it; use --train-iters {self.iteration + args.train_iters}, or "
                "another --load."
            )

    def describe_damage(self, wrong: list[str]) -> str:
        """One line that says what is damaged, since when, and which checkpoint is the last good one."""
        more = f", and {len(wrong) - 1} more files" if len(wrong) > 1 else ""
        return (
            f"--load {self.folder}: {wrong[0]}{more}; the checkpoint was whole when it was saved at {self.saved_at}; "
            f"{_way_back(self.folder, self.name)}."
        )


def find_checkpoint(load: str, save: str | None) -> Checkpoint | None:
    """The checkpoint that latest.txt of ``load`` names; None if ``save`` is the same folder and has none yet.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    latest, name = Path(load, LATEST), ""
    if latest.is_file():
        name = latest.read_bytes().decode("utf-8", "replace").strip()
        wrong = f"{latest} names {name!r}, which is not a checkpoint" if name else f"{latest} is empty"
        wrong += f" ({last_changed(latest)})"
    elif save and Path(save).resolve() == Path(load).resolve() and not any(_whole_ones(load)):
        return None
    else:
        wrong = f"there is no {latest}"
    if NAME.fullmatch(name):
        try:
            if Path(load, name).is_dir():
                return Checkpoint.read(load, name)
            wrong = f"{latest} names {name}, which does not exist"
        except ValueError as error:
            wrong = str(error)
    raise ValueError(f"--load {load}: {wrong}; {_way_back(load, name)}.")


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` always has either the old or the complete new text, even after a crash."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def prepare(folder: str, iteration: int) -> str:
    """Create the empty folder of a new checkpoint, replacing one of the same step; returns its name."""
    name = f"iter_{iteration:07d}"
    _remove(Path(folder, name))
    Path(folder, name).mkdir(parents=True)
    return name


def complete(checkpoint: Checkpoint, keep_last: int | None) -> None:
    """Write its record, make it the latest, and remove the checkpoints beyond --keep-last."""
    record = asdict(checkpoint)
    del record["folder"], record["name"]
    write_atomically(Path(checkpoint.path, RECORD), json.dumps(record, indent=1))
    write_atomically(Path(checkpoint.folder, LATEST), checkpoint.name)
    if keep_last is not None:
        done = [name for name in _names(checkpoint.folder) if int(name[5:]) <= checkpoint.iteration]
        for name in done[keep_last:]:
            _remove(Path(checkpoint.folder, name))


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def last_changed(path: Path) -> str:
    return "last changed " + time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))


def _remove(path: Path) -> None:
    """Remove a checkpoint so that, if interrupted, the rest does not look complete."""
    for name in (RECORD, ".metadata"):
        Path(path, name).unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)


def _names(folder: str) -> list[str]:
    """Names of the checkpoints in ``folder``, the newest first."""
    found = [path.name for path in Path(folder).glob("iter_*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=lambda name: int(name[5:]), reverse=True)


def _whole_ones(folder: str, digests: bool = False, but: str = "") -> Iterator[Checkpoint]:
    """The complete checkpoints, the newest first."""
    for name in _names(folder):
        if name == but:
            continue
        try:
            found = Checkpoint.read(folder, name)
        except ValueError:
            continue
        if not found.damaged(found.files, digests):
            yield found


def _way_back(folder: str, damaged: str) -> str:
    """How to resume from the newest checkpoint whose checksums are right."""
    if good := next(_whole_ones(folder, digests=True, but=damaged), None):
        return (
            f"the last good one is {good.name}, saved at {good.saved_at}: go on from it with: echo {good.name} > "
            f"{Path(folder, LATEST)}"
        )
    if not _names(folder):
        return "give the folder that --save wrote, or leave --load out"
    return "no other checkpoint in it is complete; leave --load out to start again, or restore the folder from a copy"


def _as_flag(name: str, value: Any) -> str:
    flag = "--" + name.replace("_", "-")
    if name == "add_bias_linear":
        flag, value = "--disable-bias-linear", not value
    if isinstance(value, bool):
        return flag if value else f"no {flag}"
    return f"no {flag}" if value is None else f"{flag} {value}"

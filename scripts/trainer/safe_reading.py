"""Read a checkpoint without running code from it: only tensors, plain values and torch's own metadata."""

import pickle
from pathlib import Path

from trainer.failures import Refused

# The classes in a .metadata of torch.distributed.checkpoint.
CLASSES = {
    "torch.distributed.checkpoint.metadata": None,  # all of it: dataclasses and enumerations
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size", "device", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
        "bool", "strided", "contiguous_format", "preserve_format",
    },
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "Path"},
}  # fmt: skip


class _ForeignName(Exception):
    """The pickle names something that is not in torch's metadata."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        allowed = CLASSES.get(module, ())
        if "." in name or (allowed is not None and name not in allowed):
            raise _ForeignName(f"{module}.{name}")
        return super().find_class(module, name)


def check_metadata(path: Path) -> None:
    """Raise Refused if the .metadata of the checkpoint ``path`` names anything but torch's metadata, because torch's
    own reader calls whatever it names.
    """
    file = Path(path, ".metadata")
    try:
        with open(file, "rb") as stream:
            _MetadataUnpickler(stream).load()
        return
    except _ForeignName as error:
        wrong = f"would run {error}, which no checkpoint of this trainer does; load only checkpoints you trust, and"
    except Exception as error:
        wrong = f"is damaged ({type(error).__name__}); use another checkpoint, or"
    raise Refused(f"{file} {wrong} restore this one from a copy.")

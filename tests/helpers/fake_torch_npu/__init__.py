"""A fake torch_npu: the attention operators on the CPU, with exactly the schemas of a published release.

``installed(release)`` registers every operator of ``schemas/<release>.txt`` in the namespace ``npu`` with
torch.library, so that a wrong name, a positional keyword-only argument or a wrong type fails as on the device.
``attention.py`` computes what the documentation says, ``refusals.py`` raises the operators' errors; operators that are
not implemented reject every call.
"""

import sys
import types
from contextlib import contextmanager
from pathlib import Path

import torch

from fake_torch_npu import attention

SCHEMAS = Path(__file__).parent / "schemas"
RELEASES = tuple(
    sorted(
        (path.stem for path in SCHEMAS.glob("*.txt")),
        key=lambda release: [int(part) for part in release.split(".post")[0].split(".")],
    )
)
# Without softmax_layout, the operator's documentation and MindSpeed disagree about the order of TND statistics.
UNORDERED_RELEASES = ("2.5.1",)
FUSED_UPDATE_RELEASES = ("2.13.0",)


def schemas(release):
    """The operators' schemas of a release, by name."""
    lines = (SCHEMAS / f"{release}.txt").read_text(encoding="utf-8").splitlines()
    return {line.split("(")[0]: line for line in lines if line.strip()}


@contextmanager
def installed(release, tnd_order="documents", cann=(8, 3)):
    """Context manager in which ``import torch_npu`` and torch.ops.npu are the fake of ``release``; yields the module.

    Args:
        tnd_order: memory order of TND statistics if the caller requests none: "documents" or "heads".
        cann: (major, minor) version of CANN: before 8.3 no operator takes softmax_layout.
    """
    library = torch.library.Library("npu", "DEF")
    operators = attention.Operators(schemas(release), tnd_order, cann)
    try:
        for name, schema in schemas(release).items():
            library.define(schema)
            library.impl(name, operators.implementation(name), "CPU")
        modules = _modules(release, operators)
        saved = {name: sys.modules.get(name) for name in modules}
        sys.modules.update(modules)
        try:
            yield modules["torch_npu"]
        finally:
            for name, module in saved.items():
                sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    finally:
        library._destroy()


def _modules(release, operators):
    torch_npu = types.ModuleType("torch_npu")
    torch_npu.__version__, torch_npu.operators = release, operators
    torch_npu.npu = types.SimpleNamespace(is_available=lambda: True)
    for name in schemas(release):
        setattr(torch_npu, name, getattr(torch.ops.npu, name))
    contrib = types.ModuleType("torch_npu.contrib")
    transfer = types.ModuleType("torch_npu.contrib.transfer_to_npu")
    torch_npu.contrib, contrib.transfer_to_npu = contrib, transfer
    return {"torch_npu": torch_npu, "torch_npu.contrib": contrib, "torch_npu.contrib.transfer_to_npu": transfer}

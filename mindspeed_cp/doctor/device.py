"""Which device and kernel are used, why not the others, and what is patched."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from mindspeed_cp.doctor.finding import Finding, split
from mindspeed_cp.doctor.installed import ask

# Without the patches of this area context parallelism is off; the others depend on the device and on libraries.
NEEDED = "core"
# Without the patches of the training code, a checkout's scripts do not know the flags.
BROKEN = "megatron.training cannot be imported"


def adaptor() -> tuple[dict[str, Any] | None, list[Finding]]:
    """The adaptor's report from a separate process, and what is wrong there."""
    try:
        record: dict[str, Any] = ask("mindspeed_cp.megatron_adaptor", "--json")
    except RuntimeError as error:
        return None, [Finding("problem", f"no patch is applied: {error}", _way_out(str(error)))]
    return record, list(_patches(record))


def _way_out(error: str) -> str:
    if "cannot patch" in error:
        return "pip install a megatron-core that the line above names as tried, or bash scripts/try_megatron.sh VERSION"
    if "; run pip install" in error:
        return error.partition("; run ")[2]
    return "python -m mindspeed_cp.megatron_adaptor shows the whole error"


def _patches(record: dict[str, Any]) -> Iterator[Finding]:
    for name, rows in record["patches"].items():
        statuses = Counter(row["status"] for row in rows)
        applied = statuses.pop("applied", 0)
        text = f"patches of {name}: {applied} of {len(rows)} applied"
        broken = next((status for status in statuses if status.startswith(BROKEN)), "")
        if broken:
            show = 'python -c "import mindspeed_cp.megatron_adaptor, megatron.training" shows the whole error'
            yield Finding("problem", f"{text}: {broken}", show)
        elif name == NEEDED and not applied:
            yield Finding("problem", text, "python -m mindspeed_cp.megatron_adaptor --all says why")
        else:
            reason = f": {next(iter(statuses))}" if len(statuses) == 1 else ""
            yield Finding("ok", text + (f", {statuses.total()} not needed{reason}" if statuses else ""))
    if record["imported_before"]:
        yield Finding(
            "problem",
            f"Megatron was imported before the adaptor ({', '.join(record['imported_before'])}), at Python's start",
            "take Megatron's import out of sitecustomize.py, usercustomize.py and .pth files",
        )


def kernels(device: str, why: str) -> Iterator[Finding]:
    """The device, its kernel, and why the other kernels are not used; needs torch.

    Args:
        device: the device that the adaptor chose.
        why: the reason for the choice.
    """
    from mindspeed_cp.kernels import KERNELS

    yield Finding("ok", f"device {device}: {why}")
    chosen = next(name for name, row in KERNELS.items() if row.automatic and row.device_type == device)
    for name, row in KERNELS.items():
        reason = row.load().unavailable()
        if name == chosen and reason:
            yield Finding("problem", f"kernel {name} cannot be used: {reason}", "use --cp-kernel blockwise")
        elif name == chosen:
            yield Finding("ok", f"kernel {name}: the automatic choice for {device}")
        elif reason:
            yield Finding("note", f"not {name}: {split(reason)[0]}")
        elif row.device_type in (None, device):
            yield Finding("note", f"not {name}: works here, by --cp-kernel {name} only")
        else:
            yield Finding("note", f"not {name}: it serves {row.device_type}, and {device} is used")


def npu_works() -> bool:
    """Whether the NPU kernel can be used; needs torch."""
    from mindspeed_cp.kernels import KERNELS

    return not KERNELS["npu"].load().unavailable()


def device_without_megatron() -> tuple[str, str]:
    """(device, why), decided by the kernels alone, because the adaptor cannot be imported."""
    from mindspeed_cp.kernels import KERNELS

    for name in ("cuda", "npu"):
        if not KERNELS[name].load().unavailable():
            return name, "its kernel can be used"
    return "cpu", "no kernel of an accelerator can be used"

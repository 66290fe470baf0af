"""The self test's result as findings; the test itself runs in separate processes."""

import time
from collections.abc import Iterator
from subprocess import TimeoutExpired
from typing import Any

from mindspeed_cp.doctor.finding import Finding
from mindspeed_cp.doctor.installed import ask

INTERFACE = "export GLOO_SOCKET_IFNAME=lo, or the interface between the nodes (ip -br address lists them)"
REPORT = "python -m mindspeed_cp.doctor.self_test {device} shows it alone; report it with that output"


def self_test(device: str) -> Iterator[Finding]:
    """Compare every algorithm on a few ranks with dense attention, and measure their links."""
    start = time.monotonic()
    try:
        results = ask("mindspeed_cp.doctor.self_test", device)
    except (RuntimeError, TimeoutExpired) as error:
        yield Finding("problem", f"the self test does not run: {error}", REPORT.format(device=device))
        return
    for result in results:
        yield from judged(result)
    yield Finding("note", f"self test: {time.monotonic() - start:.0f} s")


def judged(result: dict[str, Any]) -> Iterator[Finding]:
    """Findings of one run of self_test.run."""
    ranks = f"{result['ranks']} {result['device']} rank{'s' if result['ranks'] > 1 else ''}"
    if "error" in result:
        gloo = result["device"] == "cpu" and any(
            word in result["error"].lower() for word in ("gloo", "resolve", "ifname")
        )
        way_out = INTERFACE if gloo else REPORT.format(device=result["device"])
        yield Finding("problem", f"{ranks}: {result['error']}", way_out)
        return
    wrong = {title: error for title, error in result["errors"].items() if not error <= result["limit"]}
    right = [title for title in result["errors"] if title not in wrong]
    for title, error in wrong.items():
        text = f"{ranks}, {title}: error {error:.1e} against dense attention, above {result['limit']:.0e}"
        yield Finding("problem", text, REPORT.format(device=result["device"]))
    if right:
        error = max(result["errors"][title] for title in right)
        yield Finding(
            "ok", f"{ranks}, {result['dtype']}, forward and backward: {', '.join(right)}: error at most {error:.0e}"
        )
    for name, rate in result["rates"].items():
        yield Finding("ok", f"{ranks}, {name}: {rate / 1e9:.2f} GB/s sent by each rank")

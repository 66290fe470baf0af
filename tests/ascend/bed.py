"""The test bed seen from a test: where torch_npu is, what environment its programs need, and a server that forks ranks.

torch_npu lies in a folder of its own, beside the environment (``scripts/test_npu_contract.sh`` installs it), because
``import torch`` loads it wherever it is found.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RELEASE = os.environ.get("TORCH_NPU", "2.13.0")
FOLDER = Path(os.environ.get("TORCH_NPU_FOLDER", Path(sys.prefix, f"torch_npu-{RELEASE}")))
SOURCES = ("acl.c", "aclnn.c", "hccl.c", "build.sh")


def missing():
    """Why the test bed cannot run here, with what to do; "" when it can."""
    if not (FOLDER / "torch_npu").is_dir():
        return f"no torch_npu in {FOLDER}: bash scripts/test_npu_contract.sh installs it"
    info = next(FOLDER.glob("torch_npu-*.dist-info")).name
    wanted = re.match(r"torch_npu-(\d+\.\d+\.\d+)", info)[1]
    torch = importlib.metadata.version("torch").split("+")[0]
    if torch != wanted:
        return f"torch_npu {wanted} in {FOLDER} needs torch {wanted}, and this is {torch}"
    tools = [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]
    return f"{', '.join(tools)} is not installed: the stub of CANN cannot be built" if tools else ""


def build():
    """Build the stub of CANN where its sources have changed; returns the folder of its libraries."""
    digest = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in SOURCES)).hexdigest()
    stub, stamp = FOLDER / "stub", FOLDER / "stub" / "sources"
    if not stamp.exists() or stamp.read_text() != digest:
        path = os.pathsep.join([str(FOLDER), *filter(None, sys.path)])
        subprocess.run(
            ["bash", HERE / "build.sh", stub, sys.executable],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        )
        stamp.write_text(digest)
    return stub / "lib"


def environment(*first, **more):
    """The environment of a program on "npu" devices; ``first`` are folders of the import path before all others."""
    ours = (REPOSITORY / name for name in ("scripts", "tests/helpers", "tests/check"))
    own = [HERE / "site", *first, FOLDER, REPOSITORY, *ours]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("ASCEND", "MINDSPEED_CP"))}
    return {
        **variables,
        "PYTHONPATH": os.pathsep.join([*map(str, own), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(build()), os.environ.get("LD_LIBRARY_PATH")])),
        "PYTHONWARNINGS": "ignore",
        # 0: every operator at once; 1, 2: a thread of torch_npu's runs what is queued (npu_on_cpu.py waits for it).
        "TASK_QUEUE_ENABLE": os.environ.get("NPU_BED_QUEUE", "0"),
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        **more,
    }


class Server:
    """A process that has imported torch_npu, Megatron and the adaptor, from which the ranks of every job are forked."""

    def __init__(self, *first, **more):
        self._process = subprocess.Popen(
            [sys.executable, HERE / "bed_server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(*first, **more),
        )

    def run(self, job, world=1, without=(), **arguments):
        """What ``jobs.<job>(rank, world, **arguments)`` returned on every rank.

        Args:
            without: targets of patches that are taken back before the job.

        Raises:
            JobFailed: a rank raised; the message is that of the first one, "Type: text".
        """
        order = dict(job=job, world=world, without=list(without), arguments=arguments)
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the server of the test bed has ended; its output is above"
        answer = json.loads(line)
        if answer["error"]:
            raise JobFailed(answer["error"])
        return answer["results"]

    def close(self):
        """End the server; what its libraries do at their end is nobody's result, so it gets a few seconds for that."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class JobFailed(AssertionError):
    """A rank raised."""


if __name__ == "__main__":
    why = missing()
    if why:
        sys.exit(f"the test bed cannot run here: {why}")
    for name, value in environment().items():
        if os.environ.get(name) != value:
            print(f"export {name}={shlex.quote(value)}")

"""What checks this project and takes longer than a test: one program, whose first argument names the check.

    python tests/check faults --kinds kill          every check says with --help what it takes

The checks find scripts/ and this folder on their path, and so do the processes that they start.
"""

import importlib
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHECKS = {
    "faults": "ranks are killed, stopped or meet a full disk, at each phase of a training",
    "soak": "ranks are killed at random while a job trains",
    "fuzz": "drawn command lines of the embedded trainer, beside the run without context parallelism",
    "prove_drawn": "drawn command lines of the embedded trainer, proved",
    "prove_megatron": "the scripts of Megatron-LM checkouts, model by model, proved",
    "megatron_lm": "pretrain_gpt.py of Megatron-LM checkouts (scripts/test_megatron_lm.sh)",
    "megatron_signatures": "what the patched names look like in a Megatron, beside the newest tried one",
    "try_megatron": "another version of Megatron (scripts/try_megatron.sh)",
    "verify_npu": "everything that can be checked on a device (scripts/verify_npu.sh)",
    "verify_machine": "what this machine is, for the report of verify_npu",
    "verify_runs": "the training runs of verify_npu",
    "hosts": "one attention layer over two hosts: bytes on the network, and a link that is cut",
    "plan": "the planner's ranking beside measured times, on emulated networks",
    "fla": "flash-linear-attention's kernels as layers with a state call them, on a GPU or in Triton's interpreter",
    "launch_lines": "the command lines of MindSpeed-LLM's scripts, as the doctor reads them beside MindSpeed",
    "published_plans": "the planner beside trainings that were published",
}


def main() -> object:
    if len(sys.argv) < 2 or sys.argv[1] not in CHECKS:
        listed = "\n".join(f"  {name:20} {what}" for name, what in CHECKS.items())
        print(f"usage: python tests/check NAME [arguments]\n\n{listed}", file=sys.stderr)
        return 2
    path = [str(ROOT), str(ROOT / "scripts"), str(HERE)]
    sys.path[:1] = path  # the first was this folder
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([*path, *(one for one in before if one and one not in path)])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    name = sys.argv[1]
    sys.argv = [f"tests/check {name}", *sys.argv[2:]]
    return importlib.import_module(name).main()


if __name__ == "__main__":
    sys.exit(main())

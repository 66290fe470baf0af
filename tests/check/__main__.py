"""What checks this project and takes longer than a test: one program, whose first argument names the check.

python tests/check faults --kinds kill          every check says with --help what it takes
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2] / "scripts")
from program import run

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
    "verify_ring": "one layer of verify_npu by this project's ring and by MindSpeed's, on ranks of torchrun",
    "hosts": "one attention layer over two hosts: bytes on the network, and a link that is cut",
    "plan": "the planner's ranking beside measured times, on emulated networks",
    "fla": "flash-linear-attention's kernels as layers with a state call them, on a GPU or in Triton's interpreter",
    "launch_lines": "the command lines of MindSpeed-LLM's scripts, as the doctor reads them beside MindSpeed",
    "published_plans": "the planner beside trainings that were published",
}

if __name__ == "__main__":
    sys.exit(run("tests/check", CHECKS))

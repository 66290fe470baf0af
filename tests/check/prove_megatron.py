"""Prove Megatron-LM's own scripts, model by model, on every checkout of a folder; print a table.

    python tests/check prove_megatron FOLDER [--versions 0.12.1 0.16.1] [--only TEXT] [--verbose]

    equal      everything that was compared; the largest errors of outputs and gradients
    refused    this project, or this version of Megatron, refuses the combination by an error that names it
    -          this version of Megatron has no such model

Exit status 1 where a case differs or a run fails. The state-space layers run on tests/helpers/mamba_kernels.py.
"""

import argparse
import os
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_lm import find_checkouts, prepare_text
from megatron_lm_cases import vocabulary_of_text
from megatron_signatures import in_order

from mindspeed_cp.prove import command, report, shrinking
from mindspeed_cp.prove.launching import Server
from mindspeed_cp.prove.report import Verdict
from mindspeed_cp.prove.shrinking import Wish

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
MODEL = (
    "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 4096 --max-position-embeddings 8192 "
    "--micro-batch-size 4 --global-batch-size 128 --train-iters 500000 --lr 1e-4 --bf16 --context-parallel-size 8"
)
MOCK = "--mock-data --tokenizer-type NullTokenizer --vocab-size 50000"
ROPE = "--position-embedding-type rope"
LLAMA = (
    f"{ROPE} --normalization RMSNorm --swiglu --disable-bias-linear --group-query-attention --num-query-groups 4 "
    "--untie-embeddings-and-output-weights"
)
DOCUMENTS = "--reset-position-ids --reset-attention-mask --eod-mask-loss"
TP = "--tensor-model-parallel-size 8 --sequence-parallel"
PP = "--pipeline-model-parallel-size 4"
ULYSSES, RING = "--context-parallel-algo ulysses_cp_algo", "--context-parallel-algo megatron_cp_algo"
HYBRID = "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2"
MOE = (
    f"{ROPE} --num-experts 64 --moe-router-topk 6 --moe-ffn-hidden-size 512 --disable-bias-linear --moe-grouped-gemm "
    "--moe-token-dispatcher-type alltoall --moe-layer-freq ([0]*3+[1]*21) --expert-model-parallel-size 8"
)
BALANCED = "--cp-batch-layout balanced --no-create-attention-mask-in-dataloader --micro-batch-size 1"
BRINGS = "--dataloader-inter-document-masking --eod-mask-loss"
WINDOWS = "--window-size 512,0 --window-attn-skip-freq 2 --softmax-type learnable"
OVERLAP = "--use-cp-send-recv-overlap --context-parallel-kv-cache-policy half"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
AUX, MTP = (
    "--moe-aux-loss-coeff 0.1 --moe-router-load-balancing-type",
    "--mtp-num-layers 1 --mtp-loss-scaling-factor 0.3",
)
LATENT = "--multi-latent-attention --q-lora-rank 512 --kv-lora-rank 512 --disable-bias-linear --normalization RMSNorm"
DEEPSEEK_V3 = (
    f"{MOE} {LATENT} {AUX} seq_aux_loss {MTP} --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128 "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3"
)
GEMMA_3 = (
    f"{ROPE} --normalization RMSNorm --swiglu --disable-bias-linear --group-query-attention --num-query-groups 4 "
    "--qk-layernorm --kv-channels 128 --window-size 512,0 --window-attn-skip-freq 6"
)
STATE_SPACE = (
    f"--spec mamba_stack stack --normalization RMSNorm {ROPE} --disable-bias-linear "
    "--hybrid-override-pattern M-M-M*-M-M*-M-M*-M-M*-"
)


@dataclass(frozen=True)
class Case:
    """One command.

    Args:
        flags: behind MODEL and the data.
        text: real text with documents.
        script: of the checkout.
        since: the first version that has it.
    """

    name: str
    flags: str
    text: bool = False
    script: str = "pretrain_gpt.py"
    since: str = "0"


CASES = (
    Case("dense, Ulysses", f"{ROPE} {ULYSSES}"),
    Case("dense, Ring", f"{ROPE} {RING}"),
    Case("dense, Ring, overlap, KV cache half", f"{ROPE} {RING} {OVERLAP}"),
    Case("dense, Ring, direct", f"{ROPE} {RING} --cp-kv-exchange direct"),
    Case("dense, Ring, mesh", f"{ROPE} {RING} --cp-kv-exchange mesh"),
    Case("dense, Double Ring", f"{ROPE} {RING} --cp-window-size 2"),
    Case("dense, Hybrid", f"{ROPE} {HYBRID}"),
    Case("dense, KV all-gather", f"{ROPE} --context-parallel-algo kvallgather_cp_algo"),
    Case("learned positions, Ring", RING),
    Case("grouped queries, Ring", f"{LLAMA} {RING}"),
    Case("grouped queries, Ulysses", f"{LLAMA} {ULYSSES}"),
    Case("uneven, Ring", f"{ROPE} {RING} --seq-length 4095"),
    Case("uneven, Ulysses", f"{ROPE} {ULYSSES} --gather-size-calculator dynamic --seq-length 4095"),
    Case("per-token loss, Ring", f"{ROPE} {RING} --calculate-per-token-loss"),
    Case("end of document, Ring", f"{ROPE} {RING} {DOCUMENTS}", text=True),
    Case("end of document, Ulysses", f"{ROPE} {ULYSSES} {DOCUMENTS}", text=True),
    Case("end of document, Hybrid", f"{ROPE} {HYBRID} {DOCUMENTS}", text=True),
    Case("end of document, balanced", f"{ROPE} {RING} {BALANCED} {DOCUMENTS}", text=True),
    Case("packed by the dataloader, Ring", f"{ROPE} {RING} {BRINGS}", text=True, since="0.19"),
    Case("experts, auxiliary loss", f"{MOE} {RING} {AUX} aux_loss"),
    Case("experts, sequence loss, z-loss", f"{MOE} {RING} {AUX} seq_aux_loss --moe-z-loss-coeff 0.1"),
    Case("latent attention, Ring", f"{ROPE} {RING} {LATENT}"),
    Case("multi-token prediction, Ring", f"{ROPE} {RING} {MTP}"),
    Case("windows and sinks, Ring", f"{ROPE} {RING} {WINDOWS}", since="0.15"),
    Case("DeepSeek-V3, Ring", f"{DEEPSEEK_V3} {RING}"),
    Case("Gemma 3, Ring", f"{GEMMA_3} {RING}", since="0.15"),
    Case("Gemma 3, Ulysses", f"{GEMMA_3} {ULYSSES}", since="0.15"),
    Case("tensor and sequence parallel, Ring", f"{LLAMA} {RING} {TP}"),
    Case("pipeline, Ring", f"{ROPE} {RING} {PP}"),
    Case("pipeline, end of document, Ulysses", f"{ROPE} {ULYSSES} {PP} {DOCUMENTS}", text=True),
    Case("virtual pipeline, Ulysses", f"{ROPE} {ULYSSES} {PP} --num-layers-per-virtual-pipeline-stage 2"),
    Case("full recompute, Ring", f"{ROPE} {RING} {FULL}"),
    Case("full recompute, kept attention, Ring", f"{ROPE} {RING} {FULL} --cp-keep-attention"),
    Case("selective recompute, Ulysses", f"{ROPE} {ULYSSES} --recompute-granularity selective"),
    Case("state space, hybrid, Ring", f"{STATE_SPACE} {RING}", script="pretrain_mamba.py", since="0.16"),
    Case("state space, hybrid, Ulysses", f"{STATE_SPACE} {ULYSSES}", script="pretrain_mamba.py", since="0.16"),
)  # fmt: skip


def proved(case: Case, script: Path, data: list[str], limit: float, server: Server) -> Verdict | str:
    """The verdict, or the message of the proof that refuses the command."""
    words = [*MODEL.split(), *data, *shlex.split(case.flags)]
    with tempfile.TemporaryDirectory(prefix="prove-models-") as folder:
        try:
            plan = shrinking.plan(str(script), words, Wish(steps=2, limit=limit), Path(folder))
        except ValueError as error:
            return str(error)
        return command.proved(plan, server)


def cell(found: Verdict | str) -> str:
    named = (": error: ", "ValueError: --", "AssertionError: ")
    if isinstance(found, str) or (found.comparison is None and any(each in found.failure for each in named)):
        return "refused"
    if found.comparison is None:
        return "FAILED"
    worst = found.comparison.worst
    errors = ", ".join(f"{worst[what]:.0e}" for what in ("output", "gradient"))
    return errors if found.equal else f"DIFFERENT {errors}"


def on_one_version(version, checkout, cases, folder, args) -> dict[str, str]:
    """Name of a case -> its cell."""
    text = f"--data-path {folder}/text --tokenizer-type NullTokenizer --split 90,10,0 --vocab-size"
    text = [*text.split(), vocabulary_of_text(version)]
    cells = {}
    for script in dict.fromkeys(case.script for case in cases):
        with tempfile.TemporaryDirectory() as imports, Server(Path(imports)) as server:
            for case in (case for case in cases if case.script == script):
                start = time.monotonic()
                found = proved(case, checkout / script, text if case.text else MOCK.split(), args.limit, server)
                cells[case.name] = cell(found)
                print(f"{version} {case.name}: {cells[case.name]} ({time.monotonic() - start:.0f} s)", flush=True)
                if args.verbose or cells[case.name][0].isupper() or cells[case.name] == "refused":
                    print("    " + (found if isinstance(found, str) else report.text(found)).replace("\n", "\n    "))
    return cells


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Megatron-LM checkout, or a folder of checkouts")
    parser.add_argument("--versions", nargs="+", help="only these, such as 0.12.1")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of a run (default: 300)")
    parser.add_argument("--verbose", action="store_true", help="print every report")
    args = parser.parse_args(argv)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(HELPERS)]))
    os.environ["MINDSPEED_CP_PROVE_IMPORTS"] = "mamba_kernels"
    cases = [case for case in CASES if args.only in case.name]
    table: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="prove-models-") as folder:
        prepare_text(f"{folder}/text")
        for version, checkout in find_checkouts(args.folder.resolve()).items():
            if args.versions and version not in args.versions:
                continue
            possible = [case for case in cases if in_order(case.since) <= in_order(version)]
            table[version] = on_one_version(version, checkout, possible, folder, args)
    print("| model | " + " | ".join(table) + " |", "|---" * (len(table) + 1) + "|", sep="\n")
    for case in cases:
        print(f"| {case.name} | " + " | ".join(cells.get(case.name, "-") for cells in table.values()) + " |")
    return int(any(text[0].isupper() for cells in table.values() for text in cells.values()))


if __name__ == "__main__":
    sys.exit(main())

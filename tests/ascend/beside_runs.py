"""MindSpeed beside this project on the test bed: what the tests run and the table of docs/frameworks.md shows.

LOSSES=1 MINDSPEED_FOLDER=DIR MINDSPEED_LLM_PATH=LIST bash scripts/test_npu_contract.sh      prints its rows
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import bed
from algorithms import ALGORITHMS, flags_of

from mindspeed_cp.megatron.neighbour import BRANCHES, FRONTS
from mindspeed_cp.patches.versions import minor

BOUND = 1e-5
MODEL = "--seq-length 32 --num-attention-heads 4 --use-flash-attn".split()
ORDERS = {  # title -> the order of imports, the algorithms that are tried
    "mindspeed_cp first, which activates MindSpeed": (["ours"], tuple(ALGORITHMS)),
    "mindspeed_cp first, then MindSpeed": (["ours", "mindspeed"], ("Ulysses", "Ring")),
    "MindSpeed first": (["mindspeed", "ours"], ("Ulysses", "Ring")),
    "MindSpeed first, then its `repatch`": (["mindspeed", "ours", "repatch"], ("Ulysses", "Ring")),
}


def mindspeed_server(folder, *first):
    """A server whose jobs find the MindSpeed in ``folder``, and choose the order of imports."""
    return bed.Server(folder, *first, NPU_BED_IMPORTS="torch")


def beside(server, order, algorithm):
    """What the job beside_mindspeed found on every rank."""
    size, settings = ALGORITHMS[algorithm]
    given = {"settings": settings} if "repatch" in order else {"flags": [*MODEL, *flags_of(size, settings)]}
    return server.run("beside_mindspeed", size, order=order, **given)


def mindspeed_alone(server):
    """[(loss, gradient norm)] of MindSpeed on one device without this project."""
    return server.run("beside_mindspeed", 1, order=["mindspeed", "plain"])[0]["losses"]


def difference(found, wanted):
    """The largest relative difference of losses and gradient norms."""
    pairs = [pair for got, step in zip(found, wanted, strict=True) for pair in zip(got, step, strict=True)]
    return max(abs(got - expected) / abs(expected) for got, expected in pairs)


LLM = """--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --max-position-embeddings 128
--micro-batch-size 1 --global-batch-size 2 --train-iters 3 --lr 1e-3 --min-lr 1e-4 --log-interval 1 --eval-iters 0
--eval-interval 100 --attention-dropout 0 --hidden-dropout 0 --distributed-timeout-minutes 2 --split 90,10,0
--no-gradient-accumulation-fusion --no-masked-softmax-fusion --transformer-impl local --use-mcore-models
--use-flash-attn --position-embedding-type rope --normalization RMSNorm --swiglu""".split()
LENGTH = "64"
MOCK = "--mock-data --tokenizer-type NullTokenizer --vocab-size 4200".split()
INSTRUCTIONS = """--stage sft --is-instruction-dataset --prompt-type qwen --finetune --no-shuffle
--padded-vocab-size 256 --tokenizer-type PretrainedFromHF""".split()
PRETRAIN, POSTTRAIN = "pretrain_gpt.py", "posttrain_gpt.py"
BATCHES = {  # title -> script, flags, algorithms that are tried
    "whole rows": (PRETRAIN, MOCK, tuple(ALGORITHMS)),
    "documents": (PRETRAIN, [*MOCK, "--reset-attention-mask", "--reset-position-ids"], ("Ulysses", "Ring")),
    "multi-token prediction": (PRETRAIN, [*MOCK, "--mtp-num-layers", "1"], ("Ulysses", "Ring")),
    "instructions": (POSTTRAIN, INSTRUCTIONS, tuple(ALGORITHMS)),
    "packed instructions": (POSTTRAIN, [*INSTRUCTIONS, "--reset-attention-mask", "--neat-pack"], ("Ulysses", "Ring")),
}
EITHER = {"whole rows": ("Ulysses", "Ring")}  # tried with MindSpeed-LLM first, too -> with these algorithms


class MindSpeedLLM:
    """Scripts of MindSpeed-LLM, unchanged.

    Args:
        folders: of MindSpeed-LLM, its Megatron-LM, its MindSpeed and its packages.
        scratch: an empty folder for a tokenizer and a dataset.
    """

    def __init__(self, folders, scratch):
        self.folders, self.scratch = folders, Path(scratch)

    def run(self, batch, algorithm="", **environment):
        """([(loss, gradient norm) of every step], all that was printed); "" is MindSpeed alone on one device."""
        script, flags, _ = BATCHES[batch]
        size, settings = ALGORITHMS[algorithm] if algorithm else (1, {})
        further = _of_documents(algorithm, script) if algorithm and "--reset-attention-mask" in flags else []
        if script == POSTTRAIN:
            flags = [*flags, *self._instructions("--neat-pack" in flags)]
        if not algorithm:
            environment = {"MINDSPEED_CP": "off", **environment}
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        flags = [*LLM, "--seq-length", LENGTH, *flags, *(flags_of(size, settings) if algorithm else []), *further]
        said = self._program(*ranks, bed.HERE / "llm_script.py", self._script(script), *flags, **environment)
        found = re.findall(r"lm loss: (\S+) .*? grad norm: (\S+) ", said)
        assert len(found) == 3, said[-3000:]
        return [tuple(map(float, pair)) for pair in found], said

    def run_behind(self, batch, algorithm):
        """As ``run``, and MindSpeed-LLM has patched, with its own context parallelism, before this project comes."""
        return self.run(batch, algorithm, IMPORTED_FIRST=FRONTS["mindspeed_llm"][0])

    def _script(self, name):
        return next(path for folder in self.folders if (path := Path(folder, name)).is_file())

    def _program(self, *command, **environment):
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            env=bed.environment(*self.folders, bed.HERE, HF_HUB_OFFLINE="1", **environment),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def _instructions(self, packed):
        """Flags of a tiny tokenizer and of a dataset that MindSpeed-LLM's own preprocessing makes, once."""
        prefix = self.scratch / ("packed" if packed else "instructions")
        if not prefix.with_suffix(".json").exists():
            further = ["--pack", "--neat-pack", "--seq-length", LENGTH] if packed else []
            self._program(bed.HERE / "llm_instructions.py", self._script("preprocess_data.py"), prefix, *further)
        return ["--tokenizer-name-or-path", f"{prefix}-tokenizer", "--data-path", str(prefix)]


def _of_documents(algorithm, script):
    """What MindSpeed-LLM asks for with documents: lengths of any kind in a causal ring, else the kind of its mask.

    Its trainer of instructions pads documents for a causal ring by ends of which some are -1, and fails.
    """
    causal = algorithm == "Ring" and script == PRETRAIN
    return ["--variable-seq-lengths"] if causal else ["--attention-mask-type", "general"]


def _row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def _cells(tried, differences):
    """The cells of the losses and of every algorithm: "-" if it was not tried."""
    yield f"{tried[0][0]:.4f} to {tried[-1][0]:.4f}"
    for name in ALGORITHMS:
        worst = differences.get(name)
        assert worst is None or worst < BOUND, (name, worst)
        yield "-" if worst is None else f"{worst:.0e}" if worst else "0"


def rows_of_mindspeed(folder):
    """Print a row for each order of imports, of the MindSpeed in ``folder`` beside the megatron-core that is found."""
    version = _megatron_version()
    branch = next((row.name for row in BRANCHES if row.megatron == minor(version)), "of another Megatron")
    title = f"MindSpeed {branch}, megatron-core {version}"
    with contextlib.closing(mindspeed_server(folder)) as server:
        alone = mindspeed_alone(server)
        for order, (steps, names) in ORDERS.items():
            found = {name: beside(server, steps, name) for name in names}
            assert all(rank["calls"] for ranks in found.values() for rank in ranks), "our attention computes"
            worst = {name: max(difference(rank["losses"], alone) for rank in ranks) for name, ranks in found.items()}
            _row(title, "tiny GPT", "whole rows", order, *_cells(alone, worst))


def _megatron_version():
    program = "from megatron.core import package_info as i; print(i.__version__)"
    done = subprocess.run([sys.executable, "-c", program], env=bed.environment(), capture_output=True, text=True)
    return done.stdout.split()[-1]


def rows_of_mindspeed_llm(folders):
    """Print a row for each script and kind of batch; gradient norms, printed to three digits, are not compared."""
    with tempfile.TemporaryDirectory() as scratch:
        llm = MindSpeedLLM(folders, scratch)
        for batch, (script, _, names) in BATCHES.items():
            alone = [(loss,) for loss, _ in llm.run(batch)[0]]
            orders = {"mindspeed_cp first": llm.run} | (
                {"MindSpeed-LLM first": llm.run_behind} if batch in EITHER else {}
            )
            for order, run in orders.items():
                tried = names if run == llm.run else EITHER[batch]
                worst = {name: difference([(loss,) for loss, _ in run(batch, name)[0]], alone) for name in tried}
                _row("MindSpeed-LLM", script, batch, order, *_cells(alone, worst))


def main():
    if folder := os.environ.get("MINDSPEED_FOLDER", ""):
        rows_of_mindspeed(folder)
    if folders := os.environ.get("MINDSPEED_LLM_PATH", ""):
        rows_of_mindspeed_llm(folders.split(os.pathsep))


if __name__ == "__main__":
    main()

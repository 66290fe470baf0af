"""What scripts/test_megatron_lm.sh runs: each case of context parallelism, and the run with cp = 1 that it must
equal.
"""

from dataclasses import dataclass

from megatron_signatures import in_order

MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 8 --max-position-embeddings 128 --micro-batch-size 1 "
    "--global-batch-size 2 --train-iters 4 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --log-interval 1 "
    "--eval-iters 0 "
    "--eval-interval 100 --attention-dropout 0 --hidden-dropout 0 --distributed-timeout-minutes 1 --split 90,10,0 "
    "--transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm --no-rope-fusion "
    "--no-masked-softmax-fusion"
).split()
MOCK = "--mock-data --tokenizer-type NullTokenizer --vocab-size 4200".split()
LENGTH = "--seq-length 64"
UNEVEN = "--seq-length 61"
ROPE_GQA = (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --group-query-attention "
    "--num-query-groups 2 --untie-embeddings-and-output-weights"
)
DOCUMENTS = "--reset-position-ids --reset-attention-mask --eod-mask-loss"
LEGACY = "--use-legacy-models --ckpt-format torch --normalization RMSNorm"  # their LayerNorm needs Apex
NO_LEGACY = "0.15"  # from then on legacy models lack attributes that Megatron's own schedules read, then they are gone
TP, PP, TP_PP = (
    "--tensor-model-parallel-size 2 --sequence-parallel",
    "--pipeline-model-parallel-size 2",
    "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2",
)
DISTRIBUTED_OPTIMIZER = "--use-distributed-optimizer --overlap-grad-reduce --global-batch-size 4"

ULYSSES = "--context-parallel-algo ulysses_cp_algo"
UNALIGNED = f"{ULYSSES} --gather-size-calculator dynamic"
RING = "--context-parallel-algo megatron_cp_algo"
OVERLAP = f"{RING} --use-cp-send-recv-overlap"
DIRECT = f"{RING} --cp-kv-exchange direct"
CACHED = f"{RING} --context-parallel-kv-cache-policy full"
DOUBLE = f"{RING} --cp-window-size 2"
HYBRID = "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2"
GATHER = "--context-parallel-algo kvallgather_cp_algo"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        algorithm, parallelism: the words of the table.
        flags: those of context parallelism, for the run with cp > 1 alone.
        shared: flags of both runs; MOCK data unless ``text``.
        tp_pp: tensor x pipeline parallel size, in both runs.
        dp: data-parallel size; the cp = 1 run has the same global batch on one rank, or, with the distributed
            optimizer, on cp x dp ranks: the number of optimizer shards rounds the gradient norm to the fifth digit,
                without cp as well.
        text: real text in an indexed dataset.
        resume: "" or a checkpoint format: train under cp, resume under cp = 1 and the other way round.
        quick: part of the short subset.
        since, before: versions of Megatron that have it, whose own run with cp = 1 works.
    """

    algorithm: str
    parallelism: str
    flags: str
    cp: int = 2
    shared: str = LENGTH
    tp_pp: int = 1
    dp: int = 1
    text: bool = False
    resume: str = ""
    quick: bool = False
    since: str = "0"
    before: str = "99"

    @property
    def ranks(self):
        return self.cp * self.tp_pp * self.dp

    @property
    def reference_ranks(self):
        return self.ranks if DISTRIBUTED_OPTIMIZER in self.shared else self.tp_pp

    @property
    def name(self):
        return f"{self.algorithm}, {self.parallelism}"


CASES = (
    Case("Ulysses", "cp2", ULYSSES, quick=True),
    Case("Ulysses", "cp4", ULYSSES, 4),
    Case("Ring", "cp2", f"{RING} --cp-log", quick=True),
    Case("Ring", "cp3", RING, 3),
    Case("Ring, overlap", "cp4", OVERLAP, 4),
    Case("Ring, KV cache full", "cp2", CACHED),
    Case("Ring, direct", "cp4", DIRECT, 4),
    Case("Double Ring", "cp4", DOUBLE, 4),
    Case("Hybrid", "cp4", HYBRID, 4, quick=True),
    Case("KV all-gather", "cp2", GATHER),
    Case("Ring", "cp2, RoPE, GQA, RMSNorm, SwiGLU", RING, shared=f"{LENGTH} {ROPE_GQA}", quick=True),
    Case("Ulysses", "cp4, RoPE, GQA, RMSNorm, SwiGLU", ULYSSES, 4, shared=f"{LENGTH} {ROPE_GQA}"),
    Case("Ring", "cp2 tp2, sequence parallel", RING, shared=f"{LENGTH} {TP}", tp_pp=2, quick=True),
    Case("Ulysses", "cp2 tp2, sequence parallel", ULYSSES, shared=f"{LENGTH} {TP}", tp_pp=2),
    Case("Ulysses", "cp2 pp2", ULYSSES, shared=f"{LENGTH} {PP}", tp_pp=2),
    Case("Ring", "cp2 pp2", f"{RING} --cp-log", shared=f"{LENGTH} {PP}", tp_pp=2),
    Case("Ring", "cp2 dp2, distributed optimizer", RING, shared=f"{LENGTH} {DISTRIBUTED_OPTIMIZER}", dp=2),
    Case("Ulysses", "cp2 dp2, distributed optimizer", ULYSSES, shared=f"{LENGTH} {DISTRIBUTED_OPTIMIZER}", dp=2),
    Case(
        "Ring", "cp2 tp2 pp2, distributed optimizer", RING, shared=f"{LENGTH} {TP_PP} {DISTRIBUTED_OPTIMIZER}", tp_pp=4
    ),
    Case(
        "Ring",
        "cp2 tp2 pp2 dp2, distributed optimizer",
        RING,
        shared=f"{LENGTH} {TP_PP} {DISTRIBUTED_OPTIMIZER}",
        tp_pp=4,
        dp=2,
    ),
    Case(
        "Hybrid", "cp4 tp2, distributed optimizer", HYBRID, 4, shared=f"{LENGTH} {TP} {DISTRIBUTED_OPTIMIZER}", tp_pp=2
    ),
    Case("Ring", "cp2, 61 tokens", RING, shared=UNEVEN, quick=True),
    Case("Ring", "cp2 pp2, 61 tokens", RING, shared=f"{UNEVEN} {PP}", tp_pp=2),
    Case("Ulysses, unaligned", "cp3, 61 tokens", UNALIGNED, 3, shared=f"{UNEVEN} {ROPE_GQA}"),
    Case("Hybrid", "cp4, 61 tokens", HYBRID, 4, shared=UNEVEN),
    Case("Ulysses", "cp2, per-token loss", ULYSSES, shared=f"{LENGTH} --calculate-per-token-loss"),
    Case("Ring", "cp2 pp2, per-token loss", RING, shared=f"{LENGTH} {PP} --calculate-per-token-loss", tp_pp=2),
    Case(
        "Ring",
        "cp2, full recompute",
        RING,
        shared=f"{LENGTH} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    Case("Ulysses", "cp2, selective recompute", ULYSSES, shared=f"{LENGTH} --recompute-granularity selective"),
    Case("Ring", "cp2, text", RING, text=True),
    Case("Ring", "cp2, text, documents", RING, shared=f"{LENGTH} {DOCUMENTS}", text=True, quick=True),
    Case("Ulysses", "cp2, text, documents", ULYSSES, shared=f"{LENGTH} {DOCUMENTS}", text=True),
    Case("Double Ring", "cp4, text, documents", DOUBLE, 4, shared=f"{LENGTH} {DOCUMENTS}", text=True),
    Case(
        "Hybrid",
        "cp4, text, documents, per-token loss",
        HYBRID,
        4,
        shared=f"{LENGTH} {DOCUMENTS} --calculate-per-token-loss",
        text=True,
    ),
    Case("Ring", "cp2, text, documents, no mask in the dataloader", RING, shared=f"{LENGTH} {DOCUMENTS}", text=True),
    *(
        Case(
            name,
            f"cp{cp}, text, documents that the batch brings",
            flags,
            cp,
            shared=f"{LENGTH} --dataloader-inter-document-masking --eod-mask-loss",
            text=True,
            quick=cp == 2,
            since="0.19",
        )
        for name, flags, cp in (("Ring", RING, 2), ("Ulysses", ULYSSES, 2), ("Hybrid", HYBRID, 4))
    ),
    Case("Ring", "cp2, legacy models", RING, shared=f"{LENGTH} {LEGACY}", before=NO_LEGACY),
    Case("Ulysses", "cp2, legacy models", ULYSSES, shared=f"{LENGTH} {LEGACY}", before=NO_LEGACY),
    Case("Ring", "cp2, checkpoint torch", RING, shared=f"{LENGTH} --ckpt-format torch", resume="torch"),
    Case(
        "Ring",
        "cp2, checkpoint torch_dist",
        RING,
        shared=f"{LENGTH} --ckpt-format torch_dist",
        resume="torch_dist",
        quick=True,
    ),
    Case(
        "Hybrid",
        "cp4, checkpoint torch_dist",
        HYBRID,
        4,
        shared=f"{LENGTH} --ckpt-format torch_dist",
        resume="torch_dist",
    ),
)


def context_parallel_flags(case):
    """Flags of the run with cp > 1 beyond the shared ones."""
    flags = ["--context-parallel-size", str(case.cp), *case.flags.split()]
    if "no mask" in case.parallelism:
        flags.append("--no-create-attention-mask-in-dataloader")
    return flags


def vocabulary_of_text(version):
    """--vocab-size with which token 256 ends a document: NullTokenizer adds that token to the number before 0.18."""
    return "256" if in_order(version) < [0, 18] else "257"


def runs_of(case, folder, text_prefix, version):
    """The runs that a case needs, as megatron_lm_runs.py wants them; the last is compared with the reference.

    A reference is named by its flags alone, so that cases share it. With ``resume`` the case trains two steps and
    saves, and a second run under cp = 1 (even case) loads and finishes: its last steps must be the reference's.
    """
    data = (
        [
            "--data-path",
            text_prefix,
            "--tokenizer-type",
            "NullTokenizer",
            "--vocab-size",
            vocabulary_of_text(version),
            "--data-cache-path",
            f"{folder}/cache",
        ]
        if case.text
        else MOCK
    )
    common = [*MODEL, *case.shared.split(), *data]
    ranks = case.reference_ranks
    reference = {"name": " ".join([f"ranks {ranks}", *common]), "world": ranks, "flags": common}
    flags = [*common, *context_parallel_flags(case)]
    if not case.resume:
        return reference, [{"name": case.name, "world": case.ranks, "flags": flags}]
    saved = f"{folder}/{case.name.replace(' ', '-').replace(',', '')}"
    save = {
        "name": f"{case.name}: save",
        "world": case.ranks,
        "flags": [*flags, "--exit-interval", "2", "--save", saved, "--save-interval", "2"],
    }
    back = {"name": f"{case.name}: resume with cp 1", "world": case.tp_pp, "flags": [*common, "--load", saved]}
    forth = {"name": case.name, "world": case.ranks, "flags": [*flags, "--load", saved]}
    return reference, [save, back, forth]

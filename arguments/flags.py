"""Every context-parallel flag, in one argparse group, each with its default, its choices and its rule."""

import re

from mindspeed_cp.arguments import given
from mindspeed_cp.arguments.mindspeed_flags import add_accepted_flags, refusal_of_algorithm, refuse_alibi

from mindspeed_cp.kernels import KERNELS
from mindspeed_cp.settings.algorithms import ALGORITHMS
from mindspeed_cp.settings.config import (
    BATCH_LAYOUTS,
    KV_CACHE_POLICIES,
    KV_EXCHANGES,
    MASK_TYPES,
    P2P_KINDS,
    TOPOLOGIES,
)

GROUP_TITLE = "context parallelism (mindspeed_cp)"
LAYOUTS = {
    "auto": "what the algorithm likes, and document_zigzag for a packed batch that arrives split",
    "contiguous": "one piece for each rank",
    "zigzag": "two chunks of the row for each rank, as Megatron cuts it",
    "document_zigzag": "two chunks of every document, as Megatron, verl and ms-swift cut packed batches",
    "balanced": "equal tokens, and equal work for the documents of the batch",
}
_CALCULATOR = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def add_context_parallel_arguments(parser):
    """Add every context-parallel flag that ``parser`` does not have yet, in one group; returns the parser.

    A wrong value ends the program with exit status 2 and one line: argparse would print the usage of all of Megatron's
    flags before it. Calling this twice changes nothing.
    """
    if getattr(parser, "reads_cp_config", False):
        return parser
    group = parser.add_argument_group(GROUP_TITLE)
    for names, options in _flags(parser):
        free = [name for name in names if name not in parser._option_string_actions]
        if names[0] in free:
            group.add_argument(*free, **options)
    add_accepted_flags(parser, lambda flag: _whole(parser, flag, -1))
    refuse_alibi(parser, _fail)
    given.install(parser, _fail)
    return parser


def _flags(parser):
    """(names, argparse options) of each flag; the first name decides whether the parser has it already."""
    yield from _size_flags(parser)
    yield from _ring_flags(parser)
    yield from _ulysses_flags(parser)
    yield from _kernel_flags(parser)


def _size_flags(parser):
    algorithms = "; ".join(f"{name}: {row.summary}" for name, row in ALGORITHMS.items())
    yield (
        ("--context-parallel-size",),
        dict(
            type=_whole(parser, "--context-parallel-size", 1),
            default=1,
            metavar="N",
            help="ranks over which each sequence is split. Default: 1, which switches context parallelism off. Rule: "
            "world size = tensor x context x pipeline x data parallel size.",
        ),
    )
    yield (
        ("--context-parallel-algo",),
        dict(
            type=_algorithm(parser),
            choices=list(ALGORITHMS),
            default="ulysses_cp_algo",
            help=f"how the ranks share the attention. Default: ulysses_cp_algo, or what --cp-comm-type names. Choices: "
            f"{algorithms}. Rule: Ulysses needs num-attention-heads divisible by tensor x context parallel size; the "
            "ring does not.",
        ),
    )
    yield (
        ("--cp-attention-mask-type", "--attention-mask-type"),
        dict(
            dest="cp_attention_mask_type",
            type=_choice(parser, "--cp-attention-mask-type", MASK_TYPES),
            choices=list(MASK_TYPES),
            default="causal",
            help="mask of self attention. Default: causal. Choices: causal: a token sees itself and what is before "
            "it; full: every token sees every token; general: the mask or the documents that come with the batch, "
            "else causal. Rule: a mask in the batch wins over this flag; GPT models want causal or general.",
        ),
    )
    kinds = "; ".join(f"{kind}: {LAYOUTS[kind]}" for kind in BATCH_LAYOUTS)
    yield (
        ("--cp-batch-layout",),
        dict(
            type=_choice(parser, "--cp-batch-layout", BATCH_LAYOUTS),
            choices=list(BATCH_LAYOUTS),
            default="auto",
            help=f"which tokens a rank holds. Default: auto. Choices: {kinds}. Rule: every algorithm computes every "
            "layout; document_zigzag needs documents that 2 x context parallel size divides.",
        ),
    )
    yield (
        ("--cp-log",),
        dict(
            action="store_true",
            help="every --log-interval steps rank 0 says what context parallelism sent, how long it waited and how "
            "unevenly, and writes it to TensorBoard. Default: off. Rule: needs --context-parallel-size above 1.",
        ),
    )
    yield (
        ("--cp-config",),
        dict(
            default=None,
            metavar="FILE.yaml",
            help="MindFormers YAML file with parallel_config, parallel and model.model_config. Default: none. Rule: a "
            "flag given on the command line wins over the file, and says so.",
        ),
    )


def _ring_flags(parser):
    yield (
        ("--cp-window-size",),
        dict(
            type=_whole(parser, "--cp-window-size", 1),
            default=1,
            metavar="W",
            help="inner window of Double Ring. Default: 1, the plain ring. Rule: smaller than the ring size (context "
            "parallel size, divided by the Ulysses degree in Hybrid) and a divisor of it; ring algorithms only.",
        ),
    )
    yield (
        ("--use-cp-send-recv-overlap",),
        dict(
            action="store_true",
            help="post each transfer before the block of attention that hides it. Default: off. Rule: ring algorithms "
            "only.",
        ),
    )
    yield (
        ("--cp-kv-exchange",),
        dict(
            type=_choice(parser, "--cp-kv-exchange", KV_EXCHANGES),
            choices=list(KV_EXCHANGES),
            default="ring",
            help="how keys and values reach the other ring ranks. Default: ring. Choices: ring: whole shards are "
            "forwarded; direct: each peer gets just the rows its mask needs; mesh: each step trades a slice of every "
            "shard over all links; auto: mesh where the ranks form one, else whichever sends less for the batch. Rule: "
            "direct and mesh need a ring algorithm and --cp-window-size 1.",
        ),
    )
    yield (
        ("--cp-in-flight",),
        dict(
            type=_steps(parser),
            default=1,
            metavar="N",
            help="steps of the exchange that may be under way at once, where nothing is forwarded: direct, mesh, and "
            "within the windows of Double Ring. Default: 1. Choices: a whole number; auto: by topology. Rule: at least "
            "1; what holds one step exists N + 1 times.",
        ),
    )
    yield (
        ("--cp-topology",),
        dict(
            type=_choice(parser, "--cp-topology", TOPOLOGIES),
            choices=list(TOPOLOGIES),
            default="auto",
            help="how ring ranks are linked. Default: auto. Choices: mesh: each pair by a link of its own; switch: any "
            "one peer at full rate; nodes: over several servers; auto: nodes where the ranks are on several hosts, "
            "else mesh on NPUs and switch elsewhere. Rule: --cp-kv-exchange auto and --cp-in-flight auto read it.",
        ),
    )
    yield (
        ("--cp-p2p",),
        dict(
            type=_choice(parser, "--cp-p2p", P2P_KINDS),
            choices=list(P2P_KINDS),
            default="auto",
            help="how messages between single ranks are posted. Default: auto. Choices: batch: those of one step "
            "together; isend: one after the other, in an order in which no ranks wait for each other in a circle; "
            "auto: batch, and isend on NPUs with virtual pipeline stages. Rule: ring algorithms only; HCCL allows no "
            "batches beside virtual pipeline stages, and three at a time on more than 500 ranks.",
        ),
    )
    policies = [policy for policy in KV_CACHE_POLICIES if policy]
    yield (
        ("--context-parallel-kv-cache-policy",),
        dict(
            type=_choice(parser, "--context-parallel-kv-cache-policy", policies),
            choices=policies,
            default=None,
            help="what forward keeps for backward. Default: none. Choices: full: the ring keeps received keys and "
            "values (saves communication), Ulysses keeps them as they were before communication (saves memory); half: "
            "the same for keys only. Rule: needs --context-parallel-size above 1 and flash attention.",
        ),
    )
    yield (
        ("--context-parallel-cache-interval",),
        dict(
            type=_whole(parser, "--context-parallel-cache-interval", 0),
            default=0,
            metavar="N",
            help="layers without the policy between two layers with it. Default: 0, every layer has it. Rule: needs a "
            "policy, and 0 <= N < num-layers.",
        ),
    )
    yield (
        ("--cp-keep-attention",),
        dict(
            action="store_true",
            help="recomputation takes attention from the forward pass instead of communicating and computing it again. "
            "Default: off. Rule: needs --context-parallel-size above 1, and --recompute-granularity full, or selective "
            "with core_attn.",
        ),
    )
    yield (
        ("--use-fused-ring-attention-update",),
        dict(
            action="store_true",
            help="merge blocks by the NPU's fused operator. Default: off. Rule: kernels without one ignore it, and "
            "say so.",
        ),
    )


def _ulysses_flags(parser):
    yield (
        ("--cp-ulysses-chunks",),
        dict(
            type=_whole(parser, "--cp-ulysses-chunks", 1),
            default=1,
            metavar="C",
            help="groups of heads that Ulysses exchanges one after the other, each while the one before it is "
            "computed. Default: 1, all heads at once. Rule: at most the heads of a rank; algorithms that split heads.",
        ),
    )
    yield (
        ("--ulysses-degree-in-cp",),
        dict(
            type=_whole(parser, "--ulysses-degree-in-cp", 1),
            default=None,
            metavar="U",
            help="ranks that split the heads in Hybrid. Default: none. Rule: hybrid_cp_algo needs it, 1 < U < context "
            "parallel size, and U divides the context parallel size.",
        ),
    )
    yield (
        ("--use-ulysses-allgather-kv",),
        dict(
            action="store_true",
            help="Ulysses gathers keys and values instead of replicating heads. Default: off. Rule: ulysses_cp_algo "
            "and grouped-query attention with one KV head per tensor-parallel rank.",
        ),
    )
    yield (
        ("--gather-size-calculator",),
        dict(
            type=_calculator(parser),
            default="default",
            metavar="{default,dynamic,package.module:Class}",
            help="where unaligned Ulysses finds the true sequence length. Default: default. Choices: default: "
            "aligned, the length "
            "is a multiple of the context parallel size; dynamic: any length, read from the batch; "
            "package.module:Class: "
            "your GatherSizeCalculator. Rule: ulysses_cp_algo, no KV cache policy, no legacy models.",
        ),
    )


def _kernel_flags(parser):
    yield (
        ("--cp-kernel",),
        dict(
            type=_choice(parser, "--cp-kernel", KERNELS),
            choices=list(KERNELS),
            default=None,
            help=f"attention kernel. Default: chosen by the device of the tensors. Choices: {', '.join(KERNELS)}. "
            "Rule: a kernel "
            "serves the device it is named after; blockwise serves every device.",
        ),
    )
    yield (
        ("--use-flash-attn",),
        dict(
            action="store_true",
            help="use the device's flash attention. Default: off. Rule: context parallelism needs it and switches it "
            "on.",
        ),
    )


def _fail(parser, message):
    parser.exit(2, f"{parser.prog}: error: {message}\n")


def _choice(parser, flag, choices):
    names = list(choices)

    def convert(text):
        if text not in names:
            _fail(parser, f"{flag} {text} is not known; choose one of {', '.join(names)}.")
        return text

    return convert


def _algorithm(parser):
    choose = _choice(parser, "--context-parallel-algo", ALGORITHMS)

    def convert(text):
        refusal = refusal_of_algorithm(text)
        if refusal:
            _fail(parser, refusal)
        return choose(text)

    return convert


def _whole(parser, flag, minimum):
    def convert(text):
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < minimum:
            _fail(parser, f"{flag} {text} must be a whole number of at least {minimum}; try {flag} {max(minimum, 1)}.")
        return int(text)

    return convert


def _steps(parser):
    whole = _whole(parser, "--cp-in-flight", 1)
    return lambda text: text if text == "auto" else whole(text)


def _calculator(parser):
    def convert(text):
        if text not in ("default", "dynamic") and not _CALCULATOR.fullmatch(text):
            _fail(
                parser,
                f"--gather-size-calculator {text} is not known; choose default or dynamic, or name your class as "
                "package.module:Class.",
            )
        return text

    return convert

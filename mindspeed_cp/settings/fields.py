"""The settings of ``ContextParallelConfig``, each declared once; setting.py says what a declaration contains."""

from dataclasses import dataclass
from typing import Literal, get_args

from mindspeed_cp.settings import layers
from mindspeed_cp.settings.algorithms import DEFAULT, known_algorithm, summaries
from mindspeed_cp.settings.setting import setting

MaskType = Literal["causal", "full", "general"]
KVCachePolicy = Literal["full", "half"]
KVExchange = Literal["ring", "direct", "mesh", "auto"]
Topology = Literal["auto", "mesh", "switch", "nodes"]
P2P = Literal["auto", "batch", "isend"]
LinearExchange = Literal["heads", "state"]
BatchLayout = Literal["auto", "contiguous", "zigzag", "document_zigzag", "balanced"]

MASK_TYPES: tuple[MaskType, ...] = get_args(MaskType)
KV_CACHE_POLICIES: tuple[KVCachePolicy | None, ...] = (None, *get_args(KVCachePolicy))


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What one context-parallel group computes and how: values, from which --help and docs/flags.md are generated."""

    context_parallel_size: int = setting(
        1,
        flag="--context-parallel-size",
        keys=("parallel_config.context_parallel", "parallel_config.context_parallel_size"),
        help="ranks over which each sequence is split; 1 switches context parallelism off",
        rule="world size = tensor x context x pipeline x data parallel size",
        takes="N",
        least=1,
        least_means="1 switches it off",
        variable="CP",
    )
    algorithm: str = setting(
        DEFAULT,
        flag="--context-parallel-algo",
        keys=("parallel_config.context_parallel_algo",),
        help="how the ranks share the attention",
        rule="Ulysses needs num-attention-heads divisible by tensor x context parallel size, the ring does not; if it "
        "is not given, --cp-comm-type determines it",
        meanings=summaries,
        parse=known_algorithm,
        variable="CP_ALGO",
    )
    layer_algorithms: str | None = setting(
        None,
        flag=layers.FLAG,
        help="layers with an algorithm or settings of their own, such as 0-3:ulysses_cp_algo,4-:megatron_cp_algo",
        rule="entries LAYERS:ALGORITHM, with further settings as :flag=value; layers count from 0 over the whole model "
        "(3, 0-3, 4-, 5-/6: every sixth from 5); each is named at most once, and its entry takes from the run what it "
        "does not name",
        takes="LAYERS:SETTINGS,...",
        see="[A choice for each layer](choosing.md#a-choice-for-each-layer)",
    )
    attention_mask_type: MaskType = setting(
        "causal",
        flag="--cp-attention-mask-type",
        also=("--attention-mask-type",),
        help="what a layer sees if its batch contains no mask",
        rule="a mask in the batch always wins over this flag; GPT models need causal or general",
        meanings={
            "causal": "a token sees itself and earlier tokens",
            "full": "every token sees every token",
            "general": "the mask or the documents of the batch, else causal",
        },
        shares=False,
    )
    ulysses_degree: int | None = setting(
        None,
        flag="--ulysses-degree-in-cp",
        keys=("parallel_config.ulysses_degree_in_cp",),
        help="ranks that split the heads in Hybrid",
        rule="1 < U < context parallel size, and U divides it; if hybrid_cp_algo gets none, the command line takes "
        "the largest that fits the heads of a rank and the ranks of a node, with a notice",
        takes="U",
        least=1,
        least_means="leave it out if no ranks split the heads",
        taken_by=lambda row: row.takes_degree,
        ignored="only {takers} reads it, not {algorithm}",
        variable="ULYSSES_DEGREE",
        by_layer=lambda row: row.takes_degree,
    )
    batch_layout: BatchLayout = setting(
        "auto",
        flag="--cp-batch-layout",
        help="which tokens a rank holds",
        rule="every algorithm computes every layout; document_zigzag needs documents that 2 x context parallel size "
        "divides",
        meanings={
            "auto": "the algorithm's default, and document_zigzag for a packed batch that arrives split",
            "contiguous": "one piece for each rank",
            "zigzag": "two chunks of the row for each rank, as Megatron splits it",
            "document_zigzag": "two chunks of every document, as Megatron, verl and ms-swift split packed batches",
            "balanced": "equal tokens, and equal work for the documents of the batch",
        },
        see="[Batch layouts](batch-layouts.md)",
    )
    ranks_per_node: int | None = setting(
        None,
        flag="--cp-ranks-per-node",
        help="consecutive context-parallel ranks that share a node; the balanced layout then keeps the parts of a "
        "document within one node if possible",
        rule="used by --cp-batch-layout balanced, and by auto if it is balanced; if ranks are numbered node by node, "
        "devices of a node / tensor-parallel size",
        takes="N",
        least=1,
        least_means="leave it out if the nodes are not known",
    )
    window_size: int = setting(
        1,
        flag="--cp-window-size",
        help="inner window of Double Ring; 1 is the plain ring",
        rule="a divisor of the ring size (context parallel size, divided by the Ulysses degree in Hybrid); the ring "
        "size itself is one window, the plain ring",
        takes="W",
        least=1,
        least_means="1 is the plain ring",
        taken_by=lambda row: row.takes_window,
        ignored="{algorithm} has no ring windows",
        variable="CP_WINDOW",
        by_layer=lambda row: row.takes_window,
    )
    kv_exchange: KVExchange = setting(
        "ring",
        flag="--cp-kv-exchange",
        help="how keys and values reach the other ring ranks",
        rule="direct and mesh need a ring algorithm and window size 1",
        meanings={
            "ring": "whole shards are forwarded",
            "direct": "each peer gets only the rows that its mask needs",
            "mesh": "each step exchanges a slice of every shard over all links",
            "auto": "mesh if the ranks form one, else whichever sends less for the batch",
        },
        see="[Mesh exchange](algorithms/mesh-exchange.md)",
        variable="KV_EXCHANGE",
        by_layer=lambda row: row.exchange == "ring",
    )
    in_flight: int | Literal["auto"] = setting(
        1,
        flag="--cp-in-flight",
        help="steps of direct, of mesh, or of a window of Double Ring that may be in flight at once",
        rule="the buffers of a step exist N + 1 times",
        meanings={"auto": "by topology"},
        takes="N",
        least=1,
        least_means="1 is one step at a time",
        by_layer=lambda row: row.exchange == "ring",
    )
    topology: Topology = setting(
        "auto",
        flag="--cp-topology",
        help="how ring ranks are linked",
        rule="--cp-kv-exchange auto and --cp-in-flight auto read it",
        meanings={
            "auto": "nodes if the ranks are on several hosts, else mesh on NPUs and switch elsewhere",
            "mesh": "a separate link for each pair",
            "switch": "any one peer at full rate",
            "nodes": "over several servers",
        },
    )
    mla_exchange: Literal["latent", "heads", "auto"] = setting(
        "auto",
        flag="--cp-mla-exchange",
        help="what multi-latent attention sends as keys and values",
        rule="latent needs Megatron's own up-projection, without fp8; it has no effect on other attention",
        meanings={
            "latent": "the latent and the rotated part of the key; every rank computes keys and values from them",
            "heads": "keys and values of all heads",
            "auto": "latent if the bytes that it saves are worth computing keys and values on every rank",
        },
        see="[Latent exchange](choosing.md#latent-exchange)",
        by_layer=lambda row: True,
    )
    ulysses_chunks: int = setting(
        1,
        flag="--cp-ulysses-chunks",
        help="groups of heads that Ulysses exchanges one after another, each while the previous one is computed",
        rule="at most the heads of a rank",
        takes="C",
        least=1,
        least_means="1 exchanges all heads at once",
        taken_by=lambda row: row.splits_heads,
        ignored="{algorithm} exchanges no heads",
        see="[Chunks of heads](algorithms/ulysses.md#in-chunks-of-heads)",
        by_layer=lambda row: row.splits_heads,
    )
    linear_exchange: LinearExchange = setting(
        "heads",
        flag="--cp-linear-exchange",
        help="what travels for layers with a recurrent state (gated delta nets, Mamba)",
        rule="heads needs a head for each rank",
        meanings={
            "heads": "tokens, so that every rank computes some heads of the whole sequence",
            "state": "one state per rank, whatever the length; every rank computes its own part of the sequence",
        },
        see="[Linear attention](linear-attention.md)",
    )
    p2p: P2P = setting(
        "auto",
        flag="--cp-p2p",
        help="how messages between single ranks are posted",
        rule="ring algorithms only; HCCL allows no batches with virtual pipeline stages, and only three at a time on "
        "more than 500 ranks",
        meanings={
            "auto": "as a batch, and isend on NPUs with virtual pipeline stages",
            "batch": "those of one step together",
            "isend": "one after another, in an order without deadlock",
        },
        taken_by=lambda row: row.exchange == "ring",
        ignored="{algorithm} sends no messages between single ranks",
    )
    kv_cache_policy: KVCachePolicy | None = setting(
        None,
        flag="--context-parallel-kv-cache-policy",
        help="what forward keeps for backward",
        rule="needs --context-parallel-size above 1 and flash attention",
        meanings={
            "full": "the ring keeps received keys and values (saves communication), Ulysses keeps them as they were "
            "before communication (saves memory)",
            "half": "the same for keys only",
        },
        see="[KV cache](choosing.md#what-the-kv-cache-policies-save-and-cost)",
        variable="KV_CACHE_POLICY",
        by_layer=lambda row: True,
    )
    kv_cache_interval: int = setting(
        0,
        flag="--context-parallel-cache-interval",
        help="layers without the policy between two layers with it: it applies to layers with layer mod (N + 1) = 1, "
        "counted from 1; 0 applies it to every layer",
        rule="needs a policy, and N < num-layers",
        takes="N",
        least=0,
        least_means="0 applies the policy to every layer",
    )
    allgather_kv: bool = setting(
        False,
        flag="--use-ulysses-allgather-kv",
        help="Ulysses gathers the one KV head of a rank instead of replicating it",
        rule="ulysses_cp_algo and grouped-query attention with one KV head per tensor-parallel rank",
        by_layer=lambda row: row.splits_heads and row.exchange is None,
    )
    send_recv_overlap: bool = setting(
        False,
        flag="--use-cp-send-recv-overlap",
        help="post each transfer before the block of attention that hides it",
        rule="algorithms that send around a ring",
        taken_by=lambda row: row.exchange is not None,
        ignored="{algorithm} sends nothing around a ring",
        by_layer=lambda row: row.exchange is not None,
    )
    alltoall: bool = setting(
        True,
        keys=("parallel.enable_alltoall",),
        names=("cp_enable_alltoall",),
        help="False replaces all-to-all by all-gather and slicing, with the same results",
        taken_by=lambda row: row.splits_heads,
        ignored="{algorithm} uses no all-to-all",
    )
    keep_attention: bool = setting(
        False,
        flag="--cp-keep-attention",
        keys=("parallel_config.keep_attention",),
        help="recomputation reuses attention of the forward pass instead of communicating and computing it again; for "
        "Megatron's checkpoints; with torch's own, pass kept to context_parallel_attention",
        rule="needs --context-parallel-size above 1; ignored without --recompute-granularity full, or selective with "
        "core_attn",
        see="[Recomputation](choosing.md#attention-kept-across-recomputation)",
    )
    log: bool = setting(
        False,
        flag="--cp-log",
        help="every --log-interval steps rank 0 says what context parallelism sent, how long it waited and how "
        "unevenly, and writes it to TensorBoard",
        rule="ignored with --context-parallel-size 1",
        see="[Why is it slow?](troubleshooting.md#why-is-it-slow)",
    )

"""Read a model and its training's sizes from Megatron's own flags, with Megatron's defaults but without Megatron."""

import ast
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_cp.arguments.launch import bare_parser, known_flags, read_flags
from mindspeed_cp.planner.models import Experts, Indexer, Latent, Linear, ModelShape

NUMBERS = {
    "ffn-hidden-size": None, "vocab-size": None, "padded-vocab-size": None,
    "global-batch-size": None, "num-experts": None, "moe-router-topk": 2,
    "moe-ffn-hidden-size": None, "moe-shared-expert-intermediate-size": None, "expert-model-parallel-size": None,
    "expert-tensor-parallel-size": None, "q-lora-rank": None, "kv-lora-rank": 32, "qk-head-dim": 128,
    "qk-pos-emb-head-dim": 64, "v-head-dim": 128,
    "linear-num-key-heads": 16, "linear-num-value-heads": 32, "linear-key-head-dim": 128,
    "linear-value-head-dim": 128, "linear-conv-kernel-dim": 4, "dsa-indexer-n-heads": None,
    "dsa-indexer-head-dim": None, "dsa-indexer-topk": None,
}  # fmt: skip
SWITCHES = (
    "swiglu", "quick-geglu", "untie-embeddings-and-output-weights", "disable-bias-linear", "attention-output-gate",
)  # fmt: skip
NEEDED = ("num-layers", "hidden-size", "num-attention-heads", "vocab-size")
# Flags that change sizes in ways that the planner does not know.
REFUSED = (
    "mtp-num-layers", "hybrid-override-pattern", "hybrid-attention-ratio", "hybrid-mlp-ratio", "is-hybrid-model",
    "moe-latent-size", "window-size", "heterogeneous-layers-config-path",
    "heterogeneous-layers-config-encoded-json", "encoder-num-layers", "decoder-first-pipeline-num-layers",
    "decoder-last-pipeline-num-layers", "pipeline-model-parallel-layout",
)  # fmt: skip
# The planner's name of a size -> Megatron's flag
SIZES = {
    "seq_length": "seq-length", "micro_batch": "micro-batch-size", "global_batch": "global-batch-size",
    "tp": "tensor-model-parallel-size", "pp": "pipeline-model-parallel-size", "cp": "context-parallel-size",
    "ep": "expert-model-parallel-size", "etp": "expert-tensor-parallel-size",
}  # fmt: skip
LARGEST = 1 << 16  # largest number in a pattern of layers


@dataclass(frozen=True)
class MegatronFlags:
    """The contents of a Megatron command line.

    Args:
        sizes: the given sizes of SIZES. mask_type: from --cp-attention-mask-type, with "general" as causal.
        missing: flags that are missing to describe a model.
    """

    args: Namespace
    sizes: dict[str, int]
    missing: tuple[str, ...]

    @property
    def mask_type(self) -> str:
        return "full" if self.args.cp_attention_mask_type == "full" else "causal"

    def model(self, vocab: int | None = None) -> ModelShape:
        """The model that the command line describes.

        Args:
            vocab: vocabulary size, if the command line does not contain it.

        Raises:
            ValueError: a size is missing, or sizes are inconsistent.
        """
        entries: int = self.args.vocab_size or self.args.padded_vocab_size or vocab or 0
        missing = [name for name in self.missing if name != "vocab-size" or not entries]
        if missing:
            flags = ", ".join(f"--{name}" for name in missing)
            raise ValueError(f"{flags} not given; a model by Megatron's flags needs all of them, or give --model.")
        args, gated = self.args, self.args.swiglu or self.args.quick_geglu
        heads, kv_heads, dk, dv = attention_sizes(args)
        hidden, layers = args.hidden_size, args.num_layers
        ffn = args.ffn_hidden_size or (hidden * 8 // 3 // 64 * 64 if args.swiglu else 4 * hidden)
        latent = None
        if args.multi_latent_attention:
            latent = Latent(args.q_lora_rank or 0, args.kv_lora_rank, args.qk_pos_emb_head_dim)
        tied, experts = not args.untie_embeddings_and_output_weights, _experts(args, ffn)
        linear, indexer = _variant(args, latent)
        learned = args.position_embedding_type in (None, "learned_absolute")  # Megatron's default
        sizes = layers, heads, kv_heads, dk, dv, hidden, ffn, entries
        others = {"linear": linear, "indexer": indexer, "output_gate": args.attention_output_gate}
        return ModelShape(*sizes, gated, tied, latent, experts, learned, **others)


def parsed(flags: Sequence[str]) -> tuple[Namespace, list[str]]:
    """(the flags of context parallelism and of a model's sizes, the other words).

    Raises:
        ValueError: the value of a flag is wrong.
    """
    args, rest = read_flags(flags)
    parser = bare_parser("plan")
    for flag, default in NUMBERS.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    for flag in SWITCHES:
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--moe-layer-freq", default="1")
    parser.add_argument("--linear-attention-freq")
    parser.add_argument("--experimental-attention-variant")
    sizes, rest = known_flags(parser, rest)
    args = Namespace(**vars(args), **vars(sizes))
    for name in sorted(_named(flags) & {*NUMBERS, *NEEDED, *SIZES.values(), "num-query-groups", "kv-channels"}):
        value = getattr(args, name.replace("-", "_"))
        if value is not None and value < (0 if name == "num-experts" else 1):
            raise ValueError(f"--{name} {value} must be at least 1; give 1 or more, or leave it out.")
    return args, rest


def _named(flags: Sequence[str]) -> set[str]:
    return {token.partition("=")[0].removeprefix("--") for token in flags if token.startswith("--")}


def attention_sizes(args: Namespace) -> tuple[int, int, int, int]:
    """(query heads, KV heads, head dimension of keys, head dimension of values) of attention.

    Raises:
        ValueError: --hidden-size is not a multiple of the heads.
    """
    heads = args.num_attention_heads
    if args.multi_latent_attention:
        return heads, heads, args.qk_head_dim + args.qk_pos_emb_head_dim, args.v_head_dim
    kv_heads = args.num_query_groups if args.group_query_attention and args.num_query_groups else heads
    if args.hidden_size % heads and not args.kv_channels:
        raise ValueError(
            f"--hidden-size {args.hidden_size} must be divisible by --num-attention-heads {heads}; or give "
            "--kv-channels."
        )
    dim = args.kv_channels or args.hidden_size // heads
    return heads, kv_heads, dim, dim


def read(flags: Sequence[str]) -> MegatronFlags:
    """Parse a command line; flags without effect on sizes are ignored.

    Raises:
        ValueError: a value is wrong, or a flag changes sizes in a way that the planner does not know.
    """
    args, _ = parsed(flags)
    named = _named(flags)
    refused = [name for name in REFUSED if name in named]
    if refused:
        raise ValueError(f"--{refused[0]} is not known to the planner; leave it out for a plan without it.")
    sizes = {ours: getattr(args, flag.replace("-", "_")) for ours, flag in SIZES.items() if flag in named}
    return MegatronFlags(args, sizes, tuple(name for name in NEEDED if name not in named))


def _experts(args: Namespace, ffn: int) -> Experts | None:
    if not args.num_experts:
        return None
    shared = args.moe_shared_expert_intermediate_size or 0
    pattern = layer_pattern(args.moe_layer_freq, args.num_layers)
    width, bias = args.moe_ffn_hidden_size or ffn, not args.disable_bias_linear
    try:
        return Experts(args.num_experts, args.moe_router_topk, width, shared, pattern, bias)
    except ValueError as error:
        raise ValueError(f"--moe-router-topk: {error}") from None


def _variant(args: Namespace, latent: Latent | None) -> tuple[Linear | None, Indexer | None]:
    """Return what --experimental-attention-variant selects: (layers instead of attention, indexer of its keys).

    Raises:
        ValueError: it is not known, or flags that it needs are missing.
    """
    variant = args.experimental_attention_variant
    flag = f"--experimental-attention-variant {variant}"
    if variant == "gated_delta_net":
        if args.linear_attention_freq is None:
            raise ValueError(f"{flag} needs --linear-attention-freq; give 4 if every fourth layer is attention.")
        names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
        sizes = (getattr(args, f"linear_{name}") for name in names)
        return Linear(*sizes, layers=_linear_layers(args.linear_attention_freq, args.num_layers)), None
    if variant == "dsa":
        indexer = args.dsa_indexer_n_heads, args.dsa_indexer_head_dim, args.dsa_indexer_topk
        if latent is None or None in indexer:
            raise ValueError(
                f"{flag} needs --multi-latent-attention, --dsa-indexer-n-heads, --dsa-indexer-head-dim and "
                "--dsa-indexer-topk; give them all."
            )
        return None, Indexer(*indexer)
    if variant is not None:
        raise ValueError(f"{flag} is not known to the planner; leave it out for a plan without it.")
    return None, None


def _linear_layers(text: str, layers: int) -> tuple[bool, ...]:
    """Which layers have a state: all but every n-th, or those with 1 in a list."""
    if text.strip().isdecimal() and int(text) > 0:
        return tuple((layer + 1) % int(text) > 0 for layer in range(layers))
    return layer_pattern(text, layers, "linear-attention-freq")


def layer_pattern(text: str, layers: int, name: str = "moe-layer-freq") -> tuple[bool, ...]:
    """Which layers have experts, from --moe-layer-freq: every n-th from the first, or a list such as ([0]*3+[1]*58).

    Raises:
        ValueError: it is neither, or the list does not have one entry per layer.
    """
    flag = f"--{name} {text}"
    try:
        value = _evaluated(ast.parse(text.strip(" '\""), mode="eval").body)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{flag} is neither a number nor a list; write 2, or ([0]*3+[1]*58).") from error
    if isinstance(value, int):
        if value < 1:
            raise ValueError(f"{flag} must be at least 1.")
        return tuple(layer % value == 0 for layer in range(layers))
    if len(value) != layers or not set(value) <= {0, 1}:
        raise ValueError(f"{flag} must be a 0 or a 1 for each of --num-layers {layers}; it is {len(value)} numbers.")
    return tuple(map(bool, value))


def _evaluated(node: ast.expr) -> int | list[int]:
    """Evaluate numbers, lists of numbers, their sums and multiples."""
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value <= LARGEST:
        return node.value
    if isinstance(node, ast.List):
        items = [_evaluated(item) for item in node.elts]
        return [item for item in items if isinstance(item, int)]
    if isinstance(node, ast.BinOp):
        left, right = _evaluated(node.left), _evaluated(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int):
            if len(left) * right <= LARGEST:
                return left * right
    raise ValueError("not such a pattern")

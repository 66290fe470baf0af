"""The census: all code of Megatron that reads or splits the sequence axis, and how it is handled here.

tests/megatron/test_census.py reads Megatron's sources and finds classes that are missing in the table. In a version
that was not tried, ``Census.check`` finds them when a module of such a class is built.
"""

import inspect
import textwrap
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from mindspeed_cp.megatron.sources import reading
from mindspeed_cp.settings.notices import warn_rank0

Version = tuple[int, int]
Handled = Literal["exact", "by layout", "alone", "refused"]
CORE = "megatron.core."
LIBRARIES = ("torch", "megatron", "transformer_engine", "apex", "mindspeed", "mindspeed_cp", "torch_npu")


@dataclass(frozen=True)
class Entry:
    """How a class or function of Megatron, or everything in a module, is handled with context parallelism.

    Args:
        how: exact: a replacement computes it over its module's group. by layout: Megatron's own code runs between
            exchanges that follow the layout of the batch. alone: it computes nothing along the sequence. refused: no
            module of it is built.
        why: one sentence.
        instead: what to use instead, if it is refused.
        versions: half-open range (first, last + 1) of versions for which this holds, None for no limit.
        setting: field of TransformerConfig; a module is refused only if it is on, "" refuses always.
    """

    how: Handled
    why: str
    instead: str = ""
    versions: tuple[Version | None, Version | None] = (None, None)
    setting: str = ""

    def holds(self, version: Version) -> bool:
        first, behind = self.versions
        return (first is None or version >= first) and (behind is None or version < behind)


def _refused(why: str, instead: str) -> Entry:
    return Entry("refused", why, instead)


_MODEL = Entry("exact", "runs with the record of its batch, and its attention over its own group")
_CORE = Entry("exact", "computed over the group of its module, whichever class computed it before")
_LATENT = Entry(
    "refused",
    "keeps, with fused rotary embeddings, one rank's part of them for batches of any layout",
    "--no-rope-fusion (apply_rope_fusion=False)",
    ((0, 14), None),
    "apply_rope_fusion",
)
_SPARSE_BEFORE = Entry(
    "refused",
    "takes a rank's part for the whole sequence before 0.19",
    "a megatron-core of 0.19 or later, or latent attention without a sparse indexer (leave out "
    "--experimental-attention-variant)",
    (None, (0, 19)),
)
_SPARSE = Entry("by layout", "gathers keys and indexes itself, and finds them where the layout of the batch says")
_ATTENTION = Entry("exact", "core attention inside it is computed over the whole sequence; it projects tokens alone")
_ROTARY = Entry("exact", "positions are those of the batch's layout")
_STATES = Entry("by layout", "sees the whole sequence in order for a part of the heads")
_SETTINGS = Entry("alone", "settings, recorded graphs and groups for modules; nothing of a sequence")
_TOWER = _refused(
    "sees whole images or sounds, which are not split",
    "context_parallel_size 1 in the configuration of the tower: it is then computed on each rank alone",
)
_EMBEDDINGS = "models.common.embeddings"


def _all(prefix: str, names: str, *entries: Entry) -> dict[str, tuple[Entry, ...]]:
    return {f"{prefix}.{name}": entries for name in names.split()}


# Paths after "megatron.core." of a class, a function, or a module or package with all its contents; of several entries
# the first one that holds for the version is used.
CENSUS: dict[str, tuple[Entry, ...]] = {
    # Models.
    **_all("models.common.language_module.language_module", "LanguageModule", _MODEL),
    **_all("models", "gpt.gpt_model.GPTModel mamba.mamba_model.MambaModel hybrid.hybrid_model.HybridModel", _MODEL),
    **_all(
        "models.T5.t5_model",
        "T5Model t5_position_ids",
        Entry("exact", "positions are those of the layout; an encoder and a decoder of different lengths are refused"),
    ),
    **_all("models.bert.bert_model", "BertModel", Entry("exact", "learned positions are those of the layout")),
    **_all(
        "models.bert",
        "pooler",
        _refused(
            "pools the first token that a rank holds, not that of the sequence",
            "--bert-no-binary-head (add_binary_head=False)",
        ),
    ),
    **_all("models", "retro", _refused("looks up neighbours for chunks of the whole sequence", "a GPT model")),
    **_all(
        "models",
        "multimodal mimo",
        _refused(
            "mixes images into the text and splits the result for itself",
            "its language model alone, with what that gets split by state().shard_batch (docs/vision-language.md)",
        ),
    ),
    **_all("models", "vision.clip_vit_model vision.radio huggingface audio", _TOWER),
    # Positions.
    **_all(
        f"{_EMBEDDINGS}.rope_utils",
        "get_pos_emb_on_this_cp_rank _get_thd_freqs_on_this_cp_rank _apply_rotary_pos_emb_thd apply_rotary_pos_emb",
        _ROTARY,
    ),
    **_all(f"{_EMBEDDINGS}.rotary_pos_embedding", "RotaryEmbedding MultimodalRotaryEmbedding", _ROTARY),
    **_all(f"{_EMBEDDINGS}.yarn_rotary_pos_embedding", "YarnRotaryEmbedding", _ROTARY),
    **_all(
        "fusions",
        "fused_mla_yarn_rope_apply",
        Entry("alone", "reached from latent attention with fused rotary embeddings, which is refused"),
    ),
    # Attention.
    **_all("transformer", "attention.Attention transformer_layer.TransformerLayer", _ATTENTION),
    **_all("transformer.dot_product_attention", "DotProductAttention", _CORE),
    **_all("extensions.transformer_engine", "TEDotProductAttention", _CORE),
    **_all("transformer.multi_latent_attention", "MultiLatentAttention", _LATENT, _ATTENTION),
    **_all("transformer.multi_latent_attention", "MLASelfAttention", _ATTENTION),
    **_all("transformer", "experimental_attention_variant", _SPARSE_BEFORE, _SPARSE),
    **_all("transformer.experimental_attention_variant", "absorbed_mla", _SPARSE_BEFORE, _LATENT, _ATTENTION),
    # Layers.
    **_all("transformer.module", "MegatronModule GraphableMegatronModule", _SETTINGS),
    **_all("transformer.transformer_config", "TransformerConfig", _SETTINGS),
    **_all("transformer.moe.moe_utils", "get_default_pg_collection get_default_model_comm_pgs", _SETTINGS),
    **_all(
        "transformer.multi_token_prediction",
        "roll_tensor _roll_tensor_packed_seq process_mtp_loss MultiTokenPredictionLayer MultiTokenPredictionBlock",
        Entry("exact", "tokens are shifted within the whole sequence, document by document"),
    ),
    **_all(
        "transformer.moe.router",
        "Router TopKRouter",
        Entry("exact", "losses weigh a rank's tokens by its share of the sequence"),
    ),
    # State space.
    **_all(
        "ssm.mamba_mixer",
        "MambaMixer",
        Entry(
            "refused",
            "takes a rank's part for the whole sequence before 0.13",
            "a megatron-core of 0.13 or later",
            (None, (0, 13)),
        ),
        _STATES,
    ),
    **_all("ssm", "mamba_context_parallel", _STATES),
    **_all(
        "ssm",
        "gated_delta_net",
        Entry("exact", "computed by heads of the whole sequence or by states that go from rank to rank"),
    ),
}


def entry_of(path: str, version: Version) -> Entry | None:
    """The entry of a class or function by its path after "megatron.core.", or of the module or package that has it."""
    while path:
        for entry in CENSUS.get(path, ()):
            if entry.holds(version):
                return entry
        path = path.rpartition(".")[0]
    return None


@dataclass(frozen=True)
class Census:
    """The table for one version of Megatron.

    Args:
        megatron: version of megatron-core, as it reports it.
        tried: versions that were tried, in which all classes that read the sequence axis are in the table.
        trusted: names of classes, with or without their module, that are built anyway (--cp-trust).
    """

    megatron: str
    tried: frozenset[Version]
    trusted: frozenset[str] = frozenset()

    @property
    def version(self) -> Version:
        major, minor, *_ = self.megatron.split(".")
        return int(major), int(minor)

    def check(self, cls: type, config: Any) -> None:
        """Refuse to build a module that would treat a rank's part of the sequence as all of it.

        Args:
            config: the module's TransformerConfig, with context_parallel_size above 1.

        Raises:
            ValueError: the class is refused; the message names it and a way out.
        """
        if self._is_trusted(cls):
            return
        for base in cls.__mro__:
            if base.__module__.startswith(CORE) and (why := self._against(base, config)):
                raise ValueError(
                    f"{cls.__name__} with --context-parallel-size {config.context_parallel_size}: {base.__name__} "
                    f"{why}; --cp-trust {cls.__name__} builds it anyway, once `python -m mindspeed_cp.prove` "
                    "has shown that it is exact."
                )

    def take(self, model: torch.nn.Module) -> None:
        """Check every module of a model, also those that were added later, and list the user's own classes.

        Raises:
            ValueError: a class is refused; the message names it and a way out.
        """
        own: dict[str, None] = {}
        for module in model.modules():
            cls, config = type(module), getattr(module, "config", None)
            if getattr(config, "context_parallel_size", 1) > 1:
                self.check(cls, config)
            if cls.__module__.partition(".")[0] not in LIBRARIES and "forward" in vars(cls):
                own[cls.__name__] = None
        if names := [name for name in own if name not in self.trusted]:
            warn_rank0(
                f"modules of your own in {type(model).__name__}: {', '.join(names)}. With context parallelism each "
                "gets a rank's part of the sequence; what looks from one token to another must gather it "
                "(state().gather_sequence). --cp-trust NAME leaves this line out."
            )

    def _is_trusted(self, cls: type) -> bool:
        return not self.trusted.isdisjoint((cls.__name__, f"{cls.__module__}.{cls.__name__}"))

    def _against(self, cls: type, config: Any) -> str:
        """Why a class of Megatron is refused, and what to do instead; "" if it is not refused."""
        entry = entry_of(f"{cls.__module__.removeprefix(CORE)}.{cls.__name__}", self.version)
        if entry is None and self.version not in self.tried and (sign := _read_in(cls)):
            return (
                f"of megatron-core {self.megatron}, a version that was not tried, reads the sequence axis ({sign}), "
                "and the census does not say how; use --context-parallel-size 1, or a megatron-core that was tried"
            )
        if entry is None or entry.how != "refused" or not getattr(config, entry.setting or "context_parallel_size"):
            return ""
        return f"{entry.why}; use --context-parallel-size 1, or {entry.instead}"


@cache
def _read_in(cls: type) -> str:
    """What in a class's source reads the sequence axis, "" for nothing."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return "its source is not available"
    return reading(source).get(cls.__name__, "")

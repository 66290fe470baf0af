"""What determines the configuration: flags or ``configure`` at once, a framework's settings, or a TransformerConfig.

Settings may leave the context-parallel size to initialize_model_parallel, or to the group that a module was built with,
and the algorithm to ``cp_comm_type`` of the model's configuration, which is created after the process groups.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mindspeed_cp.arguments import FrameworkSettings
from mindspeed_cp.arguments.settings import Resolved
from mindspeed_cp.comm.groups import ContextParallelGroups, hierarchies
from mindspeed_cp.megatron.scopes import SINGLE
from mindspeed_cp.settings.algorithms import ALGORITHMS, Hierarchy
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.layers import LayerEntry, written
from mindspeed_cp.settings.training_setup import TrainingSetup, resolve


@dataclass(frozen=True)
class OpenDecision:
    """What is known while the configuration is not complete.

    Args:
        settings: a framework's settings, empty at first.
        comm_type: cp_comm_type of the TransformerConfig.
        sizes: hierarchical_context_parallel_sizes of initialize_model_parallel.
    """

    settings: FrameworkSettings = FrameworkSettings({})
    comm_type: str | tuple[str, ...] | None = None
    sizes: tuple[int, ...] | None = None

    @property
    def names_algorithm(self) -> bool:
        return self.settings.names_algorithm or self.comm_type is not None or self.sizes is not None

    def resolved(self, cp_size: int) -> Resolved:
        comm_type = self.comm_type or ("a2a+p2p" if self.sizes else None)
        return self.settings.resolve(
            context_parallel_size=cp_size,
            cp_comm_type=None if self.settings.names_algorithm else comm_type,
            hierarchical_context_parallel_sizes=self.sizes,
        )


@dataclass
class Settings:
    """The settings, from whichever API.

    Args:
        config: the configuration; None until it is decided (Ulysses if nothing decides it).
        setup: TrainingSetup, None for scripts that use only megatron-core.
        kernel: name of an attention kernel, None to choose by device.
        documents_from_position_ids: if the batch has no mask, a document begins where position ids restart at 0.
        end_of_document: the last token of each document if the batch has no mask and position ids are not used, or
            a function () -> token, which is called when a batch is split.
        image_token_id: the token of image patches, which see each other inside causal text; or None.
        asked_for_flash: --use-flash-attn was given, as a flag or in a framework's settings.
        declared: how a framework says that it splits whole rows itself; None if it does not say.
        undecided: what is still to be decided; None once ``configure`` has decided everything.
        compared: flag -> value of further settings that must be equal on all ranks.
        program: the program whose flags they are; errors then end the program with one line instead of an exception.
        by_mindspeed: the settings came through MindSpeed, with its default algorithm.
        moving_targets: Megatron's arguments, if MindSpeed-LLM's model shifts the targets by one token because of them;
            they are then shifted here, before the split (targets.py). Else None.
    """

    config: ContextParallelConfig | None = None
    setup: TrainingSetup | None = None
    kernel: str | None = None
    documents_from_position_ids: bool = False
    end_of_document: int | Callable[[], int] | None = None
    image_token_id: int | None = None
    asked_for_flash: bool = False
    declared: Literal["zigzag", "contiguous"] | None = None
    undecided: OpenDecision | None = field(default_factory=OpenDecision)
    compared: Mapping[str, str] = field(default_factory=dict)
    program: str = ""
    by_mindspeed: bool = False
    moving_targets: Any = None

    @property
    def is_decided(self) -> bool:
        """Whether the algorithm was named, so that a TransformerConfig can no longer change it."""
        return self.undecided is None or self.undecided.names_algorithm

    @property
    def expects_documents(self) -> bool:
        """Whether documents or images are found from tokens or position ids."""
        asked = self.end_of_document, self.image_token_id
        return self.documents_from_position_ids or any(token is not None for token in asked)

    @property
    def fused_update(self) -> bool:
        return self.setup is not None and self.setup.fused_update

    def decide(self, cp_size: int, sizes: Sequence[int] | None = None) -> None:
        """Resolve undecided settings for this size.

        Args:
            sizes: hierarchical_context_parallel_sizes.

        Raises:
            ValueError: the settings do not fit this size.
        """
        decision = self.undecided
        if decision is None or decision.settings.cp_size not in (None, cp_size):
            return
        decision = replace(decision, sizes=tuple(sizes)) if sizes else decision
        resolved = decision.resolved(cp_size)
        self.config, self.setup, self.kernel = resolved.config, resolved.setup, resolved.kernel
        self.documents_from_position_ids, self.end_of_document = resolved.documents_from_position_ids, None
        # Frameworks that name no layout split whole rows like Megatron.
        self.declared = (resolved.declared_layout or "zigzag") if decision.settings.values else None
        if decision.settings.values:
            self.asked_for_flash = resolved.setup is not None and resolved.setup.asked_for_flash
        self.undecided, self.by_mindspeed = decision, decision.settings.default_algorithm is not None

    def config_of_size(self, cp_size: int) -> ContextParallelConfig:
        """The configuration for a group of ``cp_size`` ranks, adapted from the configured one if the size differs."""
        if cp_size == 1:
            return SINGLE
        if self.config is None or self.config.context_parallel_size == 1:
            self.decide(cp_size)
        assert self.config is not None
        if self.config.context_parallel_size == cp_size:
            return self.config
        return of_size(self.config, cp_size, self.setup)


def of_size(config: ContextParallelConfig, size: int, setup: TrainingSetup | None) -> ContextParallelConfig:
    """``config`` for another size, keeping its Ulysses degree and window as far as they fit.

    Raises:
        ValueError: the heads of ``setup`` do not fit this size.
    """
    if size == 1:
        return ContextParallelConfig(context_parallel_size=1, attention_mask_type=config.attention_mask_type)
    changed, entries = _resized(config, size), [(each.layers, _own(config, each, size)) for each in config.named_layers]
    if entries:  # settings of rings stay, for the layers that have one
        changed["layer_algorithms"] = written(entries, config.by_layer())
    elif changed["algorithm"] != config.algorithm:
        changed |= WITHOUT_RING
    found = replace(config, context_parallel_size=size, **changed)
    if setup is not None:
        resolve(found, replace(setup, world_size=None, seq_length=None))
    return found


WITHOUT_RING = dict(  # Hybrid without its ring: drop the ring's settings
    kv_exchange="ring",
    send_recv_overlap=False,
    p2p="auto",
    kv_cache_policy=None,
    kv_cache_interval=0,
    in_flight=1,
    topology="auto",
)


def _resized(config: ContextParallelConfig, size: int) -> dict[str, Any]:
    degree = config.ulysses_degree if config.row.takes_degree else None
    if degree and size <= degree:
        return {"algorithm": "ulysses_cp_algo", "ulysses_degree": None, "window_size": 1}
    ring = size // (degree or 1)
    window = config.window_size if config.window_size < ring and ring % config.window_size == 0 else 1
    return {"algorithm": config.algorithm, "ulysses_degree": config.ulysses_degree, "window_size": window}


def _own(config: ContextParallelConfig, entry: LayerEntry, size: int) -> dict[str, Any]:
    """The settings of an entry for this size."""
    values = entry.named | _resized(config.fitted(entry), size)
    row = ALGORITHMS[values["algorithm"]]
    unused = {each.name for each in config.by_layer() if each.by_layer and not each.by_layer(row)}
    return {name: value for name, value in values.items() if name not in unused and value is not None}


def regrouped(groups: ContextParallelGroups, config: ContextParallelConfig) -> ContextParallelGroups | None:
    """``groups`` reused for algorithms of one level, or with the same levels; None if new groups must be made."""
    found = [_at(groups, hierarchy) for hierarchy in hierarchies(config)]
    first, *others = [each for each in found if each is not None] or [groups]
    return None if None in found else replace(first, others=tuple(others), made=groups.made)


def _at(groups: ContextParallelGroups, hierarchy: Hierarchy) -> ContextParallelGroups | None:
    known = next((each for each in (groups, *groups.others) if each.hierarchy == hierarchy), None)
    if known is not None:
        return replace(known, others=(), made=())
    ulysses, _, windows = hierarchy
    if ulysses not in (1, groups.cp_size) or windows > 1:
        return None
    one_level: dict[str, Any] = (
        {"ulysses": None, "ring": groups.cp} if ulysses == 1 else {"ulysses": groups.cp, "ring": None}
    )
    return replace(groups, hierarchy=hierarchy, outer=None, others=(), made=(), **one_level)

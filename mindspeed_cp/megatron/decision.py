"""Who decides on the configuration: the flags or ``configure`` at once, a framework's settings, or a TransformerConfig.

Settings may leave the context-parallel size to initialize_model_parallel and the algorithm to ``cp_comm_type`` of the
model's configuration, which comes when the process groups are there already.
"""

from dataclasses import dataclass, replace

from mindspeed_cp.arguments import FrameworkSettings
from mindspeed_cp.settings.config import ContextParallelConfig


@dataclass(frozen=True)
class OpenDecision:
    """What is known while nobody has named everything.

    Args:
        settings: what a framework said, nothing at first.
        comm_type: cp_comm_type of the TransformerConfig.
        sizes: hierarchical_context_parallel_sizes of initialize_model_parallel.
    """

    settings: FrameworkSettings = FrameworkSettings({})
    comm_type: str | tuple[str, ...] | None = None
    sizes: tuple[int, ...] | None = None

    def resolved(self, cp_size):
        comm_type = self.comm_type or ("a2a+p2p" if self.sizes else None)
        return self.settings.resolve(
            context_parallel_size=cp_size,
            cp_comm_type=None if self.settings.names_algorithm else comm_type,
            hierarchical_context_parallel_sizes=self.sizes,
        )


def configure_from(state, settings):
    """Take over a framework's settings; without a size in them they wait for initialize_model_parallel.

    Once there are groups, what the settings leave open stays as it is.
    """
    cp_size = settings.cp_size
    if state.groups is not None:
        cp_size = cp_size or state.groups.cp_size
        if not settings.names_algorithm and cp_size == state.groups.cp_size:
            settings = settings.keeping(state.config)
    decision = OpenDecision(settings)
    if cp_size is None:
        state.reset()
        state.undecided = decision
    else:
        _configure(state, decision, cp_size)


def config_for(state, cp_size, sizes=None):
    """The configuration for what initialize_model_parallel got.

    Args:
        sizes: hierarchical_context_parallel_sizes.

    Raises:
        ValueError: another size was configured, or the settings do not fit this one.
    """
    decision = state.undecided
    if decision is not None and decision.settings.cp_size in (None, cp_size):
        if cp_size == 1:
            return ContextParallelConfig(context_parallel_size=1)
        _configure(state, replace(decision, sizes=tuple(sizes) if sizes else None), cp_size)
    elif state.config.context_parallel_size != cp_size:
        raise ValueError(
            f"--context-parallel-size {state.config.context_parallel_size} was configured, and "
            f"initialize_model_parallel got context_parallel_size={cp_size}; pass the same size to both."
        )
    return state.config


def take_comm_type(state, comm_type, cp_size):
    """A TransformerConfig names the algorithm where nobody else has; returns whether that changed it.

    Raises:
        ValueError: the name is none or not one, or another model of this process has another.
    """
    decision = state.undecided
    if decision is None or decision.settings.names_algorithm or comm_type is None or cp_size == 1:
        return False
    taken = replace(decision, comm_type=comm_type if isinstance(comm_type, str) else tuple(comm_type))
    if state.groups is None:
        state.undecided = taken
        return False
    if cp_size != state.groups.cp_size:
        return False
    config = taken.resolved(cp_size).config
    if config == state.config:
        state.undecided = taken
        return False
    if decision.comm_type is not None:
        raise ValueError(
            f"cp_comm_type {comm_type} of a TransformerConfig differs from {decision.comm_type} of an earlier one, and "
            "a process splits its batches in one way; give both models the same cp_comm_type, or name the algorithm "
            "with mindspeed_cp.megatron_adaptor.configure_from."
        )
    state.groups = regrouped(state.groups, config)
    _configure(state, taken, cp_size)
    return True


def _configure(state, decision, cp_size):
    resolved = decision.resolved(cp_size)
    state.configure(
        resolved.config,
        setup=resolved.setup,
        kernel=resolved.kernel,
        documents_from_position_ids=resolved.documents_from_position_ids,
    )
    state.undecided = decision


def regrouped(groups, config):
    """``groups`` for an algorithm of one level, or for the same levels; nothing is made, so no rank waits for another.

    Raises:
        ValueError: the algorithm has levels of its own, which initialize_model_parallel must have been told of.
    """
    ulysses, _, windows = config.hierarchy
    if config.hierarchy == groups.hierarchy:
        return groups
    if ulysses not in (1, groups.cp_size) or windows > 1:
        raise ValueError(
            f"cp_comm_type a2a+p2p of a TransformerConfig asks for {config.describe()}, and the process groups are "
            "there already; pass hierarchical_context_parallel_sizes to initialize_model_parallel."
        )
    one_level = {"ulysses": None, "ring": groups.cp} if ulysses == 1 else {"ulysses": groups.cp, "ring": None}
    return replace(groups, hierarchy=config.hierarchy, outer=None, **one_level)

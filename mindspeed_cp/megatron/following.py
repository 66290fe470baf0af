"""Later settings: which of them may still change the configuration, and how existing groups are adapted."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mindspeed_cp.arguments import FrameworkSettings
from mindspeed_cp.megatron.decision import OpenDecision, regrouped
from mindspeed_cp.megatron.neighbour import is_here
from mindspeed_cp.megatron.scopes import Scope
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.training_setup import TrainingSetup

if TYPE_CHECKING:
    from mindspeed_cp.megatron.adaptor import Adaptor


def configure(
    adaptor: "Adaptor",
    config: ContextParallelConfig,
    *,
    setup: TrainingSetup | None = None,
    kernel: str | None = None,
    documents_from_position_ids: bool = False,
    end_of_document: int | Callable[[], int] | None = None,
    image_token_id: int | None = None,
) -> None:
    """Set the configuration and adapt existing groups.

    Raises:
        ValueError: Megatron's groups have another size.
    """
    _check_size(adaptor, config)
    settings = adaptor.settings
    settings.config, settings.setup, settings.kernel, settings.undecided = config, setup, kernel, None
    settings.by_mindspeed = is_here()
    settings.documents_from_position_ids = documents_from_position_ids
    settings.end_of_document, settings.image_token_id, settings.declared = end_of_document, image_token_id, None
    settings.asked_for_flash = setup is not None and setup.asked_for_flash
    _follow(adaptor)


def configure_from(adaptor: "Adaptor", given: FrameworkSettings) -> None:
    """Apply a framework's settings; without a size among them they are kept until the groups exist.

    Once there are groups, settings that are not given stay unchanged, except an algorithm that was chosen by default:
    it is replaced by the default of these settings.
    """
    main, size = adaptor.adopted_main, given.cp_size
    if main is not None:
        size = size or main.size
        if not given.names_algorithm and size == main.size and adaptor.settings.is_decided:
            given = given.keeping(main.config)
    if size is None:
        adaptor.reset()
        adaptor.settings.undecided = OpenDecision(given)
        adaptor.settings.asked_for_flash = bool(given.values.get("use_flash_attn"))
        return
    _check_size(adaptor, OpenDecision(given).resolved(size).config)
    adaptor.settings.undecided = OpenDecision(given)
    adaptor.settings.decide(size)
    _follow(adaptor)


def expect(adaptor: "Adaptor", given: FrameworkSettings) -> None:
    """Store settings that are checked when the groups are made; existing groups are adapted at once."""
    if adaptor.adopted_main is not None:
        configure_from(adaptor, given)
        return
    adaptor.reset()
    adaptor.settings.undecided = OpenDecision(given)


def take_comm_type(adaptor: "Adaptor", comm_type: str | Sequence[str] | None, cp_size: int) -> None:
    """Take the algorithm from a TransformerConfig if it was not named before.

    Raises:
        ValueError: the name is unknown, or another model of this process has a different one.
    """
    settings, decision, main = adaptor.settings, adaptor.settings.undecided, adaptor.adopted_main
    if decision is None or decision.settings.names_algorithm or comm_type is None or cp_size == 1:
        return
    named = comm_type if isinstance(comm_type, str) else tuple(comm_type)
    taken = OpenDecision(decision.settings, named, decision.sizes)
    if main is None:
        settings.undecided = taken
        return
    if cp_size != main.size:
        return
    differs = taken.resolved(cp_size).config != settings.config
    if differs and decision.comm_type is not None:
        raise ValueError(
            f"cp_comm_type {comm_type} of a TransformerConfig differs from {decision.comm_type} of an earlier one, "
            "and a process splits its batches in one way; give both models the same cp_comm_type, or name the "
            "algorithm with mindspeed_cp.megatron_adaptor.configure_from."
        )
    settings.undecided = taken
    if differs:
        settings.decide(cp_size)
        _follow(adaptor)


def take_settings(adaptor: "Adaptor", given: Mapping[str, Any]) -> None:
    """Apply settings that a TransformerConfig got under MindSpeed's names.

    Raises:
        ValueError: they differ from what the flags or ``configure`` have decided, or are invalid.
    """
    settings, read = adaptor.settings, FrameworkSettings.read(given)
    if not read.values:
        return
    if settings.undecided is not None:
        known = settings.undecided.settings.values
        if any(known.get(name) != value for name, value in read.values.items()):
            configure_from(adaptor, FrameworkSettings({**known, **read.values}))
        return
    assert settings.config is not None
    known = FrameworkSettings({}).keeping(settings.config).values
    for name, value in read.values.items():
        if name in known and known[name] != value:
            raise ValueError(
                f"{name} {value} of a TransformerConfig differs from {known[name]}, which was configured; name it in "
                "one place, or with the same value in both."
            )


def _check_size(adaptor: "Adaptor", config: ContextParallelConfig) -> None:
    main = adaptor.adopted_main
    if main is not None and main.size != config.context_parallel_size:
        raise ValueError(
            f"the process groups were built for {main.config.describe()}, and {config.describe()} needs others; "
            "configure before initialize_model_parallel, or call destroy_model_parallel first."
        )


def _follow(adaptor: "Adaptor") -> None:
    """Adapt existing groups to the settings: at once if no new groups are needed, else at their next use."""
    adaptor.forget_batches()
    for group, scope in adaptor.scopes.items():
        config = adaptor.settings.config_of_size(scope.size)
        if config == scope.config:
            continue
        groups = regrouped(scope.groups, config)
        if groups is None:
            adaptor.scopes.drop(group)
        else:
            adaptor.scopes.put(group, Scope(config, groups))
            adaptor.announce(config)

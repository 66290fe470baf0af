"""Every setting that a command line, a file or a framework may give, as its field declares it."""

from mindspeed_cp.arguments.border import AdaptorSettings, BorderSettings
from mindspeed_cp.arguments.mindspeed_flags import WithoutEffect
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.setting import Setting, declarations
from mindspeed_cp.settings.training_setup import TrainingSetup

CONFIG: type[ContextParallelConfig] = ContextParallelConfig  # the class that arguments become


def declared() -> list[Setting]:
    """All settings, those of the configuration first, in the order of help and documentation."""
    owners = (CONFIG, TrainingSetup, AdaptorSettings, BorderSettings, WithoutEffect)
    return [each for owner in owners for each in declarations(owner) if each.flag or each.keys]


def our_flags() -> list[Setting]:
    """The settings whose flags this project's parser adds, and that have an effect."""
    return [each for each in declared() if each.ours and each.flag and not each.without_effect]


def flags_of(config: ContextParallelConfig) -> str:
    """The flags that set ``config``, to paste: size, algorithm and mask type, and whatever is not the default."""
    always = ("context_parallel_size", "algorithm", "attention_mask_type")
    values = [(each, getattr(config, each.name)) for each in declarations(type(config))]
    said = [each.said(value) for each, value in values if each.name in always or value != each.default]
    return " ".join(filter(None, said))


def variables_of(config: ContextParallelConfig) -> dict[str, str]:
    """The variables of the launch scripts that set ``config``; "" leaves out the flag."""
    return {
        each.variable: "" if value is None or (value == each.default and each.literals) else str(value)
        for each in declarations(type(config))
        if each.variable
        for value in [getattr(config, each.name)]
    }

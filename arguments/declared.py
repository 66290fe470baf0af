"""Every setting that a command line, a file or a framework may contain, from the declarations in dataclass fields."""

from mindspeed_cp.arguments.border import AdaptorSettings, BorderSettings
from mindspeed_cp.arguments.mindspeed_flags import WithoutEffect
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.setting import Setting, declarations
from mindspeed_cp.settings.training_setup import TrainingSetup

CONFIG: type[ContextParallelConfig] = ContextParallelConfig  # the class into which arguments are converted


def declared() -> list[Setting]:
    """All settings, those of the configuration first, in the order of help and documentation."""
    owners = (CONFIG, TrainingSetup, AdaptorSettings, BorderSettings, WithoutEffect)
    return [each for owner in owners for each in declarations(owner) if each.flag or each.keys]


def our_flags() -> list[Setting]:
    """The settings whose flags this project's parser adds and that have an effect."""
    return [each for each in declared() if each.ours and each.flag and not each.without_effect]


def flags_of(config: ContextParallelConfig) -> str:
    """A command line that gives ``config``: size, algorithm, mask type, and all flags that differ from the default."""
    always = ("context_parallel_size", "algorithm", "attention_mask_type")
    values = [(each, getattr(config, each.name)) for each in declarations(type(config))]
    said = [each.said(value) for each, value in values if each.name in always or value != each.default]
    return " ".join(filter(None, said))


def variables_of(config: ContextParallelConfig) -> dict[str, str]:
    """Variables of the launch scripts that give ``config``; "" omits the flag."""
    return {
        each.variable: "" if value is None or (value == each.default and each.literals) else str(value)
        for each in declarations(type(config))
        if each.variable
        for value in [getattr(config, each.name)]
    }

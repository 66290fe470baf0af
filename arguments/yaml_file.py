"""Read MindFormers' YAML file (--cp-config), another way to give the same flags.

Each setting declares its keys; docs/launching.md lists them. All other keys are listed in one warning. A key that looks
like a misspelt one of the same section and is not one of MindFormers' own keys is an error.
"""

import difflib
from collections.abc import Collection, Iterable
from typing import Any

import yaml

from mindspeed_cp.arguments import declared
from mindspeed_cp.arguments.algorithm import two_levels
from mindspeed_cp.arguments.mindformers import KNOWN
from mindspeed_cp.settings.algorithms import ALGORITHMS, algorithm_named
from mindspeed_cp.settings.rules import listed
from mindspeed_cp.settings.setting import Setting

DEFAULT_NAME = "colossalai_cp"  # MindFormers' own algorithm, which differs from the flag's
_CLOSE = 0.85  # an unknown key at least this similar to a known one counts as misspelt
Tree = dict[Any, Any]


def known_keys() -> dict[str, Setting]:
    """Key -> the setting that it sets."""
    return {key: each for each in declared.declared() for key in each.keys}


def read_cp_yaml(path: str) -> tuple[dict[str, Any], list[str]]:
    """Read the context-parallel keys of a MindFormers YAML file; a key without a value counts as absent.

    Returns:
        (values, notices): values maps dotted key -> value as written; notices list keys that are not read here.

    Raises:
        ValueError: the file is missing or not YAML, a key looks misspelt, or a value has the wrong type.
    """
    values: dict[str, Any] = {}
    notices: list[str] = []
    others: list[str] = []
    _walk(_load(path), "", path, values, others)
    if others:
        nearest = ", ".join(key + (f" (nearest known: {near})" if (near := _nearest(key)) else "") for key in others)
        notices.append(f"--cp-config {path}: not read here: {nearest}.")
    if values.get("model.model_config.use_attn_mask_compression") is False:
        notices.append(
            f"--cp-config {path}: model.model_config.use_attn_mask_compression False is ignored: no mask of the "
            "size of the sequence is ever built."
        )
    if values.get("model.model_config.use_flash_attention") is False and _cp_size(values) == 1:
        notices.append(
            f"--cp-config {path}: model.model_config.use_flash_attention False leaves the choice to Megatron."
        )
    return values, notices


def _cp_size(values: dict[str, Any]) -> int:
    found = [value for key, value in values.items() if known_keys()[key].name == "context_parallel_size"]
    return found[0] if found else 1


def _load(path: str) -> Tree:
    try:
        with open(path, encoding="utf-8") as file:
            # MindFormers' guides abbreviate with lines of three dots, which are not valid YAML inside a mapping.
            text = "".join("\n" if line.strip() == "..." else line for line in file)
    except OSError as error:
        raise ValueError(
            f"--cp-config {path} cannot be read ({error.strerror}); give the path of a MindFormers YAML file, "
            "or leave it out."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--cp-config {path} is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--cp-config {path} is not valid YAML: {reason}; correct that line.") from error
    if not isinstance(tree, dict | None):
        raise ValueError(
            f"--cp-config {path} must be a mapping such as parallel_config: {{context_parallel: 2}}; it is a "
            f"{type(tree).__name__}."
        )
    return tree or {}


def _walk(tree: Tree, prefix: str, path: str, values: dict[str, Any], others: list[str]) -> None:
    """Sort the leaves of ``tree`` into ``values`` and ``others``; a misspelt key or a wrong value is an error."""
    keys = known_keys()
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in _sections(keys):
            if not isinstance(value, dict | None):
                raise ValueError(f"--cp-config {path}: {key} {value} must be a mapping; indent its keys below it.")
            _walk(value or {}, f"{key}.", path, values, others)
        elif key not in keys:
            meant = None if key in KNOWN else _nearest_of(key, _same_section(key, keys), _CLOSE)
            if meant:
                raise ValueError(f"--cp-config {path}: unknown key {key}; did you mean {meant}?")
            others.append(key)
        elif value is not None:
            values[key] = _checked(key, keys[key], value, path)


def _sections(keys: Iterable[str]) -> list[str]:
    return sorted({key.rpartition(".")[0] for key in keys} | {"model"})


def _same_section(key: str, keys: Iterable[str]) -> list[str]:
    section = key.rpartition(".")[0]
    return [name for name in (*_sections(keys), *keys) if name.rpartition(".")[0] == section]


def _nearest(key: str) -> str | None:
    """The known key most similar to one that is not read; only for unknown keys and keys about parallelism."""
    keys, section = known_keys(), key.rpartition(".")[0]
    if section.startswith("parallel"):
        return _nearest_of(key, _same_section(key, keys), 0.0)
    return None if key in KNOWN else _nearest_of(key, [*_sections(keys), *keys], _CLOSE)


def _nearest_of(key: str, known: Iterable[str], cutoff: float) -> str | None:
    """The key of ``known`` whose last part is most similar to that of ``key``."""
    last_parts = {name.rpartition(".")[2]: name for name in known}
    found = difflib.get_close_matches(key.rpartition(".")[2], last_parts, 1, cutoff)
    return last_parts[found[0]] if found else None


def _checked(key: str, each: Setting, value: Any, path: str) -> Any:
    if each.name == "algorithm":
        names = [name for row in ALGORITHMS.values() for name in row.file_names[:1]]
        fits, kind = algorithm_named("file_names", value) is not None, " or ".join(names)
    elif each.whole:
        fits, kind = type(value) is int and value >= 1, "a whole number of at least 1"
    elif each.choices:
        fits, kind = isinstance(value, str) and value in each.choices, listed(each.choices)
    else:
        fits, kind = isinstance(value, bool), "True or False"
    if not fits:
        raise ValueError(f"--cp-config {path}: {key} {value} must be {kind}; correct it in the file.")
    return value


def apply_config_file(args: Any, path: str, given: Collection[str]) -> set[str]:
    """Set the file's values on ``args``, except for the names in ``given``, whose flags are on the command line.

    Notices of overruled and unread keys go to ``args.cp_notices``; ``validate`` prints them on rank 0.

    Returns:
        The attributes that were set, which count as given.

    Raises:
        ValueError: as ``read_cp_yaml``, or keys of the file conflict.
    """
    values, notices = read_cp_yaml(path)
    keys, (algorithm_key,) = known_keys(), next(each.keys for each in declared.declared() if each.name == "algorithm")
    defaults = {algorithm_key: DEFAULT_NAME} if _cp_size(values) > 1 else {}
    taken: dict[str, Any] = {}
    for key, value in (defaults | values).items():
        each = keys[key]
        wanted = algorithm_named("file_names", value) if key == algorithm_key else value
        if taken.get(each.dest, wanted) != wanted:
            raise ValueError(f"--cp-config {path}: {' and '.join(each.keys)} disagree; leave one of them out.")
        if each.dest not in given:
            setattr(args, each.dest, wanted)
            taken[each.dest] = wanted
        elif getattr(args, each.dest) != wanted:
            default = f"{value}, MindFormers' default: {path} names no {key}"
            held = f"{key} {value} of {path}" if key in values else default
            notices.append(f"{each.flag} {getattr(args, each.dest)} on the command line wins over {held}.")
    args.cp_notices = notices
    _check_file_rules(args, path, values, algorithm_key)
    return set(taken)


def _check_file_rules(args: Any, path: str, values: dict[str, Any], algorithm_key: str) -> None:
    cp, name = getattr(args, "context_parallel_size", 1), values.get(algorithm_key)
    sequence = [key for key, value in values.items() if value and known_keys()[key].name == "sequence_parallel"]
    if sequence and args.sequence_parallel and cp > 1:
        last = sequence[0].rpartition(".")[2]
        raise ValueError(
            f"--cp-config {path}: {sequence[0]} True does not go with --context-parallel-size "
            f"{cp} (context_parallel); set {last}: False, or context_parallel: 1."
        )
    if name not in (None, DEFAULT_NAME) and cp == 1:
        args.cp_notices.append(
            f"--cp-config {path}: {algorithm_key} {name} is ignored: it needs context_parallel above 1."
        )
    _flatten(args, path, cp)


def _flatten(args: Any, path: str, cp: int) -> None:
    """If the file gives Hybrid one rank on either level, as MindFormers' default degree does, use a single level."""
    algorithm, degree = args.context_parallel_algo, args.ulysses_degree_in_cp
    if not ALGORITHMS[algorithm].takes_degree or degree not in (1, cp):
        return
    args.context_parallel_algo, args.ulysses_degree_in_cp = two_levels(algorithm, cp, degree).algorithm, None
    args.cp_notices.append(
        f"--cp-config {path}: ulysses_degree_in_cp {degree} of context_parallel {cp} leaves one level: "
        f"{args.context_parallel_algo}."
    )

"""MindFormers' YAML file (--cp-config) as another way to give the same flags.

Keys read: ``parallel_config`` (data_parallel, model_parallel, context_parallel, pipeline_stage, context_parallel_algo,
use_seq_parallel, and this project's own keep_attention), ``parallel.enable_alltoall``, ``model.model_config``
(use_attn_mask_compression, use_flash_attention).
"""

import difflib
from dataclasses import dataclass

import yaml

ALGORITHM_NAMES = {"ulysses_cp": "ulysses_cp_algo", "colossalai_cp": "megatron_cp_algo"}
_ALGORITHM_KEY = "parallel_config.context_parallel_algo"
_SIZE, _SWITCH, _ALGORITHM = "a whole number of at least 1", "True or False", " or ".join(ALGORITHM_NAMES)


@dataclass(frozen=True)
class Key:
    """One key of the file: the attribute of the namespace it sets, the flag that sets the same, the values it takes."""

    dest: str
    flag: str
    values: str


KEYS = {
    "parallel_config.data_parallel": Key("cp_data_parallel_size", "", _SIZE),
    "parallel_config.model_parallel": Key("tensor_model_parallel_size", "--tensor-model-parallel-size", _SIZE),
    "parallel_config.context_parallel": Key("context_parallel_size", "--context-parallel-size", _SIZE),
    "parallel_config.pipeline_stage": Key("pipeline_model_parallel_size", "--pipeline-model-parallel-size", _SIZE),
    _ALGORITHM_KEY: Key("context_parallel_algo", "--context-parallel-algo", _ALGORITHM),
    "parallel_config.use_seq_parallel": Key("sequence_parallel", "--sequence-parallel", _SWITCH),
    "parallel_config.keep_attention": Key("cp_keep_attention", "--cp-keep-attention", _SWITCH),
    "parallel.enable_alltoall": Key("cp_enable_alltoall", "", _SWITCH),
    "model.model_config.use_attn_mask_compression": Key("cp_attn_mask_compression", "", _SWITCH),
    "model.model_config.use_flash_attention": Key("use_flash_attn", "--use-flash-attn", _SWITCH),
}
_SECTIONS = sorted({key.rpartition(".")[0] for key in KEYS} | {"model"})


def read_cp_yaml(path):
    """Read the context-parallel keys of a MindFormers YAML file.

    Returns:
        (values, notices): values maps dotted key -> value as written; notices lists keys that nothing here reads.

    Raises:
        ValueError: the file is missing or no YAML, a key looks like a misspelt one, or a value is of the wrong kind.
    """
    values, notices, others = {}, [], []
    _walk(_load(path), "", path, values, others)
    if others:
        nearest = ", ".join(f"{key} (nearest known: {_nearest(key, 0.0)})" for key in others)
        notices.append(f"--cp-config {path}: not read here: {nearest}.")
    if values.get("model.model_config.use_attn_mask_compression") is False:
        notices.append(
            f"--cp-config {path}: model.model_config.use_attn_mask_compression False is ignored: no mask of the "
            "size of the sequence is ever built."
        )
    if (
        values.get("model.model_config.use_flash_attention") is False
        and values.get("parallel_config.context_parallel", 1) == 1
    ):
        notices.append(
            f"--cp-config {path}: model.model_config.use_flash_attention False leaves the choice to Megatron."
        )
    return values, notices


def _load(path):
    try:
        with open(path, encoding="utf-8") as file:
            # The guides abbreviate with lines of three dots, which are no YAML inside a mapping.
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


def _walk(tree, prefix, path, values, others):
    """Sort the leaves of ``tree`` into known ``values`` and ``others``; a misspelt key or a wrong value is an error."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in _SECTIONS:
            if not isinstance(value, dict | None):
                raise ValueError(f"--cp-config {path}: {key} {value} must be a mapping; indent its keys below it.")
            _walk(value or {}, f"{key}.", path, values, others)
        elif key in KEYS:
            values[key] = _checked(key, value, path)
        else:
            nearest = _nearest(key, 0.85)
            if nearest:
                raise ValueError(f"--cp-config {path}: unknown key {key}; did you mean {nearest}?")
            others.append(key)


def _nearest(key, cutoff):
    """The known key most like ``key`` by its last part: in the same section if there is one, else in any."""
    section, _, last = key.rpartition(".")
    known = {name: name.rpartition(".") for name in (*_SECTIONS, *KEYS)}
    for names in (
        {part[2]: name for name, part in known.items() if part[0] == section},
        {part[2]: name for name, part in known.items()},
    ):
        found = difflib.get_close_matches(last, names, 1, cutoff)
        if found:
            return names[found[0]]
    return None


def _checked(key, value, path):
    kind = KEYS[key].values
    fits = {
        _SIZE: type(value) is int and value >= 1,
        _SWITCH: isinstance(value, bool),
        _ALGORITHM: isinstance(value, str) and value in ALGORITHM_NAMES,
    }
    if not fits[kind]:
        raise ValueError(f"--cp-config {path}: {key} {value} must be {kind}; correct it in the file.")
    return value


def apply_config_file(args, path, given):
    """Set on ``args`` what the file says, except for the keys in ``given``, whose flags stand on the command line.

    What was overruled or is not read goes to ``args.cp_notices``; ``validate`` says it on rank 0.

    Returns:
        The attributes that were set, which count as given.
    """
    values, notices = read_cp_yaml(path)
    # MindFormers' own default, which differs from the flag's.
    defaults = {_ALGORITHM_KEY: "colossalai_cp"} if values.get("parallel_config.context_parallel", 1) > 1 else {}
    taken = set()
    for key, value in (defaults | values).items():
        row = KEYS[key]
        wanted = ALGORITHM_NAMES[value] if key == _ALGORITHM_KEY else value
        if key not in given:
            setattr(args, row.dest, wanted)
            taken.add(row.dest)
        elif getattr(args, row.dest) != wanted:
            default = f"{value}, MindFormers' default: {path} names no {key}"
            held = f"{key} {value} of {path}" if key in values else default
            notices.append(f"{row.flag} {getattr(args, row.dest)} on the command line wins over {held}.")
    args.cp_notices = notices
    _check_file_rules(args, path, values)
    return taken


def _check_file_rules(args, path, values):
    cp = getattr(args, "context_parallel_size", 1)
    if values.get("parallel_config.use_seq_parallel") and args.sequence_parallel and cp > 1:
        raise ValueError(
            f"--cp-config {path}: parallel_config.use_seq_parallel True does not go with --context-parallel-size "
            f"{cp} (context_parallel); set use_seq_parallel: False, or context_parallel: 1."
        )
    if values.get(_ALGORITHM_KEY) == "ulysses_cp" and cp == 1:
        args.cp_notices.append(
            f"--cp-config {path}: {_ALGORITHM_KEY} ulysses_cp is ignored: it needs context_parallel above 1."
        )

"""A fake Transformer Engine: the names and signatures of a release, without computation.

``install(release)`` puts the modules of ``releases/<release>.txt`` into ``sys.modules``: the names that Megatron 0.12
to 0.19 imports from Transformer Engine, if the release has them, and the parameters of the base classes of Megatron's
own classes. A name that the release does not have raises ImportError, an unknown argument TypeError.
"""

import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch

TABLES = Path(__file__).parent / "releases"
RELEASES = ("2.1.0", "2.4.0", "2.11.0")
CALLS = []  # (method, arguments) of DotProductAttention, except __init__


def install(release):
    """Make ``import transformer_engine`` return the fake of ``release``; call it before importing Megatron."""
    lines = (TABLES / f"{release}.txt").read_text(encoding="utf-8").splitlines()
    methods = [re.fullmatch(r"([\w.]+)\.(\w+)(\(.*\))", line).groups() for line in lines if "(" in line]
    for module_name, names in (line.split(":") for line in lines if "(" not in line):
        module = ModuleType(module_name)
        module.__spec__, module.__path__ = ModuleSpec(module_name, None, is_package=True), []
        for name in names.split():
            own = {method: text for owner, method, text in methods if owner == f"{module_name}.{name}"}
            setattr(module, name, _attribute(name, own))
        sys.modules[module_name] = module
        parent, _, child = module_name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    sys.modules["transformer_engine"].__version__ = release


def _attribute(name, methods):
    if name.lstrip("_")[0].isupper():
        return type(name, (torch.nn.Module,), {key: _method(key, text) for key, text in methods.items()})

    def refuse(*args, **kwargs):
        raise NotImplementedError(f"the fake of Transformer Engine computes nothing, and {name} was called")

    return refuse


def _method(name, signature):
    """A method with the published signature."""
    scope = {"_answer": _build if name == "__init__" else _record(name)}
    exec(f"def {name}{signature}:\n    return _answer(**locals())", scope)
    return scope[name]


def _build(self, **given):
    """Set the attributes that the class's documentation or Megatron uses; attention stores no softmax scale."""
    torch.nn.Module.__init__(self)
    if "out_features" in given:
        _build_linear(self, given)
    self.layer_number, self.attention_dropout = given.get("layer_number"), given.get("attention_dropout")
    self.cp_comm_type = given.get("cp_comm_type")
    offset = torch.zeros(given.get("num_attention_heads", 0) // given.get("tp_size", 1))
    kinds = {"off-by-one": offset, "learnable": torch.nn.Parameter(offset)}
    self.softmax_offset = kinds.get(given.get("softmax_type"))


def _build_linear(self, given):
    self.weight = torch.nn.Parameter(torch.zeros(given["out_features"], given["in_features"]))
    self.bias = torch.nn.Parameter(torch.zeros(given["out_features"])) if given["bias"] else None
    if "normalization" in given:
        self.layer_norm_weight, self.layer_norm_bias = (
            torch.nn.Parameter(torch.zeros(given["in_features"])) for _ in range(2)
        )


def _record(name):
    def answer(self, **given):
        CALLS.append((name, given))
        if name == "forward":
            return given["query_layer"].flatten(-2)
        return None

    return answer

"""Functions that the adaptor tests run in separate processes, because import order matters or torch is patched.

``observe("name")`` calls the function ``name`` of this module in a new process that has imported torch, and returns its
result.
"""

import importlib
import os
import pkgutil
import sys
import warnings
from types import ModuleType

from alone import run_alone

DEVICE_VARIABLE = "MINDSPEED_CP_DEVICE"
EMBEDDINGS = "megatron.core.models.common.embeddings"
COPY_OF_ROPE = (f"{EMBEDDINGS}.rope_utils", f"{EMBEDDINGS}.rotary_pos_embedding", "get_pos_emb_on_this_cp_rank")


def observe(name, module="adaptor_runs", **variables):
    """The value of ``module.name()`` in a new process; ``variables`` are set in its environment."""
    return run_alone(_observed, name, module, variables)


def _observed(name, module, variables):
    os.environ.update(variables)
    return getattr(importlib.import_module(module), name)()


def snapshot(prefixes=("torch", "megatron", "numpy")):
    """(kind of owner, its name, attribute) -> object, for all attributes of modules and of their classes."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in prefixes or module is None:
            continue
        for attribute, value in list(vars(module).items()):
            found["module", name, attribute] = value
            if isinstance(value, type) and value.__module__.partition(".")[0] in prefixes:
                owner = f"{value.__module__}.{value.__qualname__}"
                found.update({("class", owner, key): member for key, member in list(vars(value).items())})
    return found


BOOKKEEPING = ("__annotations__", "__warningregistry__", "__abstractmethods__", "_abc_impl", "__static_attributes__")
BOOKKEEPING += ("_te_version",)  # Megatron's caches
PROTOCOL_INIT = "_no_init_or_replace_init"  # of a class of typing.Protocol until its first instance


def changed(before, after):
    """Names of attributes of existing owners that were replaced, removed or added (submodules do not count)."""
    owners = {key[:2] for key in before}
    names = [key for key in before if key not in after or after[key] is not before[key]]
    names += [
        key for key in after if key not in before and key[:2] in owners and not isinstance(after[key], ModuleType)
    ]
    names = [key for key in names if getattr(before.get(key), "__name__", None) != PROTOCOL_INIT]
    return sorted(".".join(key[1:]) for key in names if key[2] not in BOOKKEEPING)


def held(targets):
    """The value of each target in its owner's own dict; None if it is inherited or cannot be imported."""
    objects = []
    for owner, _, name in (target.rpartition(".") for target in targets):
        try:
            objects.append(vars(pkgutil.resolve_name(owner)).get(name))
        except (AttributeError, ImportError):  # Transformer Engine's module, which needs Transformer Engine
            objects.append(None)
    return objects


def import_every_target():
    """Import the modules of all targets in the tables without applying anything; returns the targets."""
    from mindspeed_cp.megatron.adaptor import Adaptor
    from mindspeed_cp.patches.areas import all_areas

    areas = all_areas(Adaptor(), "cpu")
    targets = [patch.target for name in ("device", "core") for patch in areas[name]]
    for target in targets:
        parts = target.split(".")
        for count in range(1, len(parts)):
            try:
                importlib.import_module(".".join(parts[:count]))
            except ImportError:  # the rest of the path is a class, or a library is missing
                break
    importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    return targets


def package_alone():
    """What ``import mindspeed_cp`` changes in torch, and whether it imports Megatron or installs aliases."""
    import torch  # noqa: F401

    before, finders = snapshot(), list(sys.meta_path)
    import mindspeed_cp  # noqa: F401

    return {
        "changed": changed(before, snapshot()),
        "megatron": "megatron" in sys.modules,
        "aliases": sys.meta_path != finders,
        "adaptor": "mindspeed_cp.megatron_adaptor" in sys.modules,
    }


def megatron_first():
    """Megatron, then the adaptor; then undo, apply and undo again."""
    targets = import_every_target()
    original, copy = (vars(sys.modules[name])[COPY_OF_ROPE[2]] for name in COPY_OF_ROPE[:2])
    before, finders, objects = snapshot(), list(sys.meta_path), held(targets)
    script = ModuleType("toy_script")
    script.split = sys.modules["megatron.core.utils"].get_batch_on_this_cp_rank
    sys.modules["toy_script"] = script
    late = _late_warnings(lambda: importlib.import_module("mindspeed_cp.megatron_adaptor"))
    from mindspeed_cp import megatron_adaptor

    replaced = [target for target, old, new in zip(targets, objects, held(targets)) if old is not new]
    applied, patched = snapshot(), [row.target for row in megatron_adaptor.report() if row.applied]
    rope, user = (vars(sys.modules[name])[COPY_OF_ROPE[2]] for name in COPY_OF_ROPE[:2])
    results = {
        "was_a_copy": original is copy,
        "is_a_copy": rope is user,
        "is_replaced": rope is not original,
        "targets": targets,
        "patched": patched,
        "replaced": replaced,
        "changed": changed(before, applied),
        "late": late,
        "copies": [copy for target, copy in megatron_adaptor._manager.copies() if target.startswith("megatron.")],
    }
    megatron_adaptor.undo()
    results |= {
        "targets_restored": [a is b for a, b in zip(objects, held(targets))],
        "left_after_undo": changed(before, snapshot()),
        "finders_after_undo": sys.meta_path == finders,
        "applied_after_undo": [row.target for row in megatron_adaptor.report() if row.applied],
    }
    results["late_again"] = _late_warnings(megatron_adaptor.apply)
    results["changed_again"] = changed(before, snapshot())
    megatron_adaptor.apply()
    megatron_adaptor.undo()
    megatron_adaptor.undo()
    return results | {"left_after_second_undo": changed(before, snapshot())}


def _late_warnings(call):
    """Every warning inside ``call`` that Megatron was imported first."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(entry.message) for entry in caught if "imported before" in str(entry.message)]


def on_another_rank():
    """Megatron's model code first, then the adaptor; the environment variable RANK is this rank."""
    importlib.import_module("megatron.core.models.gpt")
    return _late_warnings(lambda: importlib.import_module("mindspeed_cp.megatron_adaptor"))


def version_first():
    """A script that reads Megatron's version before it imports the adaptor; and what reading the version imported."""
    from megatron.core.package_info import __version__  # noqa: F401

    return _late_warnings(lambda: importlib.import_module("mindspeed_cp.megatron_adaptor"))


def attempt(error_type):
    """(message of the error that importing the adaptor raises, "" if none; what changed)."""
    before = snapshot()
    try:
        importlib.import_module("mindspeed_cp.megatron_adaptor")
    except error_type as error:
        return str(error), changed(before, snapshot())
    return "", ["no error"]


def failed_imports():
    """In sequence: Megatron missing, a wrong device variable, a missing name, an untried version."""
    import torch

    import mindspeed_cp  # noqa: F401
    from mindspeed_cp.patches import PatchError

    results = {}
    sys.modules["megatron"] = None
    results["missing"] = attempt(ImportError)
    del sys.modules["megatron"]
    os.environ[DEVICE_VARIABLE] = "gpu"
    results["variable"] = attempt(ValueError)
    results["megatron_imported"] = "megatron.core" in sys.modules
    os.environ[DEVICE_VARIABLE] = ""

    import_every_target()
    from megatron.core import package_info, parallel_state

    destroy = parallel_state.destroy_model_parallel
    del parallel_state.destroy_model_parallel
    results["gone"] = attempt(PatchError)
    results["version"] = package_info.__version__
    parallel_state.destroy_model_parallel = destroy

    attention = importlib.import_module("megatron.core.transformer.dot_product_attention").DotProductAttention
    forward = attention.forward
    del attention.forward  # what is left is the forward that torch.nn.Module has
    results["inherited"] = attempt(PatchError)
    attention.forward = forward

    package_info.__version__ = "0.99.0"
    torch.cuda.is_available = lambda: True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adaptor = importlib.import_module("mindspeed_cp.megatron_adaptor")
    results["untried"] = [str(entry.message) for entry in caught if "has not been tried" in str(entry.message)]
    results["tried"] = adaptor.TRIED_VERSIONS
    # A name may be in both the table for CPUs, which comes first, and the one for NPUs.
    results["with_cuda"] = {row.target: row.status for row in reversed(adaptor.report())}
    return results


def _join_alone():
    import tempfile

    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("nccl", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(context_parallel_size=1)
    model_parallel_cuda_manual_seed(5)


def _train_once():
    """Loss, logits and gradients of a small GPT, and the output of attention alone, as lists of exact numbers."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    _join_alone()
    torch.manual_seed(3)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        num_query_groups=2,
        attention_dropout=0.1,
        hidden_dropout=0.1,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        bias_dropout_fusion=False,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    model = GPTModel(
        config, get_gpt_layer_local_spec(), vocab_size=32, max_sequence_length=12, position_embedding_type="rope"
    )
    model.cuda()
    tokens, positions = torch.randint(0, 32, (2, 12)), torch.arange(12).expand(2, -1)
    mask = torch.ones(12, 12, dtype=torch.bool).triu(1)[None, None]
    loss = model(tokens, positions, mask, labels=tokens.roll(-1, 1))
    loss.mean().backward()
    numbers = [loss, *(parameter.grad for parameter in model.parameters())]

    attention = DotProductAttention(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
    qkv = [torch.randn(12, 2, heads, 4, requires_grad=True) for heads in (4, 2, 2)]
    out = attention(*qkv, mask)
    out.square().sum().backward()
    numbers += [out, *(tensor.grad for tensor in qkv)]
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return [value.item().hex() for tensor in numbers for value in tensor.detach().flatten()]


def without_context_parallelism():
    """Exact results of a training step with all patches applied, and with only the CPU stand-in."""
    from mindspeed_cp import megatron_adaptor
    from mindspeed_cp.patches import PatchManager
    from mindspeed_cp.patches.machine import cpu
    from mindspeed_cp.patches.rows import patches_of

    attention = importlib.import_module("megatron.core.transformer.dot_product_attention").DotProductAttention
    with_all, patched = _train_once(), attention.forward
    megatron_adaptor.undo()
    stand_in = PatchManager(patches_of([cpu]))
    stand_in.apply()
    alone, original = _train_once(), attention.forward
    stand_in.undo()
    return {
        "equal": with_all == alone,
        "count": len(alone),
        "patched": patched is not original,
        "finite": not any("nan" in number or "inf" in number for number in alone),
        "nonzero": sum(float.fromhex(number) != 0 for number in alone),
    }

"""The census of Megatron: nothing in its sources reads the sequence axis and is not in the table; what is refused."""

import os
import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mindspeed_cp.megatron import alone, census
from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.sources import reading
from mindspeed_cp.patches import building, models
from mindspeed_cp.settings.notices import ContextParallelWarning

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]
# Further folders that hold megatron/core, such as checkouts of other versions, separated as in PATH.
FURTHER = "MEGATRON_SOURCES"
# Packages of models; everything else of megatron.core makes groups, batches, optimizers, checkpoints or schedules.
PACKAGES = ("models", "transformer", "ssm", "extensions", "fusions")


def cores():
    """Every folder megatron/core whose sources are read: the installed one, and those that are named."""
    folders = [Path(folder, "megatron", "core") for folder in os.environ.get(FURTHER, "").split(os.pathsep) if folder]
    return [Path(find_spec("megatron.core").origin).parent, *folders]  # nothing of it is imported


def version_of(core):
    found = dict(re.findall(r"^(MAJOR|MINOR) = (\d+)", (core / "package_info.py").read_text("utf-8"), re.MULTILINE))
    return int(found["MAJOR"]), int(found["MINOR"])


def read_by(core):
    """(path after "megatron.core.", what it reads) for a folder megatron/core."""
    for package in PACKAGES:
        for file in sorted((core / package).rglob("*.py")):
            module = ".".join(file.relative_to(core).with_suffix("").parts)
            for name, sign in reading(file.read_text("utf-8")).items():
                yield f"{module.removesuffix('.__init__')}.{name}", sign


@pytest.mark.parametrize("core", cores(), ids=lambda core: ".".join(map(str, version_of(core))))
def test_whatever_reads_the_sequence_axis_is_in_the_census(core):
    read = dict(read_by(core))
    assert len(read) > 15, f"{core} is not what the reader knows"
    missing = {path: sign for path, sign in read.items() if census.entry_of(path, version_of(core)) is None}
    assert missing == {}, "a row of CENSUS says how each of these is handled"


@pytest.mark.parametrize(
    "source, sign",
    [
        ("class A:\n    def f(self):\n        return self.pg_collection.cp", "cp"),
        ("class A:\n    def f(self, cp_group=None): ...", "cp_group"),
        ("class A:\n    def f(self, config):\n        return config.context_parallel_size", "context_parallel_size"),
        ("class A:\n    def f(self, ids):\n        n = torch.arange(ids.size(1))", "torch.arange(ids.size(1))"),
        ("class A:\n    def f(self, dp_cp_group):\n        g = all_ranks(with_context_parallel=True)", None),
        ("class A:\n    def f(self, dim):\n        return torch.arange(0, dim, 2)", None),
        ('class A:\n    """cp_group"""', None),
    ],
)
def test_what_a_source_reads_is_what_it_does_and_no_word_of_its_comments(source, sign):
    assert reading(source).get("A") == sign


def test_every_entry_says_why_and_every_refusal_what_instead():
    for path, entries in census.CENSUS.items():
        for entry in entries:
            assert entry.why and not entry.why.endswith("."), path
            assert bool(entry.instead) == (entry.how == "refused"), path


def class_of(name, module, *bases, **members):
    return type(name, bases or (torch.nn.Module,), {"__module__": module, **members})


POOLER = class_of("Pooler", "megatron.core.models.bert.pooler")
LATENT = class_of("MLASelfAttention", "megatron.core.transformer.multi_latent_attention",
                  class_of("MultiLatentAttention", "megatron.core.transformer.multi_latent_attention"))  # fmt: skip
MIXER = class_of("MambaMixer", "megatron.core.ssm.mamba_mixer")
SPARSE = class_of("DSAttention", "megatron.core.transformer.experimental_attention_variant.dsa")
CONFIG = SimpleNamespace(context_parallel_size=2, apply_rope_fusion=True)


def of(version="0.16.1", *trusted):
    return census.Census(version, frozenset({(0, 12), (0, 16)}), frozenset(trusted))


def refused(cls, version="0.16.1", config=CONFIG):
    """The message of a refusal, "" without."""
    try:
        of(version).check(cls, config)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "cls, says",
    [
        (POOLER, "Pooler pools the first token.*or --bert-no-binary-head"),
        (class_of("Mine", "my_models", POOLER), "Mine with --context-parallel-size 2: Pooler pools.*--cp-trust Mine"),
        (LATENT, "MultiLatentAttention keeps, with fused.*--no-rope-fusion"),
        (SPARSE, "DSAttention takes a rank's part for the whole sequence before 0.19.*leave out"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_class_that_cannot_be_computed_is_refused_by_name_with_the_way_out(cls, says):
    assert re.search(says, refused(cls))


def test_a_refusal_ends_with_its_version_and_its_setting():
    assert "before 0.13" in refused(MIXER, "0.12.1") and refused(MIXER) == "" == refused(SPARSE, "0.19.0")
    unfused = SimpleNamespace(context_parallel_size=2, apply_rope_fusion=False)
    assert refused(LATENT, "0.12.1") == refused(LATENT, config=unfused) == ""


def in_file(tmp_path, monkeypatch, module, source):
    """A class A of Megatron whose source lies in a file."""
    import importlib.util
    import sys

    path = tmp_path / "stand_in.py"
    path.write_text(f"import torch\n{source}")
    spec = importlib.util.spec_from_file_location(module, path)
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module, loaded)
    spec.loader.exec_module(loaded)
    return loaded.A


@pytest.mark.parametrize("reads", [True, False])
def test_an_unknown_class_of_an_untried_version_is_refused_where_it_reads_the_sequence_axis(
    reads, tmp_path, monkeypatch
):
    body = "self.cp_group.size()" if reads else "2  # cp_group"
    source = f"class A(torch.nn.Module):\n    def forward(self):\n        return {body}\n"
    cls = in_file(tmp_path, monkeypatch, "megatron.core.transformer.brand_new", source)
    assert refused(cls) == "", "a version that was tried has no class that the census does not know"
    said = refused(cls, "9.1.0")
    assert bool(said) == reads
    assert not reads or re.search(r"A of megatron-core 9.1.0.*\(cp_group\).*--cp-trust A builds.*cp.prove", said)


def test_who_is_trusted_is_built():
    of("0.16.1", "Pooler").check(POOLER, CONFIG)
    of("0.16.1", "megatron.core.models.bert.pooler.Pooler").check(POOLER, CONFIG)
    with pytest.raises(ValueError, match="Pooler"):
        of("0.16.1", "Other").check(POOLER, CONFIG)


def test_modules_that_are_added_later_are_met_and_those_of_users_are_named():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of().take(model)
    model.append(class_of("Gate", "my_models", forward=lambda self: None)())
    with pytest.warns(ContextParallelWarning, match="Sequential: Gate.*gather_sequence"):
        of().take(model)
    late = POOLER()
    late.config = CONFIG
    model.append(late)
    with pytest.raises(ValueError, match="Pooler"):
        of("0.16.1", "Gate").take(model)


def layers(split, *kinds):
    """Layers of core attention and their config; ``kinds`` are "self", "cross" or a class."""
    found = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    for kind in kinds:
        layer = torch.nn.Module()
        layer.core_attention = PLAIN() if isinstance(kind, str) else kind()
        layer.core_attention.config = SimpleNamespace(context_parallel_size=split)
        layer.core_attention.attention_type = kind
        found.append(layer)
    return found


PLAIN = class_of("DotProductAttention", "megatron.core.transformer.dot_product_attention")


@pytest.mark.parametrize(
    "asked, split, kinds, says",
    [
        (False, 1, ("self", "self"), r"in ModuleList .*: \*.core_attention \(2\). --use-flash-attn computes"),
        (True, 1, ("self", "cross"), r": \*.core_attention \(1\).$"),
        (True, 1, (SPARSE,), r": \*.core_attention \(1\).$"),
        (True, 1, ("self",), ""),
        (False, 2, ("self", "cross"), ""),
    ],
)
def test_attention_beside_ours_that_builds_scores_on_an_npu_is_named(asked, split, kinds, says, monkeypatch):
    model = layers(split, *kinds)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        alone.name_plain_attention(model, asked=asked)
        assert not said, "this is a CPU"
        monkeypatch.setattr(alone, "_is_on_npu", lambda model: True)
        alone.name_plain_attention(model, asked=asked)
    assert [bool(re.search(says, str(each.message))) for each in said] == [True] * bool(says)


@pytest.mark.parametrize("splits", [True, False])
def test_a_block_that_is_not_split_is_asked_once_where_others_are(splits, monkeypatch):
    asked = []
    monkeypatch.setattr(models, "name_plain_attention", lambda model, **more: asked.append(model))
    adaptor, tower = Adaptor(), torch.nn.Module()
    tower.config = SimpleNamespace(context_parallel_size=1)
    monkeypatch.setattr(Adaptor, "alone", not splits)
    for _ in range(2):
        assert models.transformer_block.function(adaptor, lambda self, rows: rows, tower, 3) == 3
    assert asked == [tower] * splits


def test_the_base_of_all_modules_asks_the_census_first(monkeypatch):
    monkeypatch.setattr(building, "census_of", lambda adaptor: of())
    built, adaptor = [], None
    with pytest.raises(ValueError, match="Pooler"):
        building.__init__(adaptor, lambda self, config: built.append(config), POOLER(), CONFIG)
    alone = SimpleNamespace(context_parallel_size=1)
    building.__init__(adaptor, lambda self, config: built.append(config), POOLER(), alone)
    assert built == [alone]

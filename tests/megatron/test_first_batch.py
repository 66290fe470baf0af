"""What rank 0 says before step 1: of the batch that it is about to compute, and once."""

from typing import get_args, get_type_hints

import pytest

from mindspeed_cp import ContextParallelConfig, SequenceLayout
from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.first_batch import start_of
from mindspeed_cp.megatron.records import MicroBatch
from mindspeed_cp.settings.algorithms import ALGORITHMS


def _record(config, seq_len=13, documents=None):
    return MicroBatch(SequenceLayout.build(config, seq_len, cu_seqlens=documents and documents[0]), documents)


def _config(algorithm="megatron_cp_algo", size=2, **options):
    return ContextParallelConfig(context_parallel_size=size, algorithm=algorithm, **options)


def test_the_block_is_that_of_the_first_batch():
    config = _config(kv_exchange="direct")
    start = start_of(_record(config, documents=((0, 5, 13),)), config, "cpu", (3, 4))
    assert (start.setting, start.seq_length, start.lengths) == (config.describe(), 13, (6, 7))
    assert (start.kernel, start.patches, start.sizes) == ("cpu", (3, 4), {"cp": 2})
    assert (start.exchange, start.documents) == ("each rank sends what its peer needs", "kept apart (2 here)")
    assert start_of(_record(config), config, "cpu", (4, 4)).documents == "not known"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"algorithm": "ulysses_cp_algo"}, "heads for tokens"),
        ({"algorithm": "kvallgather_cp_algo"}, "keys and values by one all-gather"),
        ({"size": 4, "algorithm": "hybrid_cp_algo", "ulysses_degree": 2},
         "heads for tokens, then keys and values go round the ring"),
        ({"kv_exchange": "auto"}, "keys and values by whichever exchange sends less"),
    ],
)  # fmt: skip
def test_how_keys_and_values_travel(options, says):
    config = _config(**options)
    assert start_of(_record(config, 16), config, "cpu", (1, 1)).exchange == says


def test_every_algorithm_and_exchange_has_its_words():
    for exchange in get_args(get_type_hints(ContextParallelConfig)["kv_exchange"]):
        assert start_of(_record(_config(kv_exchange=exchange)), _config(kv_exchange=exchange), "cpu", (1, 1)).exchange
    for algorithm in ALGORITHMS:
        config = _config(algorithm, 4, ulysses_degree=2 if algorithm == "hybrid_cp_algo" else None)
        assert start_of(_record(config, 16), config, "cpu", (1, 1)).exchange


def test_a_batch_is_told_of_once_and_only_where_it_is_split():
    told = []
    adaptor = Adaptor(tell=lambda record: told.append(record) or "block")
    one, two = _record(ContextParallelConfig(context_parallel_size=1)), _record(_config())
    for record in (None, one, two, two):
        adaptor.batch_begins(record)
    assert told == [two] and adaptor.told == "block"
    adaptor.reset()
    assert adaptor.told == ""

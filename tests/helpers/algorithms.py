"""Each algorithm at the smallest size at which it differs from the others."""

ALGORITHMS = {  # name -> (context-parallel size, settings as MindSpeed names them)
    "Ulysses": (2, {"context_parallel_algo": "ulysses_cp_algo"}),
    "Ring": (2, {"context_parallel_algo": "megatron_cp_algo"}),
    "Double Ring": (4, {"context_parallel_algo": "megatron_cp_algo", "cp_window_size": 2}),
    "Hybrid": (4, {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2}),
    "KV all-gather": (2, {"context_parallel_algo": "kvallgather_cp_algo"}),
}
ALONE = "cp=1"


def sizes():
    """(name, context-parallel size) of a run without and of one with each algorithm."""
    yield ALONE, 1
    yield from ((name, size) for name, (size, _) in ALGORITHMS.items())


def flags_of(size, settings):
    """The same on a command line."""
    named = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items()]
    return ["--context-parallel-size", str(size), *(word for pair in named for word in pair)]

"""Which flags stand on the command line: only a second look tells one given with its default from one not given."""

from types import SimpleNamespace

from mindspeed_cp.arguments.yaml_file import KEYS, apply_config_file

_NOT_GIVEN = object()
# Where a flag and the file, or two flags, say the same thing, the one that was given wins.
WATCHED = frozenset({row.dest for row in KEYS.values()} | {"cp_comm_type", "context_parallel_algo"})


def install(parser, fail):
    """Make ``parser`` note in ``cp_given`` which of ``WATCHED`` were given, and apply --cp-config FILE, at every parse.

    The hook sits on ``parse_known_args``, through which every way of parsing goes. ``fail(parser, message)`` ends the
    program. The note is a list of names: Megatron writes its arguments into checkpoints, and reads them back as plain
    values alone.
    """
    parse = parser.parse_known_args

    def parse_known_args(args=None, namespace=None):
        result, rest = parse(args, namespace)
        again = parse(args, SimpleNamespace(**{dest: _NOT_GIVEN for dest in WATCHED}))[0]
        result.cp_given = sorted(dest for dest in WATCHED if getattr(again, dest) is not _NOT_GIVEN)
        path = getattr(result, "cp_config", None)
        if path:
            given = {key for key, row in KEYS.items() if row.dest in result.cp_given}
            try:
                result.cp_given += sorted(apply_config_file(result, path, given))
            except ValueError as error:
                fail(parser, str(error))
        return result, rest

    parser.parse_known_args = parse_known_args
    parser.reads_cp_config = True

"""The console script ``mindspeed-cp``: each subcommand is a row of the table, whose module has ``main(arguments)``."""

import sys
from collections.abc import Sequence
from importlib import import_module

# name -> (module, summary)
COMMANDS = {
    "plan": ("mindspeed_cp.plan", "which algorithm, degree, window and exchange, and why"),
    "doctor": ("mindspeed_cp.doctor", "is it on here, with which device and kernel, and what to do if not"),
    "prove": ("mindspeed_cp.prove", "does my own script compute the same with context parallelism"),
}


def usage() -> str:
    rows = [f"  {name:8} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: mindspeed-cp COMMAND [flags]", "", *rows, "", "mindspeed-cp COMMAND --help: its flags."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand that the command line names; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in (["-h"], ["--help"]):
        print(usage())
        return 0
    if not given or given[0] not in COMMANDS:
        problem = f"{given[0]} is not a command" if given else "no command is given"
        print(f"mindspeed-cp: {problem}; choose one of {', '.join(COMMANDS)}.\n\n{usage()}", file=sys.stderr)
        return 2
    status: int = import_module(COMMANDS[given[0]][0]).main(given[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())

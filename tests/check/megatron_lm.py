"""Compare training with context parallelism with cp = 1 on every Megatron-LM checkout of a folder; print a table.

    bash scripts/test_megatron_lm.sh FOLDER [--versions 0.12.1 0.16.1] [--quick] [--only TEXT]

Exit status 1 when a loss or a gradient norm of any step differs by more than the tolerance, or a run fails.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_lm_cases import CASES, LENGTH, MOCK, MODEL, runs_of
from megatron_signatures import in_order, version_of

REPOSITORY = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5  # relative, float32
PLAIN = {"name": "without the adaptor", "world": 1, "flags": [*MODEL, *LENGTH.split(), *MOCK]}


def find_checkouts(folder):
    """version -> folder of every checkout in ``folder``, or of ``folder`` itself when it is one."""
    candidates = [folder] if (folder / "pretrain_gpt.py").is_file() else sorted(folder.iterdir())
    found = {}
    for path in candidates:
        if (path / "pretrain_gpt.py").is_file() and (path / "megatron" / "core" / "package_info.py").is_file():
            found[version_of(path)] = path
    return {version: found[version] for version in sorted(found, key=in_order)}


def start_runs(checkout, runs, *options):
    """Yield the result of every run of one checkout; a process that ends early gives an error for the rest."""
    path = [str(checkout), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "MINDSPEED_CP_DEVICE": "cpu",
    }
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                str(Path(__file__).with_name("megatron_lm_runs.py")),
                str(checkout),
                *options,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        process.stdin.write(json.dumps(runs))
        process.stdin.close()
        for line in process.stdout:
            yield json.loads(line)
        if process.wait():
            log.seek(0)
            print(log.read()[-3000:], file=sys.stderr)
        elif os.environ.get("MEGATRON_LM_LOG"):
            log.seek(0)
            Path(os.environ["MEGATRON_LM_LOG"]).open("a").write(log.read())


def relative_difference(reference, result):
    """Largest relative difference of the steps that ``result`` made, which are the last ones; None when it made
    none.
    """
    worst = None
    for name in ("losses", "grad_norms"):
        wanted, got = reference[name][-len(result[name]) :], result[name]
        for a, b in zip(wanted, got, strict=True):
            worst = max(worst or 0.0, abs(a - b) / abs(a))
    return worst


def check_version(checkout, version, cases, folder, text_prefix, tell):
    """{case name: (relative difference or None, error or "")} of one checkout."""
    runs, plan = {}, {}
    for case in cases:
        reference, own = runs_of(case, folder, text_prefix, version)
        plan[case.name] = (reference["name"], [run["name"] for run in own])
        runs |= {run["name"]: run for run in (reference, *own)}
    answers = {}
    for answer in start_runs(checkout, list(runs.values())):
        answers[answer["name"]] = answer
        if answer["error"]:
            tell(f"  {answer['name']}: {answer['error']}")
    return {name: _judge(answers, *names) for name, names in plan.items()}


def _judge(answers, reference_name, names):
    missing = {"error": "did not run"}
    for name in (reference_name, *names):
        error = answers.get(name, missing)["error"]
        if error:
            return None, error
    reference, save_or_own = answers[reference_name], [answers[name] for name in names]
    compared = save_or_own if len(names) == 1 else save_or_own[1:]
    if any(not answer["losses"] for answer in compared):
        return None, "no step was made"
    return max(relative_difference(reference, answer) for answer in compared), ""


def check_bitwise(checkout):
    """The run without any flag of context parallelism: with the adaptor, and with the stand-in for CUDA alone."""
    with_adaptor = next(iter(start_runs(checkout, [PLAIN])), None)
    without = next(iter(start_runs(checkout, [PLAIN], "--stand-in-only")), None)
    if not with_adaptor or not without or with_adaptor["error"] or without["error"] or not without["losses"]:
        return None, "did not run"
    equal = all(with_adaptor[name] == without[name] for name in ("losses", "grad_norms"))
    return (0.0, "") if equal else (relative_difference(without, with_adaptor), "differs")


# Sentences as documents, so that most samples of 64 tokens hold a boundary, and ranks unequal numbers of tokens with a
# loss.
WRITE_SENTENCES = """
import sys
from pydoc_data.topics import topics
from prepare_data import write_documents
sentences = [part for name in sorted(topics) for part in topics[name].split(". ")]
write_documents([sentence[:1 + 7 * index % 45] for index, sentence in enumerate(sentences) if sentence], sys.argv[1])
"""


def prepare_text(prefix):
    """Write real text, in short documents, to PREFIX.bin and PREFIX.idx."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "scripts"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WRITE_SENTENCES, prefix],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )


def passed(result):
    return result[0] is not None and not result[1] and result[0] <= TOLERANCE


def table(results, cases):
    """Markdown: a row per case, a column per version, the largest relative difference of loss and gradient norm."""

    def cell(result):
        if result is None:
            return "not in Megatron"
        if result[0] is None:
            return "FAILED"
        return f"{result[0]:.0e}" if passed(result) else f"FAILED {result[0]:.0e}"

    versions = list(results)
    lines = ["| algorithm | parallelism | " + " | ".join(versions) + " |", "|---|---|" + "---|" * len(versions)]
    for case in cases:
        cells = [cell(results[version].get(case.name)) for version in versions]
        lines.append(f"| {case.algorithm} | {case.parallelism} | " + " | ".join(cells) + " |")
    cells = ["bitwise equal" if passed(results[version]["plain"]) else "FAILED" for version in versions]
    return "\n".join([*lines, "| none | no flag, against no adaptor | " + " | ".join(cells) + " |"])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Megatron-LM checkout, or a folder of checkouts")
    parser.add_argument("--versions", nargs="+", help="only these, such as 0.12.1")
    parser.add_argument("--quick", action="store_true", help="a short subset of the cases")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    args = parser.parse_args(argv)
    checkouts = {
        version: path
        for version, path in find_checkouts(args.folder.resolve()).items()
        if not args.versions or version in args.versions
    }
    cases = [case for case in CASES if (case.quick or not args.quick) and args.only in case.name]
    if not checkouts or not cases:
        parser.error(
            f"{args.folder} holds no Megatron-LM checkout (pretrain_gpt.py and megatron/core)"
            if cases
            else f"no case has {args.only} in its name"
        )
    results = {}
    with tempfile.TemporaryDirectory(prefix="megatron-lm-") as folder:
        prepare_text(f"{folder}/text")
        for version, checkout in checkouts.items():
            start = time.monotonic()
            work = Path(folder, version)
            work.mkdir()
            possible = [case for case in cases if in_order(case.since) <= in_order(version) < in_order(case.before)]
            results[version] = check_version(
                checkout, version, possible, str(work), f"{folder}/text", lambda line: print(line, file=sys.stderr)
            )
            results[version]["plain"] = check_bitwise(checkout)
            failed = [name for name, result in results[version].items() if not passed(result)]
            print(
                f"{version}: {len(results[version]) - len(failed)} of {len(results[version])} passed in "
                f"{time.monotonic() - start:.0f} s" + (f"; failed: {'; '.join(failed)}" if failed else ""),
                file=sys.stderr,
                flush=True,
            )
    print(table(results, cases))
    return 0 if all(passed(result) for rows in results.values() for result in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

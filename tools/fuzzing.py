"""The long fuzzing campaign; started by tools/fuzz."""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.fuzz.adopt.build import TARGETS, build  # noqa: E402

#: Programs, crashing inputs, and logs.
CACHE = ROOT / "build" / "fuzz"
#: The Python parsers get one of so many inputs; they are a hundred times slower.
_PYTHON_SHARE = 50
_MAX_LENGTH = 1024
_EXECUTED = re.compile(r"stat::number_of_executed_units:\s*(\d+)")


def fuzz_library(inputs: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """Run the targets of adopt.so. :return: inputs for each, and the crashes."""
    counts, crashes = {}, []
    programs = CACHE / "programs"
    programs.mkdir(parents=True, exist_ok=True)
    for target, program in build(programs, "clang", libfuzzer=True).items():
        runs = -(-inputs // len(TARGETS))
        options = [f"-runs={runs}", f"-seed={seed % 2**32 or 1}", f"-max_len={_MAX_LENGTH}", "-print_final_stats=1"]
        options += [f"-artifact_prefix={CACHE}/{target}-", "-timeout=20"]
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run(
            [program, *options], stdin=subprocess.DEVNULL, capture_output=True, env=environment, check=False
        )
        log = done.stderr.decode(errors="replace")
        found = _EXECUTED.search(log)
        counts[f"adopt.so: {target}"] = int(found[1]) if found else 0
        if done.returncode:
            (CACHE / f"{target}.log").write_text(log)
            reason = next(
                (line for line in log.splitlines() if re.search(r"ERROR|does not hold|runtime error", line)), ""
            )
            crashes.append(f"adopt.so: {target}: {reason.strip() or done.returncode}; see {CACHE / target}.log")
        print(f"adopt.so: {target}: {counts[f'adopt.so: {target}']} inputs", file=sys.stderr, flush=True)
    return counts, crashes


def fuzz_parsers(inputs: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """Run the properties of the Python parsers. :return: inputs for each, and the failures."""
    tests = ["tests/fuzz", "--ignore=tests/fuzz/test_adopt.py"]
    properties = _count_properties(tests)
    with tempfile.NamedTemporaryFile("r", suffix=".json") as report:
        environment = dict(os.environ)
        environment["SEVHOP_FUZZ_EXAMPLES"] = str(max(1, -(-inputs // max(properties, 1))))
        environment["SEVHOP_FUZZ_REPORT"] = report.name
        command = [sys.executable, "-m", "pytest", "-q", *tests, f"--hypothesis-seed={seed}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        text = report.read()
    counts: dict[str, int] = json.loads(text) if text else {}
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode:
        CACHE.mkdir(parents=True, exist_ok=True)
        (CACHE / "parsers.log").write_text(done.stdout + done.stderr)
        failures.append(f"see {CACHE / 'parsers.log'}")
    return counts, failures


def _count_properties(tests: list[str]) -> int:
    files = [
        path
        for path in (ROOT / "tests" / "fuzz").glob("test_*.py")
        if f"--ignore={path.relative_to(ROOT)}" not in tests
    ]
    return sum(path.read_text().count("\n@fuzzed(") for path in files)


def main() -> int:
    """The command ``tools/fuzz``."""
    parser = argparse.ArgumentParser(prog="tools/fuzz")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seed = secrets.randbits(31) if options.seed is None else options.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    began = time.monotonic()
    for_parsers = options.inputs // _PYTHON_SHARE
    counts, crashes = fuzz_library(options.inputs - for_parsers, seed)
    more, failures = fuzz_parsers(for_parsers, seed)
    counts |= more
    crashes += failures
    seconds = round(time.monotonic() - began, 1)
    if options.json:
        total = sum(counts.values())
        print(json.dumps({"seed": seed, "seconds": seconds, "inputs": total, "targets": counts, "crashes": crashes}))
    else:
        for name, count in counts.items():
            print(f"{count:9}  {name}")
        print(f"{sum(counts.values()):9}  inputs in {seconds} s, {len(crashes)} crashes")
        for crash in crashes:
            print(crash)
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())

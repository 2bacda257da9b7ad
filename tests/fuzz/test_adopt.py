"""adopt.so with a hostile keeper and a QEMU that does anything: no bad access, and the source's memory stays whole."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .adopt.build import TARGETS, build

#: Inputs for each target.
_COUNT = 1500
#: hello of a usual keeper: mood, context, source, handle.
_HELLO = bytes([3, 0, 1, 1, 0, 0, 0])
_SOCKET = bytes([1, 0, 1, 1])
#: The same with one byte changed, and descriptors: number, 1, which byte, its value, which descriptors.
_BAD_HELLO = bytes([1, 200, 0, 1, 1, 0, 0, 0])


def _bind(length: int, content: bytes) -> bytes:
    return bytes([1, 1, length, 0]) + content.ljust(length, b"a") + bytes([1])


#: What once went wrong: target, input.
REGRESSIONS = {
    "an address as long as can be, without an end": ("listeners", _HELLO + _SOCKET + _bind(128, b"") + bytes(64)),
    "two descriptors with a reply": ("hello", _BAD_HELLO + bytes([2, 1, 0, ord("o"), 0, 1])),
    "a line feed in a reply": ("hello", _BAD_HELLO + bytes([0, 1, 3, ord("\n")])),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The targets, with gcc's sanitizers."""
    missing = [name for name in ("gcc", "objcopy") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return build(tmp_path_factory.mktemp("adopt"))


def run(program: Path, *words: str | Path) -> None:
    """Let it see the inputs."""
    # Tests are run by programs that preload things; a sanitizer must be first.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([program, *words], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("target", TARGETS)
def test_adopt_is_robust_against_any_input(programs: dict[str, Path], target: str) -> None:
    run(programs[target], "1", str(_COUNT))


@pytest.mark.parametrize("name", REGRESSIONS)
def test_adopt_is_robust_against_inputs_that_once_failed(programs: dict[str, Path], name: str, tmp_path: Path) -> None:
    target, content = REGRESSIONS[name]
    path = tmp_path / "input"
    path.write_bytes(content)
    run(programs[target], "1", "0", path)

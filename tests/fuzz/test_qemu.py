"""What a QEMU reports and shows of itself: a guest may have taken it over, and sevhop runs as root."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from sevhop.guest import command_line, cpu_features, runtime_settings, vm_generation_id
from sevhop.guest.inspection import SevContext, inspect
from sevhop.keeper.handover import HandoverProtocol, SourceHandles
from sevhop_qmp import adopt
from sevhop_qmp.device_state import configuration_section, header
from sevhop_qmp.errors import ProcessError, SevhopError
from sevhop_qmp.monitor import Commands
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.ram_block_table import parse_ramblock_table
from sevhop_qmp.saved_device_state import complete

from .inputs import clean_texts, fuzzed, json_values, raw, texts

KEYS = """
    name status enabled type id size share data base-memory blocked-reasons sev-type policy handle snp-policy errno
    vcpus registers restore-errno memfds inode mappings bytes qemu major minor micro context source ram moved
""".split()
answers = st.one_of(
    json_values,
    st.dictionaries(st.sampled_from(KEYS), json_values, max_size=6),
    st.lists(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=4), max_size=3),
    st.fixed_dictionaries(dict.fromkeys(KEYS, st.one_of(st.integers(0, 9), texts, st.booleans()))),
)


class Liar(Commands):
    """Answers one thing after the other."""

    def __init__(self, answers: list[Any]) -> None:
        self.name = "liar"
        self._answers = iter(answers)

    @property
    def version(self) -> str:
        return "9.0.0"

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float | None = None
    ) -> Any:
        return next(self._answers, None)

    async def add_fd(self, fd: int) -> tuple[int, int]:
        raise NotImplementedError


def ask(work: Any) -> None:
    """Sevhop's own errors are all that may come of it."""
    with contextlib.suppress(SevhopError):
        asyncio.run(work)


@fuzzed(replies=st.lists(answers, max_size=14))
def test_inspection_is_robust_against_any_answer(replies: list[Any]) -> None:
    process = QemuProcess.open(os.getpid())
    try:
        ask(inspect(Liar(replies), process))
    finally:
        process.close()


@fuzzed(replies=st.lists(answers, max_size=14))
def test_settings_are_robust_against_any_answer(replies: list[Any]) -> None:
    process = QemuProcess.open(os.getpid())
    liars: list[Any] = [Liar(replies) for _ in range(4)]
    try:
        ask(runtime_settings.read(liars[0], process))
        ask(cpu_features.feature_words(liars[1]))
        ask(cpu_features.compare(liars[2], {"1 ECX": 1 << 5}, liars[2]))
        ask(vm_generation_id.pinned(["-device", "vmgenid"], liars[3]))
    finally:
        process.close()


@fuzzed(replies=answers)
def test_adopt_commands_are_robust_against_any_answer(replies: Any) -> None:
    liars: list[Any] = [Liar([replies]) for _ in range(4)]
    ask(adopt.adopt_ram(liars[0]))
    ask(adopt.adopt_status(liars[1]))
    ask(adopt.move_from(liars[2], "fd"))
    ask(adopt.announce(liars[3]))


HEADER = "              Block Name    PSize              Offset               Used              Total"
cells = st.one_of(texts, st.sampled_from(["ram0", "4 KiB", "0x0", "-1", "0x" + "f" * 17, "1_0", "0x10"]))


@fuzzed(
    text=st.one_of(
        texts,
        st.lists(st.lists(cells, max_size=9).map(" ".join), max_size=4).map(lambda lines: "\n".join([HEADER, *lines])),
    )
)
def test_ram_blocks_are_robust_against_any_table(text: str) -> None:
    with contextlib.suppress(SevhopError):
        for row in parse_ramblock_table(text):
            assert 0 <= row.used <= row.size < 1 << 64
            assert 0 <= row.offset < 1 << 64


@fuzzed(stream=st.one_of(raw, raw.map(lambda rest: b"QEVM\0\0\0\3" + rest)), machine=texts)
def test_device_state_is_robust_against_any_stream(stream: bytes, machine: str) -> None:
    with contextlib.suppress(SevhopError):
        section = configuration_section(machine)
        assert section in complete(stream, header(machine))


@fuzzed(
    words=st.lists(
        st.one_of(
            clean_texts,
            st.sampled_from(
                "-chardev -mon -netdev -device -serial -pidfile -S -incoming -nographic --daemonize".split()
            ),
            json_values.map(repr),
            st.sampled_from(["socket,server=on", '{"qom-type": 1', "{}", "[", "socket,,id=a,server=on,wait"]),
        ),
        max_size=8,
    )
)
def test_command_line_is_robust_against_any_options(words: list[str]) -> None:
    derived = command_line.derive("/q", words, "0123abcd")
    assert all(isinstance(name, str) for name in command_line.memory_backends(words))
    assert all(isinstance(word, str) for word in derived.arguments)
    ready = command_line.incoming(derived.arguments, 7)
    assert ready[-3:] == ["-S", "-incoming", "defer"]
    assert (
        command_line.derive("/q", ready, "0123abcd").arguments == command_line.derive("/q", ready, "0123abcd").arguments
    )


@fuzzed(request=st.one_of(raw, raw.map(lambda rest: b"memfd 0 ram" + rest), raw.map(lambda rest: b"listener " + rest)))
def test_keeper_is_robust_against_any_request(request: bytes) -> None:
    fd = os.memfd_create("ram")
    try:
        text, given = HandoverProtocol(SourceHandles(None, {"ram": [fd]}), SevContext("none")).answer(request)
    finally:
        os.close(fd)
    assert text.isascii()
    # Something is handed out for the one request alone that asks for it.
    assert (given is not None) == (request.rstrip(b"\n") == b"memfd 0 ram") == text.startswith("fd")


FILES = ("status", "maps", "cgroup", "limits", "stat", "cmdline", "environ")


def looked_at(files: dict[str, bytes]) -> QemuProcess:
    """A process whose /proc contains this."""
    directory = Path(tempfile.mkdtemp())
    for name, content in files.items():
        (directory / name).write_bytes(content)
    process = QemuProcess.open(os.getpid())
    process._proc = directory
    return process


MAPS = b"7f0000000000-7f0000001000 rw-s 00000000 00:01 4711                       /memfd:%s (deleted)\n"
names = st.one_of(st.binary(max_size=8), texts.map(lambda text: text.encode("utf-8", "replace")))


@fuzzed(name=names)
def test_process_is_robust_against_any_name(name: bytes) -> None:
    """The kernel escapes line feeds in names, and nothing else."""
    name = name.replace(b"\n", b"\\012").replace(b"\0", b"")
    status = (
        b"Name:\t"
        + name
        + b"\nUmask:\t0022\nCapEff:\t00000000000001ff\nUid:\t1\t2\t3\t4\nGid:\t1\t2\t3\t4\nGroups:\t5 6 \n"
    )
    process = looked_at({"status": status, "maps": MAPS % name, "cgroup": b"0::/" + name + b"\n"})
    try:
        assert process.credentials.uid == 2
        assert process.credentials.groups == (5, 6)
        (mapping,) = process.mappings()
        assert os.fsencode(mapping.path) == b"/memfd:" + name + b" (deleted)"
        assert process.cgroups == [("", "/" + os.fsdecode(name))]
    finally:
        for path in process._proc.iterdir():
            path.unlink()
        process._proc.rmdir()
        process.close()


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\x0cb", "a\u2028b".encode(), b"a\x85b", b") Z 1 ("])
def test_process_is_robust_against_names_that_once_failed(name: bytes) -> None:
    test_process_is_robust_against_any_name.hypothesis.inner_test(name)  # type: ignore[attr-defined]


def test_process_that_has_exited_is_an_error() -> None:
    process = looked_at({})
    with pytest.raises(ProcessError):
        _ = process.credentials
    process._proc.rmdir()
    process.close()

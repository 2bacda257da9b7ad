"""What was set in a QEMU since its start, with fake QEMUs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sevhop.guest import cpu_features, runtime_settings, saved_settings, vm_generation_id
from sevhop.guest.absent import unless_absent
from sevhop.guest.runtime_settings import Settings
from sevhop.libvirt import lock_manager
from sevhop.process import cgroup_memory
from sevhop_qmp.errors import CommandError, SevhopError
from sevhop_qmp.monitor import Commands

NODES = [
    {"node-name": "#one", "drv": "qcow2", "file": "/disk", "write_threshold": 0},
    {"node-name": "#two", "drv": "file", "file": "/disk", "write_threshold": 0},
]
WORDS = [
    {"cpuid-input-eax": 1, "cpuid-register": "EDX", "features": (1 << 28) | 3},
    {"cpuid-input-eax": 7, "cpuid-input-ecx": 0, "cpuid-register": "EBX", "features": 1 << 16},
]


class Qemu(Commands):
    """Records the commands that set something."""

    def __init__(self, **answers: Any) -> None:
        self.name = "fake"
        self.executed: list[tuple[str, dict[str, Any]]] = []
        self._answers = {"query-named-block-nodes": NODES, **answers}

    @property
    def version(self) -> str:
        return "10.0.0"

    async def add_fd(self, fd: int) -> tuple[int, int]:
        raise NotImplementedError

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float | None = None
    ) -> Any:
        if command.startswith(("query-", "qom-get")):
            return self._answers[command]
        self.executed.append((command, dict(arguments or {})))
        answer = self._answers.get(command, "")
        if isinstance(answer, Exception):
            raise answer
        return answer


LIMITED = Settings(
    throttles={"/disk0": {"iops": 100, "group": "/disk0"}, "drive": {"bps": 5}},
    disks=["/disk0", "drive"],
    objects={"io": {"poll-max-ns": 4711, "poll-grow": 0, "thread-pool-max": 64}, "group": {"limits": {"a": 1}}},
    types={"io": "iothread", "group": "throttle-group"},
    thresholds=[("file", "/disk", 77), ("file", "/elsewhere", 7)],
    displays={"default": ("password", ["ipv4 127.0.0.1 5900"])},
    generation="a",
    chardevs=["line"],
)
NONE = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
BEFORE_IT_RUNS = [
    ("block_set_io_throttle", {"id": "/disk0", **NONE, "iops": 100, "group": "/disk0"}),
    ("block_set_io_throttle", {"device": "drive", **NONE, "bps": 5}),
    ("qom-set", {"path": "/objects/io", "property": "poll-max-ns", "value": 4711}),
    ("block-set-write-threshold", {"node-name": "#two", "write-threshold": 77}),
    ("block-set-write-threshold", {"node-name": "", "write-threshold": 7}),
]


def test_settings_unknown_to_libvirt_are_set_before_the_guest_runs(tmp_path: Path) -> None:
    saved_settings.save(tmp_path, LIMITED, None)
    failures: list[dict[str, Any]] = [{}, {"block-set-write-threshold": CommandError("it", "no such node")}]
    for failing in failures:
        qemu = Qemu(**failing)
        assert asyncio.run(saved_settings.set_before_it_runs(tmp_path, qemu)) == ""
        assert qemu.executed == BEFORE_IT_RUNS


def test_settings_need_no_query_for_most_guests(tmp_path: Path) -> None:
    plain = Settings(disks=["/disk0"], objects={"io": {"poll-max-ns": 32768, "poll-grow": 0}}, types={"io": "iothread"})
    for text in (None, "", "[]", "{}", json.dumps({"settings": {"nonsense": 1}, "cpu": None})):
        if text is None:
            saved_settings.save(tmp_path, plain, None)
        else:
            (tmp_path / "settings").write_text(text)
        qemu = Qemu()
        del qemu._answers["query-named-block-nodes"]
        assert asyncio.run(saved_settings.set_before_it_runs(tmp_path, qemu)) == ""
        assert qemu.executed == []


def test_cpu_features_are_compared_if_no_rehearsal_has_done_it(tmp_path: Path) -> None:
    cpus = {"query-cpus-fast": [{"qom-path": "/cpu"}], "qom-get": WORDS}
    ours = asyncio.run(cpu_features.feature_words(Qemu(**cpus)))
    assert ours == {"1 EDX": 3, "7.0 EBX": 1 << 16}  # the number of processors is no feature
    for cpu, lost in ((ours, ""), (ours | {"7.0 EBX": 3 << 16}, "would lose CPUID 7.0 EBX bit 17")):
        saved_settings.save(tmp_path, Settings(), cpu)
        assert asyncio.run(saved_settings.set_before_it_runs(tmp_path, Qemu(**cpus))).endswith(lost)
    assert cpu_features.gained(ours, ours | {"D.1 EAX": 2}) == ["CPUID D.1 EAX bit 1"]


def test_setting_that_cannot_be_set_is_noted() -> None:
    refusal = CommandError("qom-set", "not now")
    there = Settings(disks=["/disk0"], objects={"io": {"poll-max-ns": 1}})
    notes = asyncio.run(runtime_settings.carry_over(LIMITED, there, Qemu(**{"qom-set": refusal})))
    assert "cannot set poll-max-ns of io in the new QEMU: qom-set: not now" in notes
    assert any("the password of VNC display default" in note for note in notes)
    assert any("object group (throttle-group) was added" in note for note in notes)
    assert any("character device line was added" in note for note in notes)
    assert any("cannot read the actions at reboot, shutdown, panic, watchdog" in note for note in notes)
    assert len(runtime_settings.differences(LIMITED, there)) == 2
    assert runtime_settings.differences(LIMITED, LIMITED) == []


def test_settings_that_cannot_be_saved_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(SevhopError, match="cannot save the settings"):
        saved_settings.save(tmp_path / "missing", Settings(), None)


@pytest.mark.parametrize(
    ("written", "pinned"),
    [
        ("vmgenid,guid=auto,id=a", "vmgenid,id=a,guid=G"),
        ("vmgenid", "vmgenid,guid=G"),
        ('{"driver": "vmgenid", "guid": "auto"}', '{"driver": "vmgenid", "guid": "G"}'),
        ("edu,id=a", "edu,id=a"),
    ],
)
def test_vm_generation_id_is_set_on_the_command_line(written: str, pinned: str) -> None:
    qemu = Qemu(**{"query-vm-generation-id": {"guid": "G"}})
    arguments = ["-m", "1G", "-device", written, "-nodefaults"]
    assert asyncio.run(vm_generation_id.pinned(arguments, qemu)) == ["-m", "1G", "-device", pinned, "-nodefaults"]


class Process:
    """One in some cgroups."""

    def __init__(self, *cgroups: tuple[str, str]) -> None:
        self.cgroups = list(cgroups)


@pytest.mark.parametrize(
    ("controllers", "at", "file", "content", "noted"),
    [
        ("", "", "memory.max", "max", ""),
        ("", "", "memory.max", "1000", "memory.max"),
        ("", "/libvirt", "memory.high", "1000", "memory.high"),
        ("", "", "memory.low", "0", ""),
        ("", "", "memory.min", "5", "memory.min"),
        ("cpu,memory", "", "memory.limit_in_bytes", "9223372036854771712", ""),
        ("memory", "", "memory.limit_in_bytes", "1000", "memory.limit_in_bytes"),
        ("cpu", "", "memory.limit_in_bytes", "1000", ""),
    ],
)
def test_memory_limit_of_a_domain_is_noted(
    tmp_path: Path, controllers: str, at: str, file: str, content: str, noted: str
) -> None:
    group = "/machine.slice/machine-qemu-1-web.scope"
    root = tmp_path / "memory" if controllers else tmp_path
    directory = root / f"{group}{at}".lstrip("/")
    directory.mkdir(parents=True)
    (root / "machine.slice" / "memory.max").write_text("1")  # of all domains together: that one stays
    (directory / file).write_text(f"{content}\n")
    process: Any = Process(("pids", "/"), (controllers, f"{group}/libvirt/emulator"))
    found = cgroup_memory.unaccounted(process, tmp_path)
    assert (noted in found, bool(found)) == (True, bool(noted))


@pytest.mark.parametrize(
    ("text", "used"),
    [
        ("", False),
        ('#lock_manager = "lockd"', False),
        ('lock_manager = "nop"', False),
        ('  lock_manager="sanlock"\n', True),
        ("user = \"root\"\nlock_manager = 'lockd'", True),
    ],
)
def test_leases_are_in_use_where_they_are_configured(tmp_path: Path, text: str, used: bool) -> None:
    (tmp_path / "qemu.conf").write_text(text)
    assert lock_manager.in_use(tmp_path / "qemu.conf", ()) == used
    assert not lock_manager.in_use(tmp_path / "missing", (tmp_path / "missing.pid",))


class Refusing(Qemu):
    """Refuses each query in the same way."""

    def __init__(self, refusal: CommandError) -> None:
        super().__init__()
        self._refusal = refusal

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float | None = None
    ) -> Any:
        raise self._refusal


@pytest.mark.parametrize(
    "refusal",
    [
        CommandError("query-spice", "The command query-spice has not been found", "CommandNotFound"),
        CommandError("qom-list", "Device '/objects' not found", "DeviceNotFound"),
        CommandError("qom-get", "Property 'iothread.thread-pool-min' not found"),
        CommandError("query-vm-generation-id", "VM Generation ID device not found"),
    ],
)
def test_setting_that_qemu_does_not_have_is_none(refusal: CommandError) -> None:
    assert asyncio.run(unless_absent(Refusing(refusal), refusal.command)) is None


def test_setting_that_qemu_refuses_to_report_is_an_error() -> None:
    refusal = CommandError("qom-get", "Failed to read bitmap directory: Bad file descriptor")
    with pytest.raises(CommandError, match="Bad file descriptor"):
        asyncio.run(unless_absent(Refusing(refusal), "qom-get"))


def test_action_is_set_if_that_of_the_destination_is_unknown() -> None:
    """A guest that cannot be reset there must not be."""
    qemu = Qemu()
    asyncio.run(runtime_settings.carry_over(Settings(actions={"reboot": "shutdown"}), Settings(), qemu))
    assert ("set-action", {"reboot": "shutdown"}) in qemu.executed


def test_monitor_is_an_object_only_in_a_newer_qemu() -> None:
    ours = Settings(types={"compat_monitor1": "monitor-qmp"})
    assert not any("object" in note for note in runtime_settings.not_carried_over(ours, Settings()))
    newer = Settings(types={"compat_monitor0": "monitor-qmp"})
    (note,) = (note for note in runtime_settings.not_carried_over(ours, newer) if "object" in note)
    assert "compat_monitor1 (monitor-qmp)" in note


def test_monitor_of_a_domain_is_none_of_its_guests_objects() -> None:
    """A transit has sevhop's instead."""
    ours = Settings(types={"monitor": "monitor-qmp", "io": "iothread"})
    assert ours.without_clients().types == {"io": "iothread"}

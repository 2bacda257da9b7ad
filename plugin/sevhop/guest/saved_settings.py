"""
Settings of a domain on their way to its destination, which libvirt starts when the source has been terminated: saved in
the keeper's directory before (:func:`save`), set before the guest runs as far as libvirt does not set them
(:func:`set_before_it_runs`), the rest when it runs (:func:`finish`).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import Commands
from sevhop_qmp.process import QemuProcess

from . import cpu_features
from .runtime_settings import Settings, carry_over, differences, read, set_all

#: In the keeper's directory.
_FILE = "settings"


def save(directory: Path, ours: Settings, cpu: cpu_features.FeatureWords | None) -> None:
    """
    Save the settings of a source that is about to be terminated, for its destination.

    :param directory: of the keeper.
    :param cpu: the guest's CPUID features, if the destination is to be compared with them before it runs.
    :raises SevhopError: they cannot be saved.
    """
    write(directory, dump(ours, cpu))


def dump(ours: Settings, cpu: cpu_features.FeatureWords | None) -> str:
    """The settings as :func:`write` takes them."""
    return json.dumps({"settings": asdict(ours), "cpu": cpu})


def write(directory: Path, text: str) -> None:
    """
    Save what :func:`dump` has made of settings.

    :param directory: of the keeper.
    :raises SevhopError: it cannot be saved.
    """
    path = path_in(directory)
    try:
        with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(text)
    except OSError as err:
        raise SevhopError(
            f"cannot save the settings of the guest in {path}: {err.strerror}", "make room in /run, and try again"
        ) from err


def path_in(directory: Path) -> Path:
    """Where they are in the directory of a keeper."""
    return directory / _FILE


def _load(directory: Path) -> tuple[Settings, cpu_features.FeatureWords | None] | None:
    try:
        saved = json.loads(path_in(directory).read_text())
        fields = saved["settings"]
        fields["thresholds"] = [tuple(row) for row in fields["thresholds"]]
        fields["displays"] = {name: tuple(row) for name, row in fields["displays"].items()}
        return Settings(**fields), saved["cpu"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


async def set_before_it_runs(directory: Path, monitor: Commands) -> str:
    """
    Set in a destination of libvirt's what must be there before it runs. Nothing is compared: what cannot be set, or is
    set otherwise by libvirt, is found by :func:`finish`.

    :param directory: of the keeper.
    :return: the CPU features that the guest would lose, if they were to be compared; empty when there are none.
    :raises SevhopError: the destination does not answer, or its answers make no sense.
    """
    saved = _load(directory)
    if saved is None:
        return ""
    ours, cpu = saved
    await set_all(ours.before_it_runs(), monitor)
    missing = [] if cpu is None else cpu_features.lost(cpu, await cpu_features.feature_words(monitor))
    return f"the guest's processors would lose {', '.join(missing)}" if missing else ""


async def finish(directory: Path, monitor: Commands, pid: int) -> list[str]:
    """
    Carry over to a destination of libvirt's, which runs, what is not there yet.

    :param directory: of the keeper.
    :return: a note for each setting that is not as it was.
    """
    saved = _load(directory)
    if saved is None:
        return []
    ours = saved[0]
    try:
        process = QemuProcess.open(pid)
        try:
            theirs = await read(monitor, process)
        finally:
            process.close()
        # libvirt has set the passwords that are in its XML.
        ours = replace(ours, displays={name: ("", row[1]) for name, row in ours.displays.items()})
        ours = replace(ours, tickets=False)
        return await carry_over(ours, theirs, monitor) + differences(ours, theirs)
    except SevhopError as err:
        return [f"cannot compare the settings of the two QEMUs: {err.message}"]

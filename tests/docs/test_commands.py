"""
Every command in the documentation is run, and its output compared; or it is in a list here, with the reason.

XML that a page gives a name is written to a file of that name.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .conftest import Host
from .console import Command, commands, difference, is_status
from .pages import Page, page, pages

_ALL_OF_IT = "it takes many minutes; what it runs is run by the tests themselves"
_LAB = "boots the SEV lab, which tests/lab does"
_BENCH = "measures for minutes; tests/libvirt/test_bench.py runs a small part"
_PACKAGE = "tests/packaging builds the package, and installs it in clean Debian releases"
_INSTALLS = "changes the machine and needs the network; tools/environment installs the tree in the same way"
#: Commands that cannot be run here, or that other tests run.
NOT_RUN: dict[str, str] = {
    "tools/demo": "takes minutes, and hops as tests/qemu and tests/lab do, with the same guests",
    "tools/test": _ALL_OF_IT,
    'tools/test tests/qemu/test_recover.py -m "faults or not faults" --fault-table FILE': _ALL_OF_IT,
    'tools/test tests/qemu/test_sev_es_recover.py -m "faults or not faults" --fault-table FILE': _ALL_OF_IT,
    'tools/test tests/libvirt/test_transit_faults.py -m "faults or not faults" --fault-table FILE': _ALL_OF_IT,
    'tools/test tests/libvirt/test_recover.py -m "faults or not faults" --fault-table FILE': _ALL_OF_IT,
    'tools/test tests/lab/qemu/test_sev_recover.py -m "faults or not faults" --fault-table FILE': _ALL_OF_IT,
    'tools/test tests/lab/qemu/test_sev_es_recover.py -m "faults or not faults" --fault-table FILE': _ALL_OF_IT,
    "tools/bench/run": _BENCH,
    "tools/bench/run --quick": _BENCH,
    "tools/bench/run --only domains --modes upgrade,save-restore --sizes 256,4096": _BENCH,
    "tools/bench/run --only domains,busy,pings --modes hop,upgrade,upgrade-no-transit,nothing --rounds 10"
    " --busy-sizes 256,8192 --ping-sizes 256": _BENCH,
    "tools/bench/run --only standalone --output DIRECTORY": _BENCH,
    "tools/lab/run cat /sys/module/kvm_amd/parameters/sev": _LAB,
    "tools/lab/run --kernel 6.12 .venv/bin/python -m pytest tests/lab/contract": _LAB,
    ".venv/bin/python -m pytest tests/lab": _LAB,
    "tools/lab/run bash -c 'virtlogd -d; libvirtd -d; sleep 5; virsh domcapabilities'": _LAB,
    "tools/package dist": _PACKAGE,
    "apt-get install ./dist/sevhop_0.1.0-1_amd64.deb": _PACKAGE,
    "apt-get install --no-install-recommends python3-venv python3-dev gcc libc6-dev pkg-config libvirt-dev": _INSTALLS,
    "python3 -m venv /opt/sevhop": _INSTALLS,
    "/opt/sevhop/bin/pip install '.[libvirt]'": _INSTALLS,
    "ln -s /opt/sevhop/bin/sevhop /usr/local/bin/": _INSTALLS,
}
#: The update of QEMU's package in the pages; here it changes the link to QEMU.
_UPDATE = "apt-get install --only-upgrade qemu-system-x86"
#: The guide has the commands that create the guests of the other pages.
_GUIDE = "docs/administrator.md"
_MAKES_GUESTS = ("qemu-img create", "virsh --quiet define web1", "virsh --quiet start web1", "qemu-system-x86_64 ")


def page_commands(one: Page) -> list[Command]:
    """All commands of a page."""
    return [command for block in one.of("console") for command in commands(block)]


#: Reported when a busy host has stopped a guest for more than a second.
_STOPPED_FOR_LONG = re.compile(
    r"\nnote: the guest was stopped for [^\n]+"
    r"|[:;] the guest was stopped for [^;\n]+ s; its clock was not set: it has no guest agent"
)
RUN = [one for one in pages() if any(command.text not in NOT_RUN for command in page_commands(one))]


def run_page(host: Host, one: Page, todo: list[Command], new: Path) -> list[str]:
    """Run the commands of a page. :return: the differences."""
    for block in one.of("xml"):
        if block.file:
            host.write(block)
    wrong = []
    for command, following in zip(todo, [*todo[1:], None], strict=True):
        if command.text in NOT_RUN:
            continue
        if command.text == _UPDATE:
            host.install(new)
            continue
        status, output = host.shell.run(command.text)
        output = _STOPPED_FOR_LONG.sub("", output)
        differs = difference(command, output)
        if status and not (following and is_status(following)):
            differs = f"exit status {status}"
        if differs:
            wrong.append(f"{one.name}:{command.line}: {command.text}\n{differs}\n\nall output:\n{output}")
    return wrong


@pytest.mark.parametrize("one", RUN, ids=lambda one: one.name)
def test_commands_print_what_the_page_says(one: Page, host: Host, new: Path) -> None:
    if one.name != _GUIDE:
        guide = page(_GUIDE)
        given = [command for command in page_commands(guide) if command.text.startswith(_MAKES_GUESTS)]
        for command in given:
            command.output.clear()
        assert not run_page(host, guide, given, new)
        host.install(new)
    wrong = run_page(host, one, page_commands(one), new)
    assert not wrong, "\n\n".join(wrong)


def test_commands_not_run_are_in_a_page() -> None:
    everywhere = {command.text for one in pages() for command in page_commands(one)}
    assert set(NOT_RUN) <= everywhere

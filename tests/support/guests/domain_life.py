"""The same as :mod:`.life` for a domain: what an administrator does to it with virsh."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from typing import Any, TypeAlias
from xml.etree import ElementTree

from .enclosure import GUESTS
from .life import LONGEST_CHAIN, AnyLife, Changed, Facts, NotNow, chain_of

Done: TypeAlias = subprocess.CompletedProcess[str]
#: Runs a command where the domain's libvirt is.
Run: TypeAlias = Callable[..., Done]

_CARD = "52:54:00:5e:70:01"
_ENTROPY = "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"


class VirshFailed(Exception):
    """virsh has failed."""


def devices(name: str) -> str:
    """What the life of a domain needs, in XML; :func:`make_files` makes the files."""
    drive = "<disk type='file' device='{}'><driver name='qemu' type='raw'/><source file='{}'/>{}</disk>"
    return "".join(
        [
            "<controller type='pci' index='0' model='pcie-root'/>",
            *[f"<controller type='pci' index='{number}' model='pcie-root-port'/>" for number in range(1, 9)],
            "<controller type='scsi' model='virtio-scsi'/><controller type='usb' model='qemu-xhci'/>",
            drive.format("cdrom", _file(name, "one.iso"), "<target dev='sdb' bus='scsi'/><readonly/>"),
            drive.format("disk", _file(name, "spare.raw"), "<target dev='sdc' bus='scsi'/>"),
            f"<interface type='user'><mac address='{_CARD}'/><model type='usb-net'/>"
            "<address type='usb' bus='0' port='1'/></interface>",
        ]
    )


def make_files(run: Run, name: str) -> None:
    """The files of :func:`devices`, where the domain's libvirt is."""
    for suffix in ("one.iso", "two.iso", "spare.raw"):
        run("truncate", "--size", "1M", _file(name, suffix))
    run("sh", "-c", 'printf %s "$1" >"$2"', "sh", _ENTROPY, _file(name, "rng.xml"))


class DomainLife(AnyLife):
    """What is done to one domain, with :func:`devices`."""

    def __init__(self, run: Run, name: str, choices: random.Random) -> None:
        super().__init__(choices)
        self._run = run
        self._domain = name

    def do(self, what: str) -> Changed:
        """
        Do one of :data:`ALL`, or ``commit``, ``remove_bitmap``, ``stop``, ``cont``.

        :return: what it changes.
        :raises NotNow: it has no meaning now.
        :raises VirshFailed: it was refused.
        """
        step: Callable[[], Changed] = getattr(self, f"_{what}")
        return step()

    def facts(self) -> Facts:
        """What the domain is now: as libvirt reports it, and as QEMU does."""
        facts = {"status": self._virsh("domstate", self._domain)}
        tree = self._xml()
        for disk in tree.iterfind("devices/disk"):
            target, source = disk.find("target"), disk.find("source")
            assert target is not None
            facts[f"file {target.get('dev')}"] = source.get("file", "") if source is not None else ""
        for mac in tree.iterfind("devices/interface/mac"):
            facts[f"device {mac.get('address')}"] = "interface"
        if tree.findall("devices/rng"):
            facts["device rng"] = str(len(tree.findall("devices/rng")))
        for row in self._ask("query-block"):
            image, name = row.get("inserted") or {}, row["qdev"].removesuffix("/virtio-backend").rpartition("/")[2]
            facts[f"open {name}"] = str(image.get("file", ""))
            if image.get("iops"):
                facts[f"throttle {name}"] = str(image["iops"])
        for node in self._ask("query-named-block-nodes"):
            for bitmap in node.get("dirty-bitmaps", ()):
                if bitmap.get("persistent"):
                    facts[f"bitmap {bitmap['name']}"] = "inconsistent" if bitmap.get("inconsistent") else "usable"
        facts["affinity"] = self._virsh("vcpuinfo", self._domain).rpartition("CPU Affinity:")[2].split()[0]
        return facts

    # -- disks -------------------------------------------------------------------------------------

    def _snapshot(self) -> Changed:
        if self._bitmaps():
            raise NotNow("libvirt would put a bitmap of the same name into the snapshot")
        if len(self._chain()) > LONGEST_CHAIN:
            return self._commit()
        path = _file(self._domain, f"{self._name()}.qcow2")
        words = ["--disk-only", "--no-metadata", "--diskspec", f"vda,file={path}"]
        for other in self._xml().iterfind("devices/disk/target"):
            if other.get("dev") != "vda":
                words += ["--diskspec", f"{other.get('dev')},snapshot=no"]
        self._virsh("snapshot-create-as", self._domain, *words)
        return {"file vda": path, "open virtio-disk0": path}

    def _commit(self) -> Changed:
        chain = self._chain()
        if len(chain) < 2 or self._bitmaps():
            raise NotNow("there is no snapshot, or it has a bitmap")
        self._virsh("blockcommit", self._domain, "vda", "--active", "--pivot", "--wait")
        return {"file vda": chain[-1], "open virtio-disk0": chain[-1]}

    def _medium(self) -> Changed:
        now = self._sources()["sdb"]
        if now and self._choices.random() < 0.3:
            self._virsh("change-media", self._domain, "sdb", "--eject", "--force", "--live")
            return {"file sdb": "", "open scsi0-0-0-1": ""}
        path = _file(self._domain, "one.iso" if now.endswith("two.iso") else "two.iso")
        self._virsh("change-media", self._domain, "sdb", path, "--update", "--force", "--live")
        return {"file sdb": path, "open scsi0-0-0-1": path}

    def _unplug_disk(self) -> Changed:
        if not self._has("sdc"):
            raise NotNow("it is unplugged")
        self._virsh("detach-disk", self._domain, "sdc", "--live")
        return {"file sdc": None, "open scsi0-0-0-2": None}

    def _plug_disk(self) -> Changed:
        if self._has("sdc"):
            raise NotNow("it is plugged")
        path = _file(self._domain, "spare.raw")
        words = ["--targetbus", "scsi", "--driver", "qemu", "--subdriver", "raw", "--live"]
        self._virsh("attach-disk", self._domain, path, "sdc", *words)
        return {"file sdc": path, "open scsi0-0-0-2": path}

    def _throttle(self) -> Changed:
        iops = self._choices.randrange(100_000, 200_000)
        self._virsh("blkdeviotune", self._domain, "vda", "--total-iops-sec", str(iops), "--live")
        return {"throttle virtio-disk0": str(iops)}

    def _bitmap(self) -> Changed:
        if self._bitmaps():
            return self._remove_bitmap()
        name = self._name()
        self._ask("block-dirty-bitmap-add", node=self._top()["node-name"], name=name, persistent=True)
        return {f"bitmap {name}": "usable"}

    def _remove_bitmap(self) -> Changed:
        top = self._top()
        if not (bitmaps := top.get("dirty-bitmaps")):
            raise NotNow("there is none")
        self._ask("block-dirty-bitmap-remove", node=top["node-name"], name=bitmaps[0]["name"])
        return {f"bitmap {bitmaps[0]['name']}": None}

    def _bitmaps(self) -> bool:
        return any(node.get("dirty-bitmaps") for node in self._ask("query-named-block-nodes"))

    def _top(self) -> dict[str, Any]:
        """The topmost image of the disk that the guest works with."""
        (image,) = (row["inserted"] for row in self._ask("query-block") if "virtio-disk0" in row["qdev"])
        assert isinstance(image, dict)
        return image

    def _chain(self) -> list[str]:
        return chain_of(self._top()["image"])

    def _sources(self) -> dict[str, str]:
        found = {}
        for disk in self._xml().iterfind("devices/disk"):
            target, source = disk.find("target"), disk.find("source")
            assert target is not None
            found[target.get("dev", "")] = source.get("file", "") if source is not None else ""
        return found

    def _has(self, target: str) -> bool:
        return target in self._sources()

    # -- cards and processors ----------------------------------------------------------------------

    def _unplug_card(self) -> Changed:
        if not any(mac.get("address") == _CARD for mac in self._xml().iterfind("devices/interface/mac")):
            raise NotNow("it is unplugged")
        self._virsh("detach-interface", self._domain, "user", "--mac", _CARD, "--live")
        return {f"device {_CARD}": None}

    def _plug_card(self) -> Changed:
        if self._xml().findall("devices/rng"):
            raise NotNow("it is plugged")
        self._virsh("attach-device", self._domain, _file(self._domain, "rng.xml"), "--live")
        return {"device rng": "1"}

    def _pin(self) -> Changed:
        wanted = self._choices.choice(["0", "1", "0-1"])
        self._virsh("vcpupin", self._domain, "0", wanted, "--live")
        return {"affinity": {"0": "y-", "1": "-y", "0-1": "yy"}[wanted]}

    def _stop(self) -> Changed:
        self._virsh("suspend", self._domain)
        return {"status": "paused"}

    def _cont(self) -> Changed:
        self._virsh("resume", self._domain)
        return {"status": "running"}

    # -- libvirt -----------------------------------------------------------------------------------

    def _xml(self) -> ElementTree.Element:
        return ElementTree.fromstring(self._virsh("dumpxml", self._domain))

    def _ask(self, command: str, **arguments: object) -> Any:
        text = json.dumps({"execute": command, "arguments": arguments})
        answer = json.loads(self._virsh("qemu-monitor-command", self._domain, text))
        if "error" in answer:
            raise VirshFailed(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def _virsh(self, *words: str) -> str:
        done = self._run("virsh", "--quiet", *words)
        if done.returncode:
            raise VirshFailed(f"virsh {words[0]}: {done.stderr.strip()}")
        return done.stdout.strip()


def _file(name: str, suffix: str) -> str:
    return f"{GUESTS}/{name}-{suffix}"

"""The tree is the architecture: a room imports from rooms below it, and modules in it never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import sevhop
import sevhop_qmp

#: From top to bottom; docs/architecture.md has what each is for.
ROOMS = (
    "cli",
    "observe",
    "api",
    "transit_keeper",
    "engine",
    "checks",
    "install",
    "keeper",
    "records",
    "libvirt",
    "disks",
    "guest",
    "process",
    "cancellation",
    "events",
    "report",
    "errors",
    "options",
)


def modules(package: Path) -> dict[str, Path]:
    """Name, as in an import below the package, and file."""
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): path
        for path in package.rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }


def imported(package: Path, name: str, path: Path) -> Iterator[str]:
    """What a module imports from its own package, wherever in it the import stands."""
    known = modules(package)
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = name.split(".")[: -node.level]
        elif node.module and node.module.split(".")[0] == package.name:
            base = []
        else:
            continue
        rest = node.module.split(".")[0 if node.level else 1 :] if node.module else []
        for alias in node.names:
            for candidate in (".".join([*base, *rest, alias.name]), ".".join([*base, *rest])):
                if candidate in known:
                    yield candidate
                    break
            else:
                pytest.fail(f"{name} imports {alias.name} from {'.'.join([*base, *rest])}, which is not a module")


def package(module: object) -> Path:
    return Path(getattr(module, "__path__")[0])  # noqa: B009 - a module, of which mypy knows nothing


PLUGIN = package(sevhop)
QMP = package(sevhop_qmp)


def test_every_module_has_a_room() -> None:
    assert {name.split(".")[0] for name in modules(PLUGIN)} == set(ROOMS)


@pytest.mark.parametrize("name", sorted(modules(PLUGIN)))
def test_imports_go_downwards(name: str) -> None:
    below = ROOMS[ROOMS.index(name.split(".")[0]) :]
    assert [one for one in imported(PLUGIN, name, modules(PLUGIN)[name]) if one.split(".")[0] not in below] == []


@pytest.mark.parametrize("root", [PLUGIN, QMP], ids=lambda root: str(root.name))
def test_imports_have_no_circle(root: Path) -> None:
    """A function's own import counts: the order in which modules happen to be loaded must not matter."""
    known = modules(root)
    TopologicalSorter({name: set(imported(root, name, path)) for name, path in known.items()}).prepare()


def test_what_speaks_to_qemu_knows_nothing_of_hops() -> None:
    found = [
        path.name
        for path in modules(QMP).values()
        for line in path.read_text().splitlines()
        if line.strip().startswith(("from sevhop.", "from sevhop ", "import sevhop."))
    ]
    assert found == []


def test_modules_of_tests_are_not_imported_by_tests() -> None:
    """What tests share is in a module of its own, or in tests/support."""
    tests = Path(__file__).parents[1]
    imports = [line for path in tests.rglob("*.py") for line in path.read_text().splitlines() if "import" in line]
    assert [line for line in imports if line.startswith("from .") and ".test_" in line] == []

"""
Prints completions for a shell, generated from sevhop's argument parser; ``tools/manual`` runs this for each shell.

A DOMAIN is completed with the names of libvirt's active domains. A name may contain any character, and is quoted so
that the shell does not interpret it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import shtab
from sevhop.cli import parser as sevhop_parser
from sevhop.libvirt.daemon import DEFAULT_URI

#: The completion functions of a domain and of a path.
_DOMAINS = {"bash": "_sevhop_domains", "zsh": "_sevhop_domains", "fish": "(_sevhop_domains)"}
_COMPLETED = {"DOMAIN": _DOMAINS, "PATH": shtab.FILE}

_LIST = f"virsh --readonly --quiet --connect {DEFAULT_URI} list --name 2>/dev/null"
_PREAMBLE = {
    # Readline needs the word in the form in which it is typed.
    "bash": f"""
_sevhop_domains() {{
  local name quoted
  while IFS= read -r name; do
    printf -v quoted %q "$name"
    [[ -n $name && ( $name == "$1"* || $quoted == "$1"* ) ]] && printf '%s\\n' "$quoted"
  done < <({_LIST})
}}
""",
    "zsh": f"""
_sevhop_domains() {{
  local -a names
  names=(${{(f)"$({_LIST})"}})
  compadd -a -- names
}}
""",
    "fish": f"""
function _sevhop_domains
  {_LIST} | string match --regex '.+'
end
""",
}


def parser() -> argparse.ArgumentParser:
    """sevhop's parser, with a completion function for each argument."""
    top = sevhop_parser.parser()
    for action in _actions(top):
        if action.metavar in _COMPLETED:
            action.complete = _COMPLETED[action.metavar]  # shtab looks for that attribute
    return top


def _actions(one: argparse.ArgumentParser) -> Iterator[Any]:
    for action in one._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in set(action.choices.values()):
                yield from _actions(command)
        else:
            yield action


def main() -> None:
    """Print the completions; the shell is the only argument."""
    own = argparse.ArgumentParser(description="Print completions for a shell.")
    own.add_argument("shell", choices=sorted(_PREAMBLE))
    shell = own.parse_args().shell
    sys.stdout.write(shtab.complete(parser(), shell, preamble=_PREAMBLE[shell]))


if __name__ == "__main__":
    main()

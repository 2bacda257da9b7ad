"""
Something is done in the keeper of a transit at an exact moment: it waits, or is killed, or something else is.

The keeper inherits the environment of the program that starts it, and Python in it runs a module that replaces one
function. Each happens once, however many keepers there are.
"""

from __future__ import annotations

from pathlib import Path

#: In the daemon's file system. The first exists when the moment has come; the second ends a wait.
REACHED, GO = Path("/run/intercepted"), Path("/run/go-on")

#: Moments: module, class or empty, function; before the function is called.
MOMENTS = {
    "met": ("sevhop.engine.second_hop", "SecondHop", "_stop"),
    "stopped": ("sevhop.engine.second_hop", "", "save"),
    "saved": ("sevhop.engine.second_hop", "", "hand_over"),
    "arrived": ("sevhop.engine.second_hop", "SecondHop", "_finish"),
    "transit ended": ("sevhop.transit_keeper.restores", "Restores", "_arrived"),
    "moving": ("sevhop.engine.transit_move", "", "move_out"),
    "ordered": ("sevhop_qmp.adopt", "", "move_from"),
}
#: The same, when the function has returned, and nobody knows yet what.
LATER = {"moved": ("sevhop_qmp.move", "", "move")}

_TEXT = """
import asyncio, os, signal, sys

if "sevhop.transit_keeper.main" in " ".join(sys.orig_argv):
    import {module} as module

    owner = {owner}
    original = owner.{function}

    async def intercepted(*arguments, **options):
        try:
            os.close(os.open({reached!r}, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            first = True
        except FileExistsError:
            first = False
        {before}
        result = await original(*arguments, **options)
        {after}
        return result

    owner.{function} = intercepted
"""
#: What is done. ``first`` is whether it has not been done before.
WAIT = "while not os.path.exists({go!r}): await asyncio.sleep(0.005)"
DIE = "first and os.kill(os.getpid(), signal.SIGKILL)"
HALT_DESTINATION = "first and arguments[0].started.destination.process.halt()"
RESET_GUEST = """if first:
            monitor = arguments[0]._met.monitor
            await monitor.execute("set-action", {{"reboot": "shutdown"}})
            await monitor.execute("system_reset")"""
KILL_DESTINATION = "first and arguments[0].started.destination.process.kill()"
KILL_DESTINATION_OF_MOVE = "first and arguments[2].started.destination.process.kill()"
KILL_PEER = "first and os.kill(arguments[0].peer, signal.SIGKILL)"


def environment(directory: Path, moment: str, action: str) -> str:
    """
    What the program that starts the keeper must have in its environment.

    :param directory: for the module.
    """
    module, owner, function = (MOMENTS | LATER)[moment]
    action = action.format(go=str(GO))
    text = _TEXT.format(
        module=module,
        owner=f"module.{owner}" if owner else "module",
        function=function,
        reached=str(REACHED),
        before="pass" if moment in LATER else action,
        after=action if moment in LATER else "pass",
    )
    (directory / "sitecustomize.py").write_text(text)
    return f"PYTHONPATH={directory}"

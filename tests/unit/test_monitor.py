"""The monitor's connection, with a QEMU that is played."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Sequence

import pytest
from sevhop_qmp.errors import MonitorClosed, MonitorError
from sevhop_qmp.monitor import Monitor

GREETING = {"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}
EVENT = {"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RTC_CHANGE", "data": {"offset": 1}}


def play(*before_the_answer: object, before_the_greeting: Sequence[object] = (), answer: object = None) -> list[object]:
    """What a client gets who connects, asks for the status, and listens, when QEMU sends something before its reply."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for message in (*before_the_greeting, GREETING, *before_the_answer):
            writer.write(json.dumps(message).encode() + b"\r\n")
        # A client waits for each answer before it sends the next command, and sends no line feeds.
        while text := await reader.read(4096):
            command = json.loads(text)
            if answer is not None:
                writer.write(json.dumps(answer).encode() + b"\r\n")
                continue
            if command["execute"] == "query-status":
                writer.write(json.dumps(EVENT).encode() + b"\r\n")
            writer.write(json.dumps({"return": {"to": command["execute"]}, "id": command.get("id")}).encode() + b"\r\n")
        writer.close()

    async def talk() -> list[object]:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        serving = asyncio.ensure_future(serve(*await asyncio.open_connection(sock=theirs)))
        async with await Monitor.connect(ours, timeout=10, greeting_timeout=10) as monitor:
            with monitor.events("RTC_CHANGE") as events:
                answers = [monitor.version, await monitor.execute("query-status"), await monitor.next_event(events)]
        await serving
        return answers

    return asyncio.run(talk())


def test_events_before_the_greeting_are_no_greeting() -> None:
    """A client that was there before had negotiated."""
    version, _, event = play(before_the_greeting=[EVENT, EVENT])
    assert version == "7.2.22"
    assert event["event"] == "RTC_CHANGE"  # type: ignore[index]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_events_before_the_capabilities_are_answered_are_no_answer(count: int) -> None:
    version, status, event = play(*[EVENT] * count)
    assert version == "7.2.22"
    assert status == {"to": "query-status"}
    assert event["event"] == "RTC_CHANGE"  # type: ignore[index]


def test_monitor_is_refused_if_its_message_is_unknown() -> None:
    with pytest.raises(MonitorError, match="does not speak QMP"):
        play(answer={"error": {"class": "GenericError", "desc": "no"}})


@pytest.mark.parametrize("lines", [0, 1, 2], ids=["at once", "after the greeting", "after the negotiation"])
def test_monitor_that_hangs_up_is_no_bug_of_ours(lines: int) -> None:
    """The QEMU exits at that moment. After the last line it depends on which of both comes first."""

    async def talk() -> None:
        ours, theirs = socket.socketpair()
        for message in [GREETING, {"return": {}}][:lines]:
            theirs.sendall(json.dumps(message).encode() + b"\r\n")
        theirs.close()
        async with await Monitor.connect(ours, name="it", timeout=10, greeting_timeout=10) as monitor:
            await monitor.execute("query-status")

    with pytest.raises(MonitorClosed):
        asyncio.run(talk())

"""A hook call that is passed on to the keeper: whatever arrives, the keeper keeps running."""

from __future__ import annotations

import asyncio
import os
import socket

from hypothesis import strategies as st
from sevhop.libvirt import hook_server

from .described_domains import xmls
from .inputs import fuzzed, raw, texts

ARGUMENTS = st.lists(
    st.one_of(texts, st.sampled_from(["suspended", "restore", "prepare", "started", "begin", "-"])), max_size=5
).map(lambda arguments: "\0".join(arguments).encode(errors="surrogatepass"))
STEPS = ("restore", "prepare", "started", "migrate", "reconnect", "stopped")
WHOLE = st.sampled_from([f"suspended\0{step}\0begin\0-".encode() for step in STEPS])


async def _call(call: bytes, xml: bytes, descriptors: int, answer: str) -> bytes:
    """Send a call, with so many of three streams. :return: the reply."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def reply(_: socket.socket, __: str) -> str:
        return answer

    with ours, theirs:
        files = [os.memfd_create("stream", os.MFD_CLOEXEC) for _ in range(3)]
        os.pwrite(files[0], xml, 0)
        socket.send_fds(theirs, [call or b"\0"], files[:descriptors])
        for file in files:
            os.close(file)
        await asyncio.to_thread(hook_server._serve, ours.dup(), reply, asyncio.get_running_loop())
        ours.close()
        return theirs.recv(16)


@fuzzed(
    call=st.one_of(raw, ARGUMENTS, WHOLE),
    xml=st.one_of(raw, xmls.map(lambda xml: xml.encode(errors="surrogatepass"))),
    descriptors=st.integers(0, 3),
    answer=st.one_of(texts, st.sampled_from(["ok", "ok /usr/bin/qemu", "error", "foreign"])),
)
def test_server_is_robust_against_any_call(call: bytes, xml: bytes, descriptors: int, answer: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    status = asyncio.run(_call(call, xml, descriptors, answer))
    assert status in ((b"\0", b"\1") if descriptors == 3 else (b"",))
    assert len(os.listdir("/proc/self/fd")) == before, "no descriptor leaks"

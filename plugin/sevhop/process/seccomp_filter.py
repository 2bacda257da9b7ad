"""
Compares what the seccomp filters of two processes forbid.

The same number of filters proves little: ``-sandbox on`` installs one filter whatever else it denies, and the command
line is read from the source's memory. The filters themselves are read from the kernel (PTRACE_SECCOMP_GET_FILTER,
ptrace(2)), as programs of classic BPF (seccomp(2)). Those of two versions of QEMU are not the same, so they are
evaluated: for each system call, and for the values of arguments that they load.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import time
from collections.abc import Iterator, Sequence

from sevhop_qmp.errors import ProcessError
from sevhop_qmp.invalid_data import invalid

_PTRACE_SEIZE, _PTRACE_INTERRUPT, _PTRACE_DETACH, _PTRACE_SECCOMP_GET_FILTER = 0x4206, 0x4207, 17, 0x420C
_WALL = 0x40000000
#: Seconds within which a thread must have stopped.
_PATIENCE = 2.0
_POLL = 0.0002
#: AUDIT_ARCH_X86_64 and AUDIT_ARCH_I386; the bit of a number that is of the x32 ABI; more numbers than there are.
_X86_64, _I386, _X32, _NUMBERS = 0xC000003E, 0x40000003, 0x40000000, 480
_ALLOW, _LOG = 0x7FFF, 0x7FFC
#: struct seccomp_data: number, architecture, instruction pointer, six arguments.
_DATA = struct.Struct("=IIQ6Q")
_FIRST_ARGUMENT = 16
_WORD = 0xFFFFFFFF

#: (code, jump if true, jump if false, operand)
Instruction = tuple[int, int, int, int]
Program = tuple[Instruction, ...]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class UnknownFilter(ProcessError):
    """The filters cannot be read, or contain an unknown instruction."""


def of(thread: int) -> tuple[Program, ...]:
    """
    The filters of a thread, which is stopped for a fraction of a millisecond. Not to be used for a vCPU thread.

    :raises UnknownFilter: they cannot be read.
    """
    from concurrent.futures import ThreadPoolExecutor  # takes long, and is seldom needed

    # The tracer is a thread: when it exits, for whatever reason, the kernel detaches it.
    with ThreadPoolExecutor(max_workers=1) as tracer:
        return tracer.submit(_read, thread).result()


def lost(source: Sequence[Program], destination: Sequence[Program]) -> list[str]:
    """
    System calls, with their arguments, that the source's filters forbid and the destination's allow.

    :raises UnknownFilter: a filter contains an unknown instruction.
    """
    return _lost(tuple(source), tuple(destination))


@functools.lru_cache(maxsize=16)
def _lost(source: tuple[Program, ...], destination: tuple[Program, ...]) -> list[str]:
    if source == destination:
        return []
    constants = sorted({operand for program in (*source, *destination) for _, _, _, operand in program})
    values = sorted({value for one in constants for value in (one, _WORD - one, one << 32)} | {0, 2**64 - 1})
    found = []
    for architecture, first in ((_X86_64, 0), (_X86_64, _X32), (_I386, 0)):
        for number in range(first, first + _NUMBERS):
            for arguments in _arguments((*source, *destination), architecture, number, values):
                data = _DATA.pack(number, architecture, 0, *arguments)
                if not _allowed(source, data) and _allowed(destination, data):
                    found.append(f"{number} of {'i386' if architecture == _I386 else 'x86-64'}")
                    break
    return found


def _arguments(
    programs: Sequence[Program], architecture: int, number: int, values: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """Arguments to be evaluated: zeros, and each value in each argument that a program loads."""
    nothing = (0,) * 6
    yield nothing
    seen: set[int] = set()
    data = _DATA.pack(number, architecture, 0, *nothing)
    for program in programs:
        _run(program, data, seen)
    for position in sorted({(offset - _FIRST_ARGUMENT) // 8 for offset in seen if offset >= _FIRST_ARGUMENT}):
        for value in values:
            yield (*nothing[:position], value, *nothing[position + 1 :])


def _allowed(programs: Sequence[Program], data: bytes) -> bool:
    """All filters are evaluated, and the strictest result counts."""
    return all(_run(program, data, set()) >> 16 in (_ALLOW, _LOG) for program in programs)


def _run(program: Program, data: bytes, seen: set[int]) -> int:
    """
    The return value of a filter.

    :param seen: gets the offsets in the data that it has loaded.
    """
    accumulator, index, memory, at = 0, 0, [0] * 16, 0
    try:
        while True:
            code, true, false, operand = program[at]
            at += 1
            if code == 0x15:  # jeq k, the most frequent
                at += true if accumulator == operand else false
            elif code in (0x20, 0x21):  # ld [k]
                seen.add(operand)
                accumulator = int.from_bytes(data[operand : operand + 4], "little")
            elif code == 0x05:  # ja
                at += operand
            elif code & 7 == 5:
                at += true if _holds(code & 0xF0, accumulator, index if code & 8 else operand) else false
            elif code & 7 == 6:  # ret
                return accumulator if code & 0x18 == 0x10 else operand
            elif code & 7 == 4:  # arithmetic
                accumulator = _calculate(code & 0xF0, accumulator, index if code & 8 else operand)
            elif code in (0x00, 0x60):  # ld
                accumulator = memory[operand] if code == 0x60 else operand
            elif code in (0x01, 0x61):  # ldx
                index = memory[operand] if code == 0x61 else operand
            elif code in (0x02, 0x03):  # st, stx
                memory[operand] = accumulator if code == 0x02 else index
            elif code in (0x07, 0x87):  # tax, txa
                accumulator, index = (index, index) if code == 0x87 else (accumulator, accumulator)
            else:
                raise UnknownFilter(f"cannot evaluate a seccomp filter: unknown instruction {code:#x}")
    except (LookupError, ArithmeticError) as err:
        raise UnknownFilter(f"cannot evaluate a seccomp filter: {invalid(err)}") from err


def _holds(kind: int, one: int, other: int) -> bool:
    """Whether a jump is taken."""
    comparisons = {
        0x10: lambda: one == other,
        0x20: lambda: one > other,
        0x30: lambda: one >= other,
        0x40: lambda: bool(one & other),
    }
    return comparisons[kind]()


def _calculate(kind: int, one: int, other: int) -> int:
    operations = {
        0x00: lambda: one + other,
        0x10: lambda: one - other,
        0x20: lambda: one * other,
        0x30: lambda: one // other if other else 0,
        0x40: lambda: one | other,
        0x50: lambda: one & other,
        0x60: lambda: one << (other & 31),
        0x70: lambda: one >> (other & 31),
        0x80: lambda: -one,
        0xA0: lambda: one ^ other,
    }
    return operations[kind]() & _WORD


# -- ptrace ----------------------------------------------------------------------------------------


def _ptrace(
    request: int, thread: int, address: int | None = None, data: ctypes.Array[ctypes.c_char] | None = None
) -> int:
    result = int(_libc.ptrace(request, thread, address, data))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _read(thread: int) -> tuple[Program, ...]:
    try:
        _ptrace(_PTRACE_SEIZE, thread)
        _ptrace(_PTRACE_INTERRUPT, thread)
        _wait_stopped(thread)
        try:
            return tuple(_filters(thread))
        finally:
            _ptrace(_PTRACE_DETACH, thread)
    except (OSError, ChildProcessError) as err:
        raise UnknownFilter(f"cannot read the seccomp filters of thread {thread}: {err.strerror}") from err


def _wait_stopped(thread: int) -> None:
    deadline = time.monotonic() + _PATIENCE
    while os.waitpid(thread, _WALL | os.WNOHANG)[0] != thread:
        if time.monotonic() > deadline:
            raise TimeoutError(0, "the thread does not stop")
        time.sleep(_POLL)


def _filters(thread: int) -> Iterator[Program]:
    """In reverse order of their installation."""

    for number in range(1 << 15):
        try:
            count = _ptrace(_PTRACE_SECCOMP_GET_FILTER, thread, number)
        except FileNotFoundError:
            return
        buffer = ctypes.create_string_buffer(8 * count)
        _ptrace(_PTRACE_SECCOMP_GET_FILTER, thread, number, buffer)
        yield tuple(struct.iter_unpack("=HBBI", buffer.raw))

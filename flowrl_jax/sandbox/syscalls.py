"""The system calls that programs may not make: a seccomp filter (Linux, x86-64 and aarch64).

Forbidden are those that take memory which no limit counts (of memfds, of System V shared memory and
messages), that make new namespaces, in which a program would have privileges again, that reach
into other processes, and those of the kernel's more intricate parts that no program here needs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from flowrl_jax.sandbox import kernel

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_X32 = 0x40000000  # x86-64: the bit of calls of another interface
_NEW = kernel.NAMESPACES | kernel.CLONE_NEWUSER | 0x02000000  # the last of control groups

_FORBIDDEN = {  # by name: number on x86-64, on aarch64
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "unshare": (272, 97),
    "setns": (308, 268),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_*


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def forbid() -> bool:
    """Has the kernel refuse these calls to this process and its children for good.

    Returns:
        Whether it does: not on other machines, or if it was built without filters.
    """
    machine = os.uname().machine
    if machine not in _MACHINES:
        return False
    code = _filter(*_MACHINES[machine])
    program = _Program(len(code) // 8, code)
    return kernel.filter_calls(ctypes.byref(program))


def _filter(column: int, architecture: int) -> bytes:
    """The program in classic BPF: code, jump if so, jump if not, operand."""
    refused = _ERRNO | errno.EPERM
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, refused),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, refused),
    ]
    for numbers in _FORBIDDEN.values():
        steps += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, refused)]
    steps += [  # Its flags lie in memory, where a filter cannot look; libc then takes clone.
        (_EQUAL, 0, 1, _CLONE3[column]),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        (_EQUAL, 0, 3, _CLONE[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 0, 1, _NEW),
        (_RETURN, 0, 0, refused),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)

"""What Python has no function for: namespaces, mounts, privileges (Linux, by way of libc)."""

from __future__ import annotations

import ctypes
import os
import resource
import signal

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
_LOCKED = MS_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME  # a remount must repeat these
_MNT_DETACH = 2

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_SECCOMP_FILTER = 2
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, doing: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{doing}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Moves this process (its children, for process ids) into new namespaces.

    Raises:
        OSError: the kernel does not allow it.
    """
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Mounts a file system, as mount(2).

    Raises:
        OSError: the kernel does not allow it.
    """
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()
    )
    _check(result, f"mount {target}")


def bind_read_only(source: str, target: str) -> None:
    """Shows a folder or file at another place, where it cannot be written.

    Raises:
        OSError: the kernel does not allow it.
    """
    try:
        mount(source, target, flags=MS_BIND)
    except OSError:  # What is mounted below must come along where this user did not mount it.
        mount(source, target, flags=MS_BIND | MS_REC)
    kept = os.statvfs(target).f_flag & _LOCKED
    mount("", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | kept)


def change_root(folder: str) -> None:
    """Makes a mounted folder the root, and everything outside it unreachable.

    Raises:
        OSError: the kernel does not allow it.
    """
    os.chdir(folder)
    _check(_libc.pivot_root(b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount the old root")
    os.chdir("/")


def die_with_parent() -> None:
    """Has the kernel kill this process when the thread that started it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)


def hide_memory() -> None:
    """Keeps this process and those it forks from being traced or read by others of their user."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(0), 0, 0, 0), "PR_SET_DUMPABLE")


def adopt_orphans() -> None:
    """Has orphaned grandchildren become children of this process."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0), "subreaper")


def become(user: int) -> None:
    """Gives up every privilege for good.

    Args:
        user: id of the user (and group) to become; the present one keeps its id and loses its
            capabilities.

    Raises:
        OSError: the kernel does not allow it.
    """
    if user != os.geteuid():
        os.setgroups([])
        os.setresgid(user, user, user)
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    for capability in range(64):  # Those that do not exist, or are not ours to drop, say EINVAL.
        _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)
    if user != os.geteuid():
        os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def filter_calls(program: object) -> bool:
    """Has a filter judge every system call of this process and its children from now on.

    Args:
        program: pointer to a struct sock_fprog.

    Returns:
        Whether it does; a kernel built without filters refuses.
    """
    return _libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_FILTER), program, 0, 0) == 0


def limit(kind: int, value: int) -> None:
    """Lowers a resource limit of this process and its children; a lower one stays as it is."""
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))

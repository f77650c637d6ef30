"""The file system that a program sees: Python and the system's libraries, and a /tmp of its own."""

from __future__ import annotations

import os

from flowrl_jax.sandbox import kernel

TYPE_CHECKING = False  # typing's own would be an import that costs milliseconds of every start
if TYPE_CHECKING:
    from typing import Any

_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("null", "zero", "full", "random", "urandom")


def enter_root(settings: dict[str, Any]) -> None:
    """Makes a root from nothing and enters it; the old one cannot be reached any more.

    Args:
        settings: of the launcher.

    Raises:
        OSError: the kernel does not allow it.
    """
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    base = settings["folder"]
    kernel.mount("tmpfs", base, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=0755")
    # First: a virtual environment may lie below /tmp.
    os.mkdir(f"{base}/tmp")
    kernel.mount(
        "tmpfs",
        f"{base}/tmp",
        "tmpfs",
        kernel.MS_NOSUID | kernel.MS_NODEV,
        f"size={settings['disk_mb']}m,nr_inodes=4096,mode=1777",
    )
    shown: list[str] = []
    for path in (*_SYSTEM, *settings["shown"]):
        inside = any(os.path.commonpath([path, other]) == other for other in shown)
        if os.path.lexists(path) and not inside:
            shown.append(path)
            _show(path, base + path)
    os.mkdir(f"{base}/dev")
    for name in _DEVICES:
        open(f"{base}/dev/{name}", "w").close()
        kernel.mount(f"/dev/{name}", f"{base}/dev/{name}", flags=kernel.MS_BIND)
    _proc(base)
    flags = kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("tmpfs", base, "tmpfs", flags, "size=1m,mode=0755")
    kernel.change_root(base)
    os.chdir("/tmp")


def _show(path: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        open(target, "w").close()
    kernel.bind_read_only(path, target)


def _proc(base: str) -> None:
    """Shows the processes inside, and nothing else of the kernel, where that is allowed at all."""
    os.mkdir(f"{base}/proc")
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    for data in ("subset=pid", ""):
        try:
            kernel.mount("proc", f"{base}/proc", "proc", flags, data)
            return
        except OSError:
            continue  # A container that hides parts of /proc allows no new one.

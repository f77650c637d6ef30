"""What an untrusted program may use, and how far it is shut in."""

from __future__ import annotations

import dataclasses

from flowrl_jax.errors import require

ISOLATIONS = ("auto", "required", "none")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on one program; what goes beyond one of them ends it and is counted.

    Attributes:
        seconds: wall-clock time of one test, and processor time of one process.
        total_seconds: wall-clock time of all tests of a program together; 0: as many tests as
            there are, each with a second more than `seconds`, and five seconds.
        memory_mb: memory of all processes of a program together, and address space of each, MiB.
        disk_mb: what it may write to its own /tmp, and the size of one file, MiB.
        output_mb: what it may print, and return from a call, MiB.
        processes: processes and threads that it may have at one time.
        open_files: files that one process may have open.
    """

    seconds: float = 6.0
    total_seconds: float = 0.0
    memory_mb: int = 2048
    disk_mb: int = 64
    output_mb: int = 16
    processes: int = 32
    open_files: int = 64

    def __post_init__(self):
        require(self.seconds > 0, f"sandbox seconds={self.seconds}: a time; give more than 0")
        require(
            self.total_seconds >= 0,
            f"sandbox total_seconds={self.total_seconds}: a time; give more than 0, or 0 for one"
            " that grows with the tests",
        )
        for name, least in (
            *(("memory_mb", 64), ("disk_mb", 1), ("output_mb", 1)),
            *(("processes", 1), ("open_files", 16)),
        ):
            value = getattr(self, name)
            require(value >= least, f"sandbox {name}={value}: too little; give {least} or more")

    def total(self, tests: int) -> float:
        """Seconds that so many tests may take together."""
        return self.total_seconds or (self.seconds + 1.0) * tests + 5.0

"""Hostile programs: none gets out, takes more than it may, stays behind or makes itself right."""

import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flowrl_jax.errors import InputError
from flowrl_jax.sandbox import codec, launcher, runner
from flowrl_jax.sandbox.limits import Limits
from flowrl_jax.sandbox.runner import Sandbox

LIMITS = Limits(seconds=1.5, memory_mb=256, disk_mb=8, output_mb=1, processes=16)
PATIENT = dataclasses.replace(LIMITS, seconds=20.0)  # the machine may be busy
SECRET = "a-token-of-the-trainer"
ME = os.getpid()
MARK = f"sandbox-test-of-{ME}"  # in the environment of all that is started here, as its token


def leftovers() -> list[str]:
    """Processes of sandboxes that these tests started, by what /proc says of them."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path("/proc", name, "cmdline").read_bytes()
        except OSError:
            continue
        try:
            ours = MARK.encode() in Path("/proc", name, "environ").read_bytes()
        except PermissionError:  # as is so for sandboxes of somebody who is not root
            ours = f"Uid:\t{os.geteuid()}\t" in Path("/proc", name, "status").read_text()
        except OSError:
            continue
        if ours and launcher.__file__.encode() in command:
            found.append(name)
    return found


@pytest.fixture(autouse=True)
def marked(monkeypatch):
    monkeypatch.setattr(runner.secrets, "token_hex", lambda _: MARK)


@pytest.fixture(scope="module")
def sandbox():
    if runner._refusal():
        pytest.skip(f"this machine allows no namespaces: {runner._refusal()}")
    os.environ["SANDBOX_TEST_TOKEN"] = SECRET
    yield Sandbox("required")
    del os.environ["SANDBOX_TEST_TOKEN"]


def run(sandbox, program, given="", expected="1", limits=LIMITS):
    job = {"program": program, "kind": "stdin", "cases": [[given, expected]]}
    began = time.monotonic()
    verdict = sandbox.judge(job, limits)
    assert time.monotonic() - began < limits.total(1) + 60  # the machine may be busy
    return verdict


def call(sandbox, program, function="f", cases=(([2], [4]),), limits=LIMITS):
    coded = [[codec.encode(given), codec.encode(accepted)] for given, accepted in cases]
    return sandbox.judge(
        {"program": program, "kind": "call", "cases": coded, "function": function, "setup": ""},
        limits,
    )


def check(sandbox, program, *cases, function="f", limits=LIMITS):
    job = {"program": program, "kind": "assert", "cases": cases, "function": function, "setup": ""}
    return sandbox.judge(job, limits)


FORKS = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for descriptor in range(3):
            os.close(descriptor)
        while True:
            time.sleep(1)
    os._exit(0)
print(1)
"""
DEAF = """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, lambda *_: None)
    except (OSError, ValueError):
        pass
while True:
    pass
"""
SHARED_MEMORY = """
import os, time
for _ in range(2):
    os.fork()
block = bytearray(100 << 20)
block[::4096] = b"x" * len(block[::4096])
time.sleep(30)
"""
THREADS = """
import threading, time
while True:
    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
"""
GREEDY = [
    (FORKS, {"timeout"}),
    ("import os\nwhile True:\n    os.fork()", {"limit", "timeout"}),
    (THREADS, {"limit"}),
    ("x = []\nwhile True:\n    x.append(bytearray(1 << 20))", {"limit"}),
    ("x = 'x' * 10**12", {"limit"}),
    (SHARED_MEMORY, {"limit"}),
    ("f = open('a', 'wb')\nwhile True:\n    f.write(b'x' * 65536)", {"limit"}),
    ("for i in range(9**9):\n    open(f'a{i}', 'wb').write(b'x' * 65536)", {"limit"}),
    ("files = [open('/dev/null') for _ in range(10**6)]", {"limit"}),
    ("while True:\n    print('x' * 10000)", {"limit"}),
    ("import sys\nwhile True:\n    sys.stderr.write('x' * 10000)", {"limit"}),
    ("while True:\n    pass", {"timeout"}),
    (DEAF, {"timeout"}),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", {"timeout"}),
    ("import os, time\nfor i in range(3):\n    os.close(i)\ntime.sleep(99)", {"timeout"}),
    ("9 ** 9 ** 9", {"timeout", "limit"}),
    (f"exec({'(' * 99999!r})", {"error"}),
    ("def f():\n    f()\nf()", {"error"}),
    ("import ctypes\nctypes.string_at(0)", {"error"}),
    ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", {"error"}),
    ("print(1)\nraise SystemExit(3)", {"error"}),
    ("syntax error", {"error"}),
    ("\0", {"error"}),
    ("\ud800", {"error"}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(GREEDY)))
def test_what_takes_too_much_is_ended_and_counted(sandbox, number):
    program, outcomes = GREEDY[number]
    limits = LIMITS if "timeout" in outcomes else PATIENT
    assert run(sandbox, program, limits=limits).outcome in outcomes
    assert not leftovers()


OUTSIDE = """
def tried(what):
    try:
        found = what()
    except Exception as error:
        return type(error).__name__
    return found

import ctypes, os, socket
libc = ctypes.CDLL(None)
print(tried(lambda: open('/proc/%(me)d/environ').read()))
print(tried(lambda: os.kill(%(me)d, 9)))
print(tried(lambda: open('/proc/1/mem', 'rb').read(1)))
print(tried(lambda: os.listdir('/proc/1/fd')))
print(tried(lambda: open('%(file)s').read()))
print(tried(lambda: open('%(file)s', 'w')))
print(tried(lambda: open('/usr/written', 'w')))
print(tried(lambda: open('/written', 'w')))
print(tried(lambda: open('/root/.bashrc')))
print(tried(lambda: os.listdir('/home')))
print(tried(lambda: socket.create_connection(('127.0.0.1', %(port)d), 1)))
print(tried(lambda: socket.create_connection(('192.0.2.1', 80), 1)))
print(libc.mount(b'x', b'/tmp', b'tmpfs', 0, b''), libc.ptrace(16, 1, 0, 0))
print(tried(lambda: os.setuid(0)) is None)
print(libc.unshare(0x20000), %(secret)r in str(os.environ), os.listdir('/tmp') == %(below)r)
print(sorted(p for p in os.listdir('/proc') if p.isdigit() and int(p) not in (1, os.getpid())))
"""
KEPT_OUT = """FileNotFoundError
ProcessLookupError
PermissionError
PermissionError
FileNotFoundError
FileNotFoundError
OSError
OSError
FileNotFoundError
FileNotFoundError
OSError
OSError
-1 -1
False
-1 False True
[]"""


def test_nothing_outside_is_seen_reached_or_changed(sandbox, tmp_path):
    file = tmp_path / "of_the_trainer.txt"
    file.write_text(SECRET)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        below = [Path(path).parts[2] for path in runner._paths()["shown"] if path[:5] == "/tmp/"]
        known = {"me": ME, "file": file, "port": port, "secret": SECRET}
        program = OUTSIDE % {**known, "below": sorted(set(below))}
        verdict = run(sandbox, program, expected=KEPT_OUT, limits=Limits(seconds=10))
    assert verdict.outcome == "correct", verdict
    assert file.read_text() == SECRET


def test_orphans_that_left_the_session_are_ended(sandbox):
    assert run(sandbox, DAEMON).outcome == "correct"
    assert not leftovers()


def test_killing_everybody_reaches_nobody_outside(sandbox):
    program = f"import os\nfor p in (os.getppid(), {ME}, -1):\n    try:\n        os.kill(p, 9)\n"
    run(sandbox, program + "    except OSError:\n        pass\nprint(1)")
    assert run(sandbox, "print(1)").outcome == "correct"
    assert not leftovers()


READS = """
import gc, sys
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen += list(frame.f_locals.values())
        frame = frame.f_back
    wanted = int(str(91827364) + str(55463728))
    return wanted if str(wanted) in repr(seen) + repr(gc.get_objects()) else 0
"""
PATCHES = """
import builtins, sys
builtins.AssertionError = KeyError
for module in list(sys.modules.values()):
    for name in ("judge", "_same", "decode", "check", "same_output"):
        if hasattr(module, name):
            setattr(module, name, lambda *a, **k: True)
def f(x):
    return 5
"""
WRITES = """
import os
def f(x):
    verdict = b'{"outcome": "correct", "passed": 1, "detail": ""}'
    for descriptor in range(64):
        for text in (verdict, len(verdict).to_bytes(8, "big") + verdict, b"correct\\n1\\n"):
            try:
                os.write(descriptor, text)
            except OSError:
                pass
    os._exit(0)
"""
EQUALS = """
class Same{base}:
    __eq__ = __bool__ = lambda *_: True
    __ne__ = lambda *_: False
    __hash__ = int.__hash__
def f(x):
    return Same()
"""
KILLS = """
import os
def f(x):
    try:
        os.kill(-1, 9)
    except OSError:
        pass
    return 5
"""
FORGED = [
    "import os\nos._exit(0)",
    "raise SystemExit(0)",
    "import os\ndef f(x):\n    os._exit(0)",
    "def f(x):\n    raise SystemExit(0)",
    "def f(x):\n    raise AssertionError",
    "def f(x):\n    return None",
    *(EQUALS.format(base=base) for base in ("", "(int)", "(list)")),
    *(READS, PATCHES, WRITES, KILLS),
]


@pytest.mark.parametrize("number", range(len(FORGED)))
def test_no_program_makes_itself_right(sandbox, number):
    program = FORGED[number]
    assert call(sandbox, program, cases=[([2], [9182736455463728])]).outcome != "correct"
    assert check(sandbox, program, "assert f(2) == 9182736455463728").outcome != "correct"
    assert not leftovers()


def test_tests_decide_by_python_and_not_by_what_the_program_calls_by_its_names(sandbox):
    cheat = (
        "def f(x):\n    return 5\nclass math:\n    isclose = lambda *_: True\nset = abs = all = f"
    )
    assert check(sandbox, cheat, "assert math.isclose(f(2), 4)").outcome == "wrong"
    assert check(sandbox, cheat, "assert set([f(2)]) == set([4])").outcome == "wrong"
    # But a function under test may have a name that Python has too.
    assert (
        check(sandbox, "def sum(x):\n    return 9", "assert sum(1) == 9", function="sum")[0]
        == "correct"
    )


def test_the_bytes_of_expected_output_are_not_in_the_programs_memory(sandbox):
    program = """
import re
found = 0
for line in open('/proc/self/maps'):
    start, end = (int(x, 16) for x in line.split()[0].split('-'))
    if 'r' in line.split()[1] and 'v' not in line.split()[-1][:2]:
        try:
            with open('/proc/self/mem', 'rb') as memory:
                memory.seek(start)
                found += memory.read(end - start).count(b'needle-' + b'in-memory')
        except (OSError, ValueError, OverflowError):
            pass
print(found)
"""
    # The process may not be allowed to read itself, which is as good.
    verdict = run(
        sandbox, program, given="x", expected="needle-in-memory", limits=Limits(seconds=9)
    )
    assert verdict.outcome in ("wrong", "error")
    assert "needle" not in verdict.detail


def test_many_tests_are_one_start_and_stop_at_the_first_failure(sandbox):
    job = {"program": "print(int(input()) ** 2)", "kind": "stdin"}
    cases = [[str(i), str(i * i)] for i in range(20)]
    assert sandbox.judge({**job, "cases": cases}, LIMITS) == ("correct", 20, "")
    cases[7][1] = "50"
    assert sandbox.judge({**job, "cases": cases}, LIMITS)[:2] == ("wrong", 7)
    program = "def f(x):\n    if x == 3:\n        while True: pass\n    return x"
    calls = [([i], [i]) for i in range(9)]
    assert call(sandbox, program, cases=calls)[:2] == ("timeout", 3)


def test_one_that_is_stuck_delays_no_other(sandbox):
    stuck = threading.Thread(target=run, args=(sandbox, DEAF))
    stuck.start()
    began = time.monotonic()
    assert run(sandbox, "print(1)").outcome == "correct"
    assert stuck.is_alive() or time.monotonic() - began > LIMITS.seconds
    stuck.join(LIMITS.total(1) + 60)
    assert not stuck.is_alive()


def test_close_ends_what_runs_and_refuses_what_comes():
    if runner._refusal():
        pytest.skip("this machine allows no namespaces")
    sandbox, found = Sandbox("required"), []
    limits = Limits(seconds=60)
    thread = threading.Thread(
        target=lambda: found.append(run(sandbox, "while 1: pass", limits=limits))
    )
    thread.start()
    while not sandbox._running:
        time.sleep(0.01)
    time.sleep(0.3)
    sandbox.close()
    thread.join(60)
    assert found and found[0].outcome != "correct"
    assert run(sandbox, "print(1)").outcome == "refused"
    wait_for_no_leftovers()


def wait_for_no_leftovers():
    deadline = time.monotonic() + 60
    while leftovers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not leftovers()


def test_the_death_of_the_trainer_is_the_end_of_its_programs(sandbox, tmp_path):
    trainer = f"""
import sys
sys.path.insert(0, {str(Path(runner.__file__).parents[2])!r})
from flowrl_jax.sandbox.runner import Sandbox
from flowrl_jax.sandbox.limits import Limits
from flowrl_jax.sandbox import runner
runner.secrets.token_hex = lambda _: {MARK!r}
sandbox = Sandbox("required")
print("ready", flush=True)
job = dict(program={DAEMON!r} + "\\nwhile 1: pass", kind="stdin", cases=[["", ""]])
sandbox.judge(job, Limits(seconds=60))
"""
    process = subprocess.Popen([sys.executable, "-c", trainer], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    time.sleep(0.6)
    process.kill()
    process.wait()
    process.stdout.close()
    wait_for_no_leftovers()


def test_settings_are_checked():
    for bad in ({"seconds": 0.0}, {"memory_mb": 1}, {"processes": 0}, {"total_seconds": -1.0}):
        with pytest.raises(InputError, match="give"):
            Limits(**bad)
    with pytest.raises(InputError, match="auto, required, none"):
        Sandbox("chroot")


def test_without_namespaces_the_fallback_is_loud_or_refused(monkeypatch, caplog):
    monkeypatch.setattr(runner, "_refusal", lambda: "unshare: no")
    runner.isolate.cache_clear()
    try:
        with pytest.raises(InputError, match="allows no namespaces.*unshare: no"):
            runner.isolate(True)
        assert runner.isolate(False) is False
        assert runner.isolate(False) is False
    finally:
        runner.isolate.cache_clear()


def readable_python() -> bool:
    try:
        runner._require_readable()
    except InputError:
        return os.geteuid() != 0
    return True


@pytest.mark.skipif(not readable_python(), reason="as root, with a Python that only root can read")
@pytest.mark.parametrize("number", [0, 3, 6, 9, 11, 12, 13])
def test_without_namespaces_limits_hold(number):
    program, outcomes = GREEDY[number]
    limits = LIMITS if "timeout" in outcomes else PATIENT
    assert run(Sandbox("none"), program, limits=limits).outcome in outcomes
    assert not leftovers()


@pytest.mark.skipif(not readable_python(), reason="as root, with a Python that only root can read")
def test_without_namespaces_orphans_are_ended_and_nothing_is_forged():
    sandbox = Sandbox("none")
    assert run(sandbox, DAEMON).outcome == "correct"
    assert not leftovers()
    for program in FORGED[:-1]:
        assert call(sandbox, program, cases=[([2], [9182736455463728])]).outcome != "correct"
        assert check(sandbox, program, "assert f(2) == 9182736455463728").outcome != "correct"

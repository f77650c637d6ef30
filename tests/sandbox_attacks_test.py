"""Ways out, and ways to be right, that a program finds by knowing how a sandbox is made."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from flowrl_jax.sandbox import codec, executor, runner, syscalls
from flowrl_jax.sandbox.limits import Limits
from flowrl_jax.sandbox.runner import Sandbox

# Nothing here is judged by the clock but what says so: a program that hangs costs all its time.
LIMITS = Limits(seconds=30.0, memory_mb=256, disk_mb=8, output_mb=1, processes=16)
HASTY = Limits(seconds=2.0, total_seconds=4.0, memory_mb=256, disk_mb=8, output_mb=1)
FILTERED = os.uname().machine in syscalls._MACHINES


@pytest.fixture(scope="module", params=["required", "none"])
def sandbox(request):
    if request.param == "required" and runner._refusal():
        pytest.skip(f"this machine allows no namespaces: {runner._refusal()}")
    try:
        return Sandbox(request.param)
    except runner.InputError as error:
        pytest.skip(str(error))


def run(sandbox, program, expected="1", limits=LIMITS):
    return sandbox.judge({"program": program, "kind": "stdin", "cases": [["", expected]]}, limits)


def both(sandbox, program, limits=LIMITS):
    """Outcomes of a program that should return what it cannot know, as a call and as a test."""
    job = {"program": program, "function": "f", "setup": ""}
    case = [codec.encode([2]), codec.encode([918273])]
    return {
        sandbox.judge({**job, "kind": "call", "cases": [case]}, limits).outcome,
        sandbox.judge(
            {**job, "kind": "assert", "cases": ["assert f(2) == 918273"]}, limits
        ).outcome,
    }


CALLS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
column = ("x86_64", "aarch64").index(os.uname().machine)
def refused(number, *arguments):
    ctypes.set_errno(0)
    return libc.syscall(number[column], *arguments) == -1 and ctypes.get_errno() == 1
new_user = 0x10000000
print(
    refused((319, 279), b"x", 0),  # memfd_create
    refused((29, 194), 0, 4096, 0o1600),  # shmget
    refused((68, 186), 0, 0o1600),  # msgget
    refused((272, 97), new_user),  # unshare
    refused((56, 220), new_user | 17, 0, 0, 0, 0),  # clone
    refused((101, 117), 0, 0, 0, 0),  # ptrace
    refused((310, 270), os.getppid(), 0, 0, 0, 0, 0),  # process_vm_readv
    refused((425, 425), 4, 0),  # io_uring_setup
    refused((272 | 0x40000000, 97), new_user),  # by the interface for 32-bit pointers
    libc.syscall(435, 0, 0) == -1 and ctypes.get_errno(),  # clone3
)
"""


@pytest.mark.skipif(not FILTERED, reason="no filter of system calls for this machine")
def test_memory_that_no_limit_counts_and_new_privileges_are_refused(sandbox):
    verdict = run(sandbox, CALLS, expected="True " * 9 + "38")
    assert verdict.outcome == "correct", verdict


ORDINARY = """
import os, subprocess, threading
from concurrent.futures import ThreadPoolExecutor
def f(x):
    done = []
    thread = threading.Thread(target=done.append, args=(x,))
    thread.start()
    thread.join()
    child = os.fork()
    if child == 0:
        os._exit(3)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    echoed = subprocess.run(["/bin/echo", "4"], capture_output=True, check=True).stdout
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(int, (done[0], status, echoed)))
print(f(2))
"""


def test_threads_forks_and_commands_work(sandbox):
    verdict = run(sandbox, ORDINARY, expected="9")
    assert verdict.outcome == "correct", verdict


OUTPUT = [
    ("import sys\nsys.stdout.write('x' * 900_000)", "x" * 900_000, "correct"),
    ("import sys\nsys.stdout.write('x' * 1_200_000)", "x" * 1_200_000, "limit"),
    ("import os\nprint(1, flush=True)\nos.close(1)\nos.close(2)", "1", "correct"),
    ("import os\nos.close(1)\nos.write(1, b'1')", "1", "error"),
    ("print(1, flush=True)\nimport os\nos._exit(1)", "1", "error"),
    ("print(1, flush=True)\nimport os\nos.abort()", "1", "error"),
    ("print(1)\nimport atexit\natexit.register(lambda: 1 / 0)", "1", "correct"),
    ("import os\nprint(sorted(os.environ.items()))\nprint(1)", "1", "wrong"),
]


@pytest.mark.parametrize("number", range(len(OUTPUT)))
def test_output_is_judged_as_of_a_command(sandbox, number):
    program, expected, outcome = OUTPUT[number]
    assert run(sandbox, program, expected).outcome == outcome


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "print(1, flush=True)\nimport atexit, time\natexit.register(time.sleep, 600)",
        "import time, threading as t\nt.Thread(target=time.sleep, args=(600,)).start()\nprint(1)",
    ],
)
def test_what_lives_on_is_no_end(sandbox, program):
    assert run(sandbox, program, limits=HASTY).outcome == "timeout"


INODES = "for i in range(10**6):\n    open(f'/tmp/{i}', 'w').close()"
NESTED = "import os\nos.chdir('/tmp')\nwhile True:\n    os.mkdir('d')\n    os.chdir('d')"


@pytest.mark.parametrize("program", [INODES, NESTED])
def test_files_without_content_have_a_limit_too(program):
    if runner._refusal():
        pytest.skip("needs a file system of its own")
    assert run(Sandbox("required"), program).outcome == "limit"


ALL_BUT_ME = """
import os
def to_all(number):
    for process in range(1, 400):
        if process != os.getpid():
            try:
                os.kill(process, number)
            except OSError:
                pass
"""
PIPES = """
import json, os
def f(x):
    body = json.dumps({"value": True}).encode()
    verdict = b'{"outcome": "correct", "passed": 1, "detail": ""}'
    for descriptor in range(64):
        for message in (verdict, len(body).to_bytes(8, "big") + body):
            try:
                os.write(descriptor, message)
            except OSError:
                pass
    return 5
"""
CODEC = "import flowrl_jax.sandbox.codec as codec\ncodec.encode = lambda *_: {reply}\n"
REPLIES = (
    *('{"ref": 10**9}', '{"ref": "918273"}', '{"type": "object"}', '{"type": "int", "x": 1}'),
    *('{"dict": [[[], 1]]}', '{"Fraction": "1/0"}', '{"range": [0, 10**18, 1]}', '{"nothing": 1}'),
    *('float("nan")', '{"complex": [1]}', '{"int": "0x" + "f" * 900_000}'),
)
FORGERIES = [
    PIPES,
    *(CODEC.format(reply=reply) + "def f(x):\n    return 5" for reply in REPLIES),
    "def f(x):\n    while True:\n        yield 918273",
    "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "def f(x):\n    a = []\n    for _ in range(10**5):\n        a = [a]\n    return a",
    "def f(x):\n    return 1 << (8 << 20)",
    "class f:\n    def __new__(cls, x):\n        return object.__new__(cls)\n"
    "    def __getattribute__(self, name):\n        raise SystemExit(0)",
    "import unittest.mock\nf = unittest.mock.MagicMock()",
    "import sys\nsys.settrace(lambda *_: 1 / 0)\ndef f(x):\n    return 5",
    "import os\nos.register_at_fork(before=lambda: os._exit(0))\ndef f(x):\n    return os.fork()",
    "import os\nos.closerange(0, 64)\ndef f(x):\n    pass",
    "f = 918272 .__add__",  # what is no function of Python's own still is called, not compared
]


@pytest.mark.parametrize("number", range(len(FORGERIES)))
def test_no_message_is_taken_for_a_result(sandbox, number):
    assert "correct" not in both(sandbox, FORGERIES[number])


@pytest.mark.slow
def test_a_judge_that_is_killed_or_stopped_accepts_nothing():
    if runner._refusal():
        pytest.skip("without namespaces a program reaches whatever its user may reach")
    sandbox = Sandbox("required")
    for number, limits in ((9, LIMITS), (19, HASTY)):
        program = f"{ALL_BUT_ME}\ndef f(x):\n    to_all({number})\n    return 5"
        assert not both(sandbox, program, limits) & {"correct", "refused"}
    assert (
        run(sandbox, f"{ALL_BUT_ME}\nfor n in range(1, 65):\n    to_all(n)\nprint(1)").passed == 1
    )


OTHERS = """
import os
found = []
for process in filter(str.isdigit, os.listdir('/proc')):
    for name in ('environ', 'mem', 'maps', 'fd', 'cwd', 'root'):
        path = f'/proc/{process}/{name}'
        try:
            if int(process) != os.getpid():
                open(path, 'rb').read(1) if name in ('environ', 'mem', 'maps') else os.listdir(path)
                found.append(path)
        except OSError:
            pass
print(found, sorted(map(int, os.listdir('/proc/self/fd')))[:-1])
print([os.readlink(f'/proc/self/fd/{i}').split(':')[0] for i in (1, 2)])
for path in ('/proc/1/root/etc/passwd', '/tmp/link'):
    try:
        os.path.exists(path) or os.symlink('/proc/1/root', path)
        print(os.listdir(path))
    except OSError:
        print('no')
print(sorted(os.environ), os.path.exists('/dev/shm'), os.path.exists('/etc/passwd'))
"""
NOTHING = """[] [0, 1, 2]
['pipe', 'pipe']
no
no
%s False False"""


def test_no_descriptor_process_or_link_leads_outside():
    if runner._refusal():
        pytest.skip("needs namespaces")
    known = sorted(runner._environment("", ""))
    shown = [name for name in ("LC_CTYPE",) if name in known]
    verdict = run(Sandbox("required"), OTHERS, NOTHING % sorted({*known, *shown}))
    assert verdict.outcome == "correct", verdict


def test_without_a_namespace_of_process_ids_only_descendants_are_killed(monkeypatch):
    killed, said = [], []
    monkeypatch.setattr(executor.os, "kill", lambda process, _: killed.append(process))
    monkeypatch.setattr(executor.wire, "send", lambda _, message: said.append(message))
    monkeypatch.setattr(executor.kernel, "die_with_parent", lambda: pytest.fail("it went on"))
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as child:
        executor.kill_all({"namespaces": True})
        assert child.pid in killed
    assert not {-1, 1, os.getpid(), os.getppid()} & set(killed)
    executor.execute({"namespaces": True}, 0, 1)
    assert said == [{"refused": "no namespace of process ids"}]


def test_namespaces_are_not_refused_by_a_fault_of_ours():
    """Where they are refused all other tests are skipped, which must be the machine's doing."""
    unshare = shutil.which("unshare")
    flags = ["--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--mount-proc"]
    if os.geteuid() != 0:
        flags += ["--user", "--map-root-user"]
    if unshare is None or subprocess.run([unshare, *flags, "/bin/true"], check=False).returncode:
        pytest.skip("unshare(1) gets no namespaces either")
    assert not runner._refusal()


BOUNDS = """
import os, resource
kinds = ("CPU", "AS", "FSIZE", "NOFILE", "NPROC", "CORE")
print(*(resource.getrlimit(getattr(resource, f"RLIMIT_{kind}")) for kind in kinds))
own = os.statvfs("/tmp")
print(own.f_blocks * own.f_frsize, own.f_files)
"""


def test_every_limit_is_one_of_the_kernel_and_cannot_be_raised():
    if runner._refusal():
        pytest.skip("limits on processes count others of this user where it has no namespace")
    limits = Limits(seconds=50, memory_mb=300, disk_mb=7, processes=17, open_files=40)
    wanted = (52, 300 << 20, 7 << 20, 40, 17, 0)
    expected = " ".join(str((bound, bound)) for bound in wanted) + f"\n{7 << 20} 4096"
    verdict = run(Sandbox("required"), BOUNDS, expected, limits)
    assert verdict.outcome == "correct", verdict


def test_packages_below_tmp_are_shown_and_cannot_be_written(monkeypatch):
    if runner._refusal():
        pytest.skip("needs a root of its own")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        Path(folder, "module.py").write_text("x = 5\n")
        os.chmod(Path(folder, "module.py"), 0o666)
        paths = runner._paths()
        more = {**paths, "shown": [*paths["shown"], folder], "packages": [folder]}
        monkeypatch.setattr(runner, "_paths", lambda: more)
        program = f"import module\nprint(module.x)\nopen('{folder}/module.py', 'a')"
        verdict = run(Sandbox("required"), program, "5")
    assert verdict.outcome == "error"
    assert "Read-only file system" in verdict.detail


SCANS = """
import ctypes, re
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable again: its own memory becomes a file it may read
def f(x):
    for line in open("/proc/self/maps"):
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if "r" not in line.split()[1] or "[v" in line:
            continue
        try:
            with open("/proc/self/mem", "rb", 0) as memory:
                memory.seek(start)
                found = re.search(rb"needle-[a-z]{8}!", memory.read(end - start))
        except OSError:
            continue
        if found:
            return found[0].decode()
    return "none"
%s
"""


def test_no_expected_result_is_in_the_memory_of_a_program():
    if runner._refusal():
        pytest.skip("needs namespaces")
    sandbox, needle = Sandbox("required"), "needle-" + "qwertyui" + "!"
    known = f"known = 'needle-' + '{needle[7:15]}' + chr(33)\nkept = known.encode()"
    assert run(sandbox, SCANS % "print(f(1))", "none").outcome == "correct"
    assert run(sandbox, SCANS % f"{known}\nprint(f(1))", needle).outcome == "correct"  # it can
    assert run(sandbox, SCANS % "print(f(1))", needle).outcome == "wrong"
    job = {"program": SCANS % "", "function": "f", "setup": ""}
    case = [codec.encode([2]), codec.encode([needle])]
    asserted = f"assert f(2) == {needle!r}"
    for kind, cases in (("call", [case]), ("assert", [asserted])):
        assert sandbox.judge({**job, "kind": kind, "cases": cases}, LIMITS).outcome == "wrong"

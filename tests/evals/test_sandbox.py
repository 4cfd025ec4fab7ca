# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Programs that try to leave the sandbox, or to use more than they may, do not."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from omniopd_trl.errors import ConfigError
from omniopd_trl.evals import sandbox as sandbox_module
from omniopd_trl.evals.inside_sandbox import _CLONE
from omniopd_trl.evals.sandbox import Limits, LocalSandbox, RemoteSandbox, SandboxError, make_sandbox
from tests.support.loopback import Fault, Loopback

LIMITS = Limits(cpu_seconds=1, wall_seconds=30, memory_mib=256, threads=6, folder_mib=4, output_mib=1)


@pytest.fixture(scope="module", params=["bwrap", "namespaces"])
def box(request):
    """A sandbox of each kind. `.ci/run` installs bubblewrap."""
    try:
        return make_sandbox(request.param, LIMITS)
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture
def hasty(box):
    """The same sandbox with a short limit of wall-clock time, for programs that wait."""
    return LocalSandbox(box.isolation, Limits(**{**vars(LIMITS), "wall_seconds": 2}))


def report_of(box, program, stdin=""):
    """What a program prints, which must end by itself."""
    outcome = box.run(program, stdin)
    assert (outcome.status, outcome.exit_code) == ("finished", 0), outcome
    return outcome.stdout


def processes_with(mark):
    """Processes of this machine with a text in their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if mark in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return found


def gone(mark, seconds=5.0):
    """Whether all processes with a text in their command line end within the time."""
    deadline = time.monotonic() + seconds
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left


def new_mark():
    """An argument of `sleep` that no other process has."""
    return f"{random.randrange(10**8, 10**9)}"


def leave_out_filter(monkeypatch):
    """Run programs without the filter of system calls, as on a machine that it is not written for."""
    inside = sandbox_module._INSIDE.replace("    refuse_system_calls()\n", "")
    assert inside != sandbox_module._INSIDE
    monkeypatch.setattr(sandbox_module, "_INSIDE", inside)


class TestPrograms:
    """Programs that do no harm run as anywhere else."""

    def test_input_and_output(self, box):
        """Standard input arrives as it is, whatever it holds, and text comes back."""
        text = "κ 1\r\n\x00\n" + "x" * 300_000
        assert report_of(box, "import sys; sys.stdout.write(sys.stdin.read()[::-1])", text[:200_000]).endswith(
            "\n\r1 κ"
        )
        assert report_of(box, "print(input() + input())", "a\nb") == "ab\n"
        assert report_of(box, "import sys; print(len(sys.stdin.buffer.read()))", text) == "300008\n"

    @pytest.mark.parametrize(
        ("program", "status", "code"),
        [
            ("exit()", "finished", 0),
            ("raise SystemExit(3)", "finished", 3),
            ("1 / 0", "finished", 1),
            ("def f(:", "finished", 1),
            ("import ctypes; ctypes.string_at(0)", "killed", None),
            ("import os, sys; sys.stdout.close(); os.close(1); os.close(2)", "finished", 0),
        ],
    )
    def test_how_it_ends(self, box, program, status, code):
        """The exit code is the program's, and a signal is not an exit code."""
        outcome = box.run(program)
        assert (outcome.status, outcome.exit_code) == (status, code)

    def test_main_module(self, box):
        """It is the main program: its guard is true, its classes pickle, nothing of the sandbox is in its names."""
        program = (
            "import pickle, sys\nclass A: pass\nprint(sys.argv, sorted(n for n in globals() if n[:2] != '__'))\n"
            "if __name__ == '__main__': print(type(pickle.loads(pickle.dumps(A()))) is A)"
        )
        assert report_of(box, program) == "['main.py'] ['A', 'pickle', 'sys']\nTrue\n"

    def test_same_result_each_time(self, box):
        """The order of a set of texts does not change from run to run."""
        program = "print({str(i) for i in range(50)})"
        assert report_of(box, program) == report_of(box, program)

    def test_threads(self, box):
        """Deep recursion in a thread with a large stack, which many solutions use, is within the limits."""
        program = (
            "import sys, threading\nsys.setrecursionlimit(10**6); threading.stack_size(64 << 20)\n"
            "def f(n): return n and 1 + f(n - 1)\n"
            "t = threading.Thread(target=lambda: print(f(20000))); t.start(); t.join()"
        )
        assert report_of(box, program) == "20000\n"

    def test_side_by_side(self, box):
        """Threads share a sandbox, and each program sees its own folder and input."""
        outputs = {}

        def run(i):
            program = "import os; open(input(), 'w'); print(*os.listdir('.'))"
            outputs[i] = report_of(box, program, f"file{i}")

        threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outputs == {i: f"file{i}\n" for i in range(6)}


class TestEscapes:
    """Each of these works outside, and fails inside."""

    @pytest.mark.parametrize("filtered", [True, False])
    def test_network(self, box, filtered, monkeypatch):
        """A server of this machine is not reached: by the filter of system calls, nor without it."""
        if not filtered:
            leave_out_filter(monkeypatch)
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0.1)
            port = server.getsockname()[1]
            program = (
                "import os, socket\n"
                f"try: socket.create_connection(('127.0.0.1', {port}), 2); print('connected')\n"
                "except OSError as error: print(type(error).__name__, flush=True)\n"
                f"os.execv('/bin/bash', ['bash', '-c', 'echo > /dev/tcp/127.0.0.1/{port} || echo failed'])"
            )
            error, other = report_of(box, program).splitlines()
            # Without the filter there is a network with this process alone, which may have no route.
            assert error in (["PermissionError"] if filtered else ["ConnectionRefusedError", "OSError"])
            assert other == "failed"
            with pytest.raises(TimeoutError):
                server.accept()

    def test_sockets(self, box):
        """Kinds of sockets that no network namespace separates are refused too."""
        program = (
            "import socket\nfor family in (2, 10, 16, 17, 40):\n"
            " try: socket.socket(family, socket.SOCK_STREAM); print(family)\n"
            " except OSError as error: print(error.errno)\n"
            "socket.socketpair(); print('local')"
        )
        assert report_of(box, program) == "1\n" * 5 + "local\n"

    def test_files(self, box, tmp_path):
        """No file of this machine is there but the system's programs: no home, no /etc, no temporary folder."""
        secret = tmp_path / "secret"
        secret.write_text("secret")
        home = os.path.expanduser("~")
        program = (
            f"import os\nfor path in ({str(secret)!r}, '/etc/passwd', {home + '/.ssh'!r}, {home + '/.cache'!r}, "
            f"'/tmp', '/var', '/sys/kernel', '/proc/self', '/old/etc', {str(Path.cwd() / 'pyproject.toml')!r}):\n"
            " print(os.path.exists(path))\n"
            "print(os.getcwd(), os.listdir('.'))"
        )
        assert report_of(box, program) == "False\n" * 10 + "/box []\n"

    def test_symlinks(self, box, tmp_path):
        """A link to a file outside leads nowhere, nor does a path above the root, nor a new root."""
        secret = tmp_path / "secret"
        secret.write_text("secret")
        program = (
            f"import os\nos.symlink({str(secret)!r}, 'a'); os.symlink('../' * 20 + {str(secret)[1:]!r}, 'b')\n"
            "for name in 'ab':\n"
            " try: print(open(name).read())\n"
            " except OSError as error: print(type(error).__name__)\n"
            "os.mkdir('c')\n"
            "try: os.chroot('c'); os.chdir('../' * 20); print(os.listdir('.'))\n"
            "except OSError as error: print(type(error).__name__)"
        )
        assert report_of(box, program) == "FileNotFoundError\nFileNotFoundError\nPermissionError\n"

    def test_writing_outside_its_folder(self, box):
        """Everything but its folder is read-only."""
        program = (
            "import os, sys\nfor path in ('/a', '/usr/a', '/dev/a', '/lib/a', os.path.dirname(os.__file__) + '/a'):\n"
            " try: open(path, 'w'); print(path)\n"
            " except OSError: print('refused')"
        )
        assert report_of(box, program) == "refused\n" * 5

    def test_read_only(self, box, tmp_path):
        """A folder of the Python installation cannot be written to, whatever its permissions."""
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib").chmod(0o777)
        other = LocalSandbox(box.isolation, LIMITS)
        other._folders = [*box._folders, str(tmp_path / "lib")]
        program = f"import os\nos.chdir({str(tmp_path / 'lib')!r})\nopen('a', 'w')"
        assert "Read-only file system" in other.run(program).stderr

    def test_environment(self, box, monkeypatch):
        """No variable of this process is there, nor the processes of this machine to read it from."""
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        program = (
            "import glob, os\nprint(*sorted({*os.environ} - {'PWD', 'OLDPWD'}))\n"
            "print(glob.glob('/proc/*'), os.getpid() < 100, os.getppid() < 100)"
        )
        assert report_of(box, program) == "HOME LANG PATH PYTHONHASHSEED\n[] True True\n"

    def test_handles(self, box, tmp_path):
        """No open file of this process is there, even one that is inheritable."""
        with open(tmp_path / "secret", "w") as file:
            os.set_inheritable(file.fileno(), True)
            program = "import os\nfor fd in range(64):\n try: os.fstat(fd); print(fd)\n except OSError: pass"
            assert report_of(box, program) == "0\n1\n2\n"

    def test_killing(self, box):
        """Signals reach no process outside, by number or to all."""
        sleeper = subprocess.Popen(["sleep", "60"])
        program = (
            f"import os\nfor pid in (os.getppid(), {os.getpid()}, {sleeper.pid}, -{os.getpgid(0)}, -1):\n"
            " try: os.kill(pid, 9) if pid else print('none')\n"
            " except OSError as error: print(type(error).__name__)"
        )
        box.run(program)
        assert sleeper.poll() is None
        sleeper.kill()
        sleeper.wait()

    def test_privileges(self, box):
        """It is no root, has no capability, and gets none in a namespace of its own."""
        program = (
            "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            "def tried(*call): print(call[0], libc[call[0]](*call[1:]) == -1)\n"
            "tried('unshare', 0x10000000); tried('mount', b'none', b'/box', b'tmpfs', 0, None); "
            "tried('umount2', b'/box', 2)\n"
            "tried('ptrace', 16, 1, 0, 0); tried('setuid', 1000); tried('shmget', 0, 1 << 20, 0o1777)\n"
            "try: os.setgroups([0]); print('setgroups')\nexcept OSError: print('refused')"
        )
        names = ("unshare", "mount", "umount2", "ptrace", "setuid", "shmget")
        assert report_of(box, program) == "".join(f"{name} True\n" for name in names) + "refused\n"


class TestLimits:
    """What a program may use."""

    def test_processes(self, box):
        """It starts no process, by any call: two would have twice the CPU time and twice the memory."""
        program = (
            "import ctypes, os, subprocess\nlibc = ctypes.CDLL(None)\n"
            "calls = {'fork': os.fork, 'spawn': lambda: os.posix_spawn('/usr/bin/true', ['true'], {}),\n"
            " 'run': lambda: subprocess.run(['true']), 'clone': lambda: libc.syscall({clone}, 17, 0, 0, 0, 0),\n"
            " 'vfork': libc.vfork}\n"
            "for name, call in calls.items():\n"
            " try: print(name, call() == -1)\n"
            " except OSError as error: print(name, type(error).__name__)"
        ).replace("{clone}", str(_CLONE[os.uname().machine]))
        errors = [f"{name} PermissionError" for name in ("fork", "spawn", "run")]
        assert report_of(box, program).splitlines() == [*errors, "clone True", "vfork True"]

    def test_many_threads(self, box):
        """Threads stop multiplying."""
        program = (
            "import threading, time\n"
            "try:\n for count in range(100): threading.Thread(target=time.sleep, args=(1,), daemon=True).start()\n"
            "except RuntimeError: print(count)"
        )
        assert int(report_of(box, program)) <= LIMITS.threads + 2

    @pytest.mark.parametrize("stream", ["stdout", "stderr"])
    def test_endless_output(self, box, stream):
        """Output ends at its limit, and the program with it."""
        outcome = box.run(f"import sys\nwhile True: sys.{stream}.write('x' * 65536)")
        assert outcome.status == "output"
        assert len(getattr(outcome, stream)) <= 1 << 20

    def test_memory(self, box):
        """Memory beyond the limit is an error in the program."""
        assert "MemoryError" in box.run("x = bytearray(400 << 20)").stderr
        assert report_of(box, "x = bytearray(100 << 20); print(len(x))") == f"{100 << 20}\n"

    def test_filling_the_disk(self, box):
        """Files hold no more than the folder's size together, and nothing of them remains."""
        program = (
            "import os\ntotal = 0\ntry:\n"
            " for i in range(1000):\n"
            "  with open(str(i), 'wb', 0) as file: total += file.write(b'x' * 65536)\n"
            "except OSError as error: print(error.errno, total)\n"
            "try: file = open('large', 'wb', 0); file.truncate(1 << 40); print('large')\n"
            "except OSError as error: print(error.errno)"
        )
        first, second = report_of(box, program).splitlines()
        errno, total = map(int, first.split())
        assert errno == 28  # no space left
        assert 3 << 20 < total <= 4 << 20
        assert second in ("27", "28")
        assert report_of(box, "import os; print(os.listdir('.'))") == "[]\n"

    def test_many_files(self, box):
        """Empty files have no size, and take memory of the kernel."""
        program = (
            "import os\nfor i in range(10000):\n"
            " try: os.close(os.open(str(i), os.O_CREAT))\n"
            " except OSError as error: print(error.errno, i); break"
        )
        errno, count = map(int, report_of(box, program).split())
        assert errno == 28
        assert 500 < count < 256 * LIMITS.folder_mib

    def test_computing(self, box):
        """CPU time ends a program that computes, whatever it does with signals, before the wall-clock limit."""
        program = "import signal\nfor s in (2, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
        outcome = box.run(program)
        assert outcome.status == "killed"
        assert outcome.seconds < 25

    def test_waiting(self, hasty):
        """Wall-clock time ends a program that waits, and ignores signals, and has closed its output."""
        program = (
            "import os, signal, time\nfor s in range(1, 65):\n"
            " try: signal.signal(s, signal.SIG_IGN)\n"
            " except (OSError, ValueError): pass\n"
            "print('ready', flush=True); os.close(1); os.close(2); time.sleep(600)"
        )
        outcome = hasty.run(program)
        assert (outcome.status, outcome.stdout) == ("timeout", "ready\n")
        assert outcome.seconds < 15

    def test_daemon(self, box, monkeypatch):
        """Without the filter, a process that leaves its session and group ends with the program, without a delay."""
        leave_out_filter(monkeypatch)
        mark = new_mark()
        program = (
            "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n"
            f"  os.execv('/usr/bin/sleep', ['sleep', {mark!r}])\n os._exit(0)\n"
            "os.wait(); time.sleep(0.2); print('done')"
        )
        start = time.monotonic()
        assert report_of(box, program) == "done\n"
        assert time.monotonic() - start < 15
        assert gone(mark)

    def test_input_that_is_not_read(self, box):
        """A program that reads nothing of a long input ends as soon as it is done."""
        assert report_of(box, "print(1)", "x" * 3_000_000) == "1\n"
        assert report_of(box, "import os; os.close(0); print(2)", "x" * 3_000_000) == "2\n"

    def test_killed_parent(self, box):
        """When the process that asked is killed, the program ends too."""
        mark = new_mark()
        program = f"import os; os.execv('/usr/bin/sleep', ['sleep', {mark!r}])"
        code = f"from omniopd_trl.evals.sandbox import LocalSandbox; LocalSandbox({box.isolation!r}).run({program!r})"
        parent = subprocess.Popen([sys.executable, "-c", code])
        deadline = time.monotonic() + 30
        while not (found := any(p.name() == "sleep" for p in processes_with(mark))) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert found
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert gone(mark)


def test_without_root(box):
    """A user who is not root has the same isolation, by a user namespace. Run as another user if this one is root."""
    python = shutil.which("python3", path="/usr/bin")
    if os.geteuid() != 0 or python is None:
        pytest.skip("The other tests run without root, or there is no Python that another user can run.")
    program = (
        "import os, socket, threading, time\n"
        "wait = lambda: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "try: socket.create_connection(('127.0.0.1', 9), 1)\n"
        "except OSError as error: print(type(error).__name__)\n"
        "count = 0\n"
        "try:\n while count < 100: count += 1; wait()\n"
        "except RuntimeError: print(count <= 8)\n"
        "print(os.path.exists('/etc/passwd'), os.listdir('.'))\n"
        "try: open('/a', 'w'); print('written')\n"
        "except OSError as error: print(error.strerror)\n"
        "try: os.chroot('.'); print('root of its namespace')\n"
        "except OSError as error: print(error.strerror)\n"
        "import ctypes\nsets = (ctypes.c_uint32 * 6)()\n"
        "ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), sets); print('capabilities', *sets)\n"
    )
    code = (
        "from omniopd_trl.evals.sandbox import *\n"
        f"print(LocalSandbox({box.isolation!r}, Limits(threads=6)).run({program!r}).stdout)"
    )
    with tempfile.TemporaryDirectory() as folder:
        # Readable for anybody, which a clone may not be.
        package = Path(folder, "omniopd_trl", "evals")
        package.mkdir(parents=True)
        source = Path(sandbox_module.__file__)
        for target, text in (
            (package.parent / "__init__.py", ""),
            (package.parent / "errors.py", source.parents[1].joinpath("errors.py").read_text()),
            (package / "__init__.py", ""),
            (package / "sandbox.py", source.read_text()),
            (package / "inside_sandbox.py", source.with_name("inside_sandbox.py").read_text()),
        ):
            target.write_text(text)
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        process = subprocess.run(
            [python, "-c", code],
            **{"user": 65534, "group": 65534, "extra_groups": [], "cwd": folder, "env": {"PYTHONPATH": folder}},
            capture_output=True,
            text=True,
        )
    if "SandboxError" in process.stderr:
        pytest.skip(f"This machine refuses user namespaces: {process.stderr.splitlines()[-1]}")
    lines = ["PermissionError", "True", "False []", "Read-only file system", "Operation not permitted"]
    assert process.stdout == "\n".join([*lines, "capabilities 0 0 0 0 0 0", "", ""]), process.stderr


class TestWithoutIsolation:
    """Where programs cannot be isolated."""

    def test_refused(self, monkeypatch):
        """Without any isolation nothing runs, and one line says what to do."""
        monkeypatch.setitem(sandbox_module._ENVIRONMENT, "PATH", "/nowhere")
        with pytest.raises(SandboxError) as error:
            make_sandbox.__wrapped__("auto")
        assert "bwrap: bwrap is not installed; namespaces: setpriv is not installed" in str(error.value)
        assert "OMNIOPD_SANDBOX" in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_sandbox_that_breaks(self, monkeypatch, tmp_path):
        """A sandbox that does not start is an error with its message, and not a program that is wrong."""
        (tmp_path / "bwrap").write_text(
            "#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2; exit 1\n"
        )
        (tmp_path / "bwrap").chmod(0o755)
        monkeypatch.setitem(sandbox_module._ENVIRONMENT, "PATH", str(tmp_path))
        with pytest.raises(SandboxError, match=r"did not start .*No permissions to create a new namespace"):
            LocalSandbox("bwrap").run("print(1)")

    def test_told_otherwise(self, monkeypatch):
        """`none` keeps the limits and the filter, in an empty folder."""
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        box = make_sandbox("none", LIMITS)
        program = "import os; print(os.listdir('.'), os.environ.get('OPENAI_API_KEY')); open('a', 'w')"
        assert report_of(box, program) == "[] None\n"
        assert "MemoryError" in box.run("x = bytearray(400 << 20)").stderr
        assert "PermissionError" in box.run("import socket; socket.socket()").stderr
        assert box.run("while True: print('x' * 1000)").status == "output"

    def test_names(self):
        """A name that is none is an error that lists them."""
        with pytest.raises(ConfigError, match=r"no sandbox 'docker'.*'auto', 'bwrap', 'namespaces', 'none'"):
            make_sandbox("docker")
        with pytest.raises(ConfigError, match=r"'/nowhere/python' of the sandbox does not run"):
            LocalSandbox("none", python="/nowhere/python")

    def test_packages_of_another_interpreter(self, box):
        """Programs import the packages of an interpreter that is named, and otherwise the standard library only."""
        if sys.prefix == sys.base_prefix:
            pytest.skip("The tests run without a virtual environment.")
        named = LocalSandbox(box.isolation, LIMITS, python=sys.executable)
        assert report_of(named, "import psutil; print(psutil.__name__)") == "psutil\n"
        assert "ModuleNotFoundError" in box.run("import torch").stderr


class TestTransientFailures:
    """A sandbox that fails for a moment."""

    @pytest.mark.parametrize("failures", [1, 2, 3])
    def test_tried_again(self, failures, monkeypatch):
        """What has run before is tried twice more; what never ran is not."""
        monkeypatch.setattr(sandbox_module, "_WAITS", (0.01, 0.01))
        box = LocalSandbox("none", LIMITS)
        real, left = sandbox_module._run, []

        def failing(*args):
            if left and left.pop():
                raise SandboxError("no processes left")
            return real(*args)

        monkeypatch.setattr(sandbox_module, "_run", failing)
        left[:] = [True]
        with pytest.raises(SandboxError, match="no processes left"):
            box.run("print(1)")
        assert report_of(box, "print(1)") == "1\n"
        left[:] = [True] * failures
        if failures == 3:
            with pytest.raises(SandboxError, match="no processes left"):
                box.run("print(2)")
        else:
            assert report_of(box, "print(2)") == "2\n"


class TestRemote:
    """A service with SandboxFusion's `/run_code`."""

    @staticmethod
    def answer(path, body):
        outcome = LocalSandbox("none", LIMITS).run(body["code"], body["stdin"])
        return {
            "status": "Success" if outcome.exit_code == 0 else "Failed",
            "message": "",
            "compile_result": None,
            "run_result": {
                "status": "Finished" if outcome.status == "finished" else "TimeLimitExceeded",
                "execution_time": outcome.seconds,
                "return_code": outcome.exit_code,
                "stdout": outcome.stdout,
                "stderr": outcome.stderr,
            },
            "files": {},
        }

    def test_protocol(self):
        """The request names the language and the limits; the outcome is the one of a local sandbox."""
        with Loopback(self.answer) as server:
            box = make_sandbox(server.url, LIMITS)
            assert isinstance(box, RemoteSandbox)
            server.requests.clear()
            assert report_of(box, "print(input())", "a") == "a\n"
            assert box.run("1 / 0").exit_code == 1
            assert box.run("while True: pass").status == "timeout"
            assert server.requests[0].path == "/run_code"
            assert server.requests[0].body == {
                "code": "print(input())",
                "language": "python",
                "stdin": "a",
                "run_timeout": 30,
                "memory_limit_MB": 256,
            }

    def test_failures(self, monkeypatch):
        """A failed request is sent again; a service that does not work is an error, not a wrong program."""
        monkeypatch.setattr(sandbox_module, "_WAITS", (0.01, 0.01))
        faults = [Fault(status=502), None, Fault(how="drop"), Fault(body="<html>"), Fault(status=500)]
        with Loopback(self.answer, fault=faults) as server:
            box = RemoteSandbox(server.url, LIMITS)
            assert report_of(box, "print(1)") == "1\n"
            with pytest.raises(SandboxError, match=r"does not run programs \(HTTPStatusError.*500"):
                box.run("print(1)")
        broken = {"status": "SandboxError", "message": "no pod", "run_result": None}
        with Loopback(lambda path, body: broken) as server, pytest.raises(SandboxError, match="no pod"):
            RemoteSandbox(server.url, LIMITS).run("print(1)")

    def test_tried_when_it_is_made(self, monkeypatch):
        """A service that cannot be reached, or has no Python, is refused before anything is generated."""
        monkeypatch.setattr(sandbox_module, "_WAITS", ())
        with pytest.raises(SandboxError, match="does not run programs"):
            make_sandbox("http://127.0.0.1:9", LIMITS)
        missing = {"status": "Finished", "return_code": 127, "stdout": "", "stderr": "", "execution_time": 0.0}
        answer = {"status": "Failed", "message": "", "run_result": missing}
        with Loopback(lambda path, body: answer) as server, pytest.raises(SandboxError, match="exit code 127"):
            make_sandbox(server.url, LIMITS)

# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Runs Python programs of a model where they can do no harm: in a child process without a network, or elsewhere.

A program of a model may do anything: a student in training finds what raises its score. It runs in new Linux
namespaces, as nobody, in an empty folder, with limits on everything, and ends with all its processes.
"""

import itertools
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol

from omniopd_trl.errors import ConfigError, OmniOPDError, first_line
from omniopd_trl.evals import inside_sandbox

Isolation = Literal["bwrap", "namespaces", "none"]

_INSIDE = Path(inside_sandbox.__file__).read_text(encoding="utf-8")
_BOX = "/box"
# Folders of the system that a Python interpreter needs. Nothing else of this machine is in the sandbox: no home, no
# /etc, no /proc, no /sys.
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
# A fixed hash seed: a program that prints a set gets the same score each time.
_ENVIRONMENT = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": _BOX, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
_FIRST_UID = 0x60000000
# Seconds before a sandbox that failed is tried again.
_WAITS = (1.0, 10.0)


class SandboxError(OmniOPDError, RuntimeError):
    """The sandbox itself does not work. Programs cannot be scored, which is not the same as wrong."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu_seconds: CPU time. This is the time limit: it does not depend on other load of the machine.
        wall_seconds: time until everything is ended. It ends programs that wait.
        memory_mib: address space.
        threads: number of threads. A program cannot start processes, so the limits hold for all that it does.
        folder_mib: size of the program's folder, which is in memory, and of a file in it. The folder holds 256 files
            per MiB.
        output_mib: length of the standard output, and of the standard error.
    """

    cpu_seconds: int = 10
    wall_seconds: float = 30.0
    memory_mib: int = 1024
    threads: int = 8
    folder_mib: int = 16
    output_mib: int = 8


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: `"finished"` by itself; `"killed"` by a signal, such as at the limit of CPU time; `"timeout"` at the
            limit of wall-clock time; `"output"` at the limit of the output.
        exit_code: its exit code; `None` if it did not end by itself.
        stdout: its standard output, with replacement characters for what is not UTF-8.
        stderr: its standard error.
        seconds: wall-clock time, with that of starting the sandbox.
    """

    status: Literal["finished", "killed", "timeout", "output"]
    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float


class Sandbox(Protocol):
    """Where programs run. Threads may share one."""

    def run(self, source: str, stdin: str = "") -> Outcome:
        """Run a Python program.

        Args:
            source: its text.
            stdin: its standard input.

        Raises:
            SandboxError: when the sandbox does not work.
        """
        ...


@cache
def make_sandbox(name: str = "auto", limits: Limits = Limits(), python: str | None = None) -> Sandbox:
    """The sandbox of a name. The same arguments give the same sandbox.

    Args:
        name: `"auto"` for [bubblewrap](https://github.com/containers/bubblewrap) if it is installed and works, or else
            namespaces by util-linux; `"bwrap"` or `"namespaces"` for that one; `"none"` for limits alone, for programs
            that you trust: they can read your files; or the address of a [SandboxFusion](
            https://github.com/bytedance/SandboxFusion) service or of another one with its `/run_code`:
            `"http://127.0.0.1:8080"`.
        limits: what a program may use.
        python: argument of [`LocalSandbox`].

    Raises:
        ConfigError: when there is no such sandbox.
        SandboxError: when it does not work here.
    """
    if name.startswith(("http://", "https://")):
        remote = RemoteSandbox(name, limits)
        outcome = remote.run("print(1)")
        if outcome.stdout.strip() != "1":
            raise SandboxError(
                f"The sandbox at {name} does not run Python: `print(1)` ended as {outcome.status}, exit code "
                f"{outcome.exit_code}, and wrote {outcome.stdout!r:.100}. Check the service."
            )
        return remote
    kinds: dict[str, tuple[Isolation, ...]] = {
        "auto": ("bwrap", "namespaces"),
        "bwrap": ("bwrap",),
        "namespaces": ("namespaces",),
        "none": ("none",),
    }
    if name not in kinds:
        raise ConfigError(
            f"There is no sandbox {name!r}. It must be one of {', '.join(map(repr, kinds))}, or the address of a "
            "SandboxFusion service (http://...)."
        )
    reasons = []
    for kind in kinds[name]:
        sandbox = LocalSandbox(kind, limits, python)
        try:
            sandbox.run("")
            return sandbox
        except SandboxError as error:
            reasons.append(f"{kind}: {first_line(error)}")
    raise SandboxError(
        "Programs of a model cannot be isolated from the network and the files of this machine "
        f"({'; '.join(reasons)}). Install bubblewrap, or set OMNIOPD_SANDBOX to the address of a SandboxFusion "
        "service, or to 'none' for programs that you trust."
    )


class LocalSandbox:
    """A child process in namespaces of its own.

    Args:
        isolation: how it is isolated. `"none"` sets limits and a system call filter only.
        limits: what a program may use.
        python: interpreter that runs the programs. Defaults to the one that runs this process, without any packages.
            Name the interpreter of another environment for programs that import its packages.
    """

    def __init__(self, isolation: Isolation, limits: Limits = Limits(), python: str | None = None):
        self.limits = limits
        self.isolation = isolation
        self._python, prefixes = _interpreter(python)
        folders = [folder for folder in _SYSTEM if os.path.isdir(folder)]
        self._folders = folders + [p for p in prefixes if not p.startswith(tuple(f"{f}/" for f in folders))]
        self._root = os.geteuid() == 0
        self._users = itertools.count()
        self._has_run = False

    def run(self, source: str, stdin: str = "") -> Outcome:
        """See [`Sandbox.run`]. A sandbox that has run before, and does not start, is tried again."""
        outcome = _tried(partial(self._run, source, stdin), _WAITS if self._has_run else ())
        self._has_run = True
        return outcome

    def _run(self, source: str, stdin: str) -> Outcome:
        program = source.encode("utf-8", "surrogatepass")
        limits = self.limits
        # Without root, two of the wrapper's processes count.
        threads = 0 if self.isolation == "none" else limits.threads + 2 * (not self._root)
        inside = [*self._python, "-X", "utf8", "-c", _INSIDE]
        inside += map(str, (len(program), limits.cpu_seconds, limits.memory_mib, threads, limits.folder_mib))
        sent = program + stdin.encode("utf-8", "surrogatepass")
        start = time.monotonic()
        if self.isolation == "none":
            with tempfile.TemporaryDirectory() as folder:
                status, code, stdout, stderr = _run(inside, sent, limits, folder)
        else:
            command = self._bwrap() if self.isolation == "bwrap" else self._unshare()
            status, code, stdout, stderr = _run([*command, *inside], sent, limits, "/")
        if not stderr.startswith(inside_sandbox.READY):
            reason = " ".join(stderr.decode("utf-8", "replace").split())[-300:]
            raise SandboxError(f"the sandbox did not start ({reason or f'{status}, exit code {code}'})")
        stderr = stderr.removeprefix(inside_sandbox.READY)
        # Wrappers report a signal as 128 plus its number.
        killed = status == "finished" and code is not None and (code < 0 or code > 128)
        return Outcome(
            status="killed" if killed else status,
            exit_code=None if killed else code,
            stdout=stdout.decode("utf-8", "replace"),
            stderr=stderr.decode("utf-8", "replace"),
            seconds=time.monotonic() - start,
        )

    def _as_nobody(self) -> list[str]:
        """The command that gives up all privileges.

        For root, each run has a user of its own: the kernel does not limit the processes of root, and counts those
        of other users over the whole machine.
        """
        user = str(_FIRST_UID + os.getpid() * 64 + next(self._users) % 64)
        identity = ["--reuid", user, "--regid", user, "--clear-groups"] if self._root else []
        return ["setpriv", *identity, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--"]

    def _bwrap(self) -> list[str]:
        # Root needs no user namespace, and in one it would still be root of the machine's files.
        if self._root:
            command = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
            command += ["--unshare-cgroup-try", "--cap-drop", "ALL"]
            command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            command = ["bwrap", "--unshare-all", "--cap-drop", "ALL"]
        command += ["--cap-add", "CAP_SETPCAP", "--cap-add", "CAP_SYS_ADMIN", "--die-with-parent", "--new-session"]
        for kind, paths in (("--ro-bind", self._folders), ("--dev-bind", _DEVICES)):
            for path in paths:
                # bubblewrap makes missing parents that only its own user can enter.
                for parent in reversed(Path(path).parents[:-1]):
                    command += ["--perms", "0755", "--dir", str(parent)]
                command += [kind, path, path]
        size = str(self.limits.folder_mib << 20)
        command += ["--perms", "1777", "--size", size, "--tmpfs", _BOX, "--remount-ro", "/", "--chdir", _BOX, "--"]
        # bubblewrap sets no limit on the number of files.
        command += ["sh", "-euc", f'mount -t tmpfs -o remount,{self._folder()} tmpfs {_BOX}\nexec "$@"', "sh"]
        return command + self._as_nobody()

    def _folder(self) -> str:
        """Mount options of the program's folder. An empty file takes 1 KiB of the kernel, which no `size` counts."""
        return f"size={self.limits.folder_mib}m,nr_inodes={self.limits.folder_mib * 256},mode=1777,nosuid,nodev"

    def _unshare(self) -> list[str]:
        user = [] if self._root else ["--user", "--map-root-user"]
        # Everything ends with its parent, and with this process.
        command = ["setpriv", "--pdeathsig", "KILL", "--", "unshare", *user, "--mount", "--net", "--pid", "--ipc"]
        command += ["--uts", "--fork", "--kill-child=KILL", "sh", "-euc", self._mounts(), "sh"]
        return command + self._as_nobody()

    def _mounts(self) -> str:
        """A script that makes a small file system, enters it, and runs its arguments."""
        # Any folder that is always there: what it hides is not needed.
        root = "/sys"
        lines = [f"mount -t tmpfs -o size=1m,mode=755 tmpfs {root}"]
        for folder in self._folders:
            lines += [f"mkdir -p {root}{folder}", f"mount --rbind {folder} {root}{folder}"]
            lines += [f"mount -o remount,bind,ro,nosuid,nodev {root}{folder}"]
        # `umount` reads /proc, which is that of the old root until it is gone.
        lines += [f"mkdir {root}/dev {root}{_BOX} {root}/old", f"ln -s old/proc {root}/proc"]
        for device in _DEVICES:
            lines += [f": > {root}{device}", f"mount --bind {device} {root}{device}"]
        lines += [
            f"mount -t tmpfs -o {self._folder()} tmpfs {root}{_BOX}",
            f"mount -o remount,bind,ro {root}",
            f"cd {root}",
            "pivot_root . old",
            f"cd {_BOX}",
            "umount -l /old",
            # The shell stays: as the first process of the namespace it ends with its parent, and all others with it.
            # The program would not, since a process that changes its user no longer ends with its parent.
            "set +e",
            '"$@"',
            "exit $?",
        ]
        return "\n".join(lines)


@cache
def _interpreter(python: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The command of an interpreter, and the folders that it needs.

    Raises:
        ConfigError: when it does not run.
    """
    if python is None:
        base, prefix = (
            os.path.realpath(getattr(sys, "_base_executable", sys.executable)),
            os.path.realpath(sys.base_prefix),
        )
        # Not the whole prefix: Conda keeps its settings there.
        folders = (os.path.dirname(base), *(os.path.join(prefix, name) for name in ("lib", "lib64")))
        # Without its packages, whose start-up code takes longer than the rest.
        return (base, "-S"), tuple(folder for folder in folders if os.path.isdir(folder))
    code = "import sys; print(sys.executable, sys.prefix, sys.base_prefix, sep='\\n')"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"The interpreter {python!r} of the sandbox does not run ({first_line(error)}). Name a Python 3."
        ) from error
    executable, *prefixes = found.splitlines()
    return (executable,), tuple(dict.fromkeys([*prefixes, *map(os.path.realpath, prefixes)]))


def _tried(run: Callable[[], Outcome], waits: Sequence[float]) -> Outcome:
    """Run, and after each of the waits once more if the sandbox fails: one moment must not end a run of days."""
    for wait in waits:
        try:
            return run()
        except SandboxError:
            time.sleep(wait)
    return run()


def _run(
    command: list[str], sent: bytes, limits: Limits, folder: str
) -> tuple[Literal["finished", "timeout", "output"], int | None, bytes, bytes]:
    """Run a command in a session of its own, within the limits of wall-clock time and output.

    Returns:
        `(status, exit code, standard output, standard error)`.

    Raises:
        SandboxError: when the command cannot be executed.
    """
    if shutil.which(command[0], path=_ENVIRONMENT["PATH"]) is None:
        raise SandboxError(f"{command[0]} is not installed")
    deadline = time.monotonic() + limits.wall_seconds
    most = limits.output_mib << 20
    status: Literal["finished", "timeout", "output"] = "finished"
    with (
        subprocess.Popen(
            command,
            bufsize=0,
            cwd=folder,
            env=_ENVIRONMENT,
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process,
        selectors.DefaultSelector() as selector,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        output = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        ended = os.pidfd_open(process.pid)
        try:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE)
            for pipe in (*output, ended):
                selector.register(pipe, selectors.EVENT_READ)
            rest = memoryview(sent)
            while selector.get_map() and status == "finished":
                ready = selector.select(max(deadline - time.monotonic(), 0))
                if not ready:
                    status = "timeout"
                for key, _ in ready:
                    if key.fileobj is process.stdin:
                        try:
                            rest = rest[os.write(key.fd, rest[:65536]) :]
                        except BrokenPipeError:  # the program does not read its input
                            rest = rest[:0]
                        if not rest:
                            selector.unregister(process.stdin)
                            process.stdin.close()
                    elif key.fileobj == ended:
                        selector.unregister(ended)
                        # The group, before its leader is reaped and its number may belong to another one.
                        _kill(process)
                    elif part := os.read(key.fd, 65536):
                        output[key.fd] += part
                        if len(output[key.fd]) > most:
                            status = "output"
                    else:
                        selector.unregister(key.fileobj)
        finally:
            os.close(ended)
            # Not reaped yet. What left its group ends with its namespace.
            _kill(process)
    stdout, stderr = (bytes(part[:most]) for part in output.values())
    return status, process.returncode if status == "finished" else None, stdout, stderr


def _kill(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


class RemoteSandbox:
    """A [SandboxFusion](https://github.com/bytedance/SandboxFusion) service, or another one with its `/run_code`.

    A request is `POST {address}/run_code` with the JSON `{"code", "language": "python", "stdin", "run_timeout",
    "memory_limit_MB"}`. The answer holds `"run_result": {"status": "Finished" | "TimeLimitExceeded" | "Error",
    "return_code", "stdout", "stderr", "execution_time"}`. Isolation is the task of the service.

    Args:
        address: address of the service.
        limits: what a program may use. The service applies `wall_seconds` and `memory_mib`.
    """

    def __init__(self, address: str, limits: Limits = Limits()):
        self.limits = limits
        self.address = address.rstrip("/")
        import httpx2

        self._errors = (httpx2.HTTPError, SandboxError, ValueError, KeyError, TypeError)
        self._client = httpx2.Client(timeout=limits.wall_seconds + 30)

    def run(self, source: str, stdin: str = "") -> Outcome:
        """See [`Sandbox.run`]. A request that fails is sent again."""
        return _tried(partial(self._post, source, stdin), _WAITS)

    def _post(self, source: str, stdin: str) -> Outcome:
        body = {
            "code": source,
            "language": "python",
            "stdin": stdin,
            "run_timeout": self.limits.wall_seconds,
            "memory_limit_MB": self.limits.memory_mib,
        }
        try:
            answer = self._client.post(f"{self.address}/run_code", json=body)
            answer.raise_for_status()
            return self._outcome(answer.json())
        except self._errors as error:
            raise SandboxError(
                f"The sandbox at {self.address} does not run programs ({type(error).__name__}: {first_line(error)}). "
                "Check that a SandboxFusion service is running there."
            ) from error

    def _outcome(self, answer: dict[str, Any]) -> Outcome:
        result = answer["run_result"]
        if answer["status"] == "SandboxError" or result is None:
            raise SandboxError(str(answer.get("message") or "the service reports an error of its own"))
        status: Literal["finished", "killed", "timeout"] = "finished"
        if result["status"] == "TimeLimitExceeded":
            status = "timeout"
        elif result["status"] == "Error" or result["return_code"] is None:
            status = "killed"
        return Outcome(
            status=status,
            exit_code=result["return_code"] if status == "finished" else None,
            stdout=result["stdout"] or "",
            stderr=result["stderr"] or "",
            seconds=result["execution_time"] or 0.0,
        )

# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The first code inside the sandbox: it limits its own process for good, then becomes the program.

[`sandbox`] passes this file's text to the interpreter of the sandbox, which need not have this package: the standard
library only. The program is the first bytes of standard input, and the rest is its own input.
"""

import builtins
import ctypes
import os
import resource
import struct
import sys
import types

READY = b"\0in the sandbox\n"

_MIB = 1024 * 1024
_EPERM, _ENOSYS, _ALLOW, _KILL = 0x00050001, 0x00050026, 0x7FFF0000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_THREAD = 0x00010000
_UNIX = 1

# System calls that reach beyond the process or hold memory that no limit counts. In this order: shmget, msgget,
# semget, memfd_create, ptrace, process_vm_readv, process_vm_writev, mount, umount2, pivot_root, unshare, setns,
# add_key, request_key, keyctl, bpf, perf_event_open, userfaultfd, io_uring_setup. On x86-64 also fork and vfork.
_REFUSED = {
    "x86_64": (29, 68, 64, 319, 101, 310, 311, 165, 166, 155, 272, 308, 248, 249, 250, 321, 298, 323, 425, 57, 58),
    "aarch64": (194, 186, 190, 279, 117, 270, 271, 40, 39, 41, 97, 268, 217, 218, 219, 280, 241, 282, 425),
}
_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SOCKET = {"x86_64": 41, "aarch64": 198}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435


def limit(cpu_seconds: int, memory_mib: int, threads: int, file_mib: int) -> None:
    """Set resource limits that the process cannot raise again. `threads=0` sets none for threads."""
    for name, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_mib * _MIB),
        (resource.RLIMIT_FSIZE, file_mib * _MIB),
        (resource.RLIMIT_NPROC, threads),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_STACK, 64 * _MIB),
    ):
        hard = resource.getrlimit(name)[1]
        if name != resource.RLIMIT_NPROC or threads:
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(name, (value, value))


def refuse_system_calls() -> None:
    """Install a seccomp filter.

    Sockets other than local ones are refused: a second wall beside the empty network, and the only one for `AF_VSOCK`,
    which no namespace separates. New processes are refused, and threads are not: limits of CPU time and memory are
    those of a process, and N processes would have N times as much.
    """
    machine = os.uname().machine
    if machine not in _ARCH:
        return
    rules = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCH[machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if machine == "x86_64":
        rules += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _EPERM)]
    for number in _REFUSED[machine]:
        rules += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    # Its flags are in memory, which a filter cannot read. The C library falls back to `clone`.
    rules += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ENOSYS)]
    rules += [(_EQUAL, 0, 4, _SOCKET[machine]), (_LOAD, 0, 0, 16), (_EQUAL, 1, 0, _UNIX)]
    rules += [(_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]
    rules += [(_EQUAL, 0, 4, _CLONE[machine]), (_LOAD, 0, 0, 16), (_ANY_BIT, 1, 0, _THREAD)]
    rules += [(_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]
    rules += [(_RETURN, 0, 0, _ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("HP", len(rules), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    no_new_privileges, seccomp, by_filter = 38, 22, 2
    if prctl(no_new_privileges, 1, 0, 0, 0) or prctl(seccomp, by_filter, ctypes.addressof(program), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def read_program(length: int) -> bytes:
    """The first `length` bytes of standard input. No byte more is read, since the rest belongs to the program."""
    source = b""
    while len(source) < length:
        part = os.read(0, length - len(source))
        if not part:
            raise EOFError("the program is not complete")
        source += part
    return source


if __name__ == "__main__":
    _length, *_limits = map(int, sys.argv[1:])
    _source = read_program(_length)
    limit(*_limits)
    refuse_system_calls()
    # Names that the module `site` makes, which an interpreter without its packages does not import.
    if not hasattr(builtins, "exit"):
        builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
    os.write(2, READY)
    # A module of its own: the program finds no name of this file.
    sys.argv = ["main.py"]
    sys.modules["__main__"] = _module = types.ModuleType("__main__")
    exec(compile(_source, "main.py", "exec"), vars(_module))

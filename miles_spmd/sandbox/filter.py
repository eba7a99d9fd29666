"""The system calls that a program in the sandbox is refused, as a seccomp filter in classic BPF.

The filter is a second line of defence: the namespaces already take away what these calls act upon. It keeps the
program away from parts of the kernel in which errors have led out of namespaces before, and from memory that no limit
counts (memfd, System V shared memory). It is a list of what is refused and not of what is allowed, so that any Python
program runs; seccomp(2) and the kernel's Documentation/userspace-api/seccomp_filter.rst describe the format.
"""

from __future__ import annotations

import errno
import platform
import struct

# name -> numbers on x86_64 and aarch64 (None: it has no such call)
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    # parts of the kernel that a program does not need
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "syslog": (103, 116),
    "lookup_dcookie": (212, 18),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    # memory that RLIMIT_AS does not count once it is not mapped
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    # the machine
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "vhangup": (153, 58),
}
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_IOCTL = (16, 29)
_SOCKET = (41, 198)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*
_X32 = 0x40000000  # added to the number of a call of the x32 ABI, which the numbers above do not name

_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # write into the input of a terminal
# Others do not end at a network namespace (AF_VSOCK reaches the host of a virtual machine), or are seldom examined.
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6

_LOAD, _JUMP_EQUAL, _JUMP_FROM, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def seccomp_filter(machine: str = platform.machine()) -> bytes:
    """Return the filter for ``machine`` (x86_64 or aarch64), an array of ``struct sock_filter``.

    A refused call fails with EPERM, clone3 with ENOSYS (its flags lie in memory, which a filter cannot read; the C
    library then uses clone), a socket of another family than UNIX and IP with EAFNOSUPPORT. A call by another
    architecture's number kills the process. Raises ValueError for another machine.
    """
    if machine not in _ARCHITECTURES:
        raise ValueError(f"no seccomp filter for {machine}; known: {', '.join(_ARCHITECTURES)}")
    column, architecture = _ARCHITECTURES[machine]
    code = [_load(_ARCHITECTURE), *_unless(_JUMP_EQUAL, architecture, [_return(_KILL)]), _load(_NUMBER)]
    if machine == "x86_64":
        code += _when(_JUMP_FROM, _X32, [_return(_KILL)])
    for numbers in REFUSED.values():
        if (number := numbers[column]) is not None:
            code += _when(_JUMP_EQUAL, number, [_refuse(errno.EPERM)])
    code += _when(_JUMP_EQUAL, _CLONE3[column], [_refuse(errno.ENOSYS)])
    code += _when(
        _JUMP_EQUAL,
        _CLONE[column],
        [_argument(0), *_when(_JUMP_ANY_BIT, _NEW_NAMESPACES, [_refuse(errno.EPERM)]), _return(_ALLOW)],
    )
    terminal = [
        line for request in (_TIOCSTI, _TIOCLINUX) for line in _when(_JUMP_EQUAL, request, [_refuse(errno.EPERM)])
    ]
    code += _when(_JUMP_EQUAL, _IOCTL[column], [_argument(1), *terminal, _return(_ALLOW)])
    families = [line for family in _FAMILIES for line in _when(_JUMP_EQUAL, family, [_return(_ALLOW)])]
    code += _when(_JUMP_EQUAL, _SOCKET[column], [_argument(0), *families, _refuse(errno.EAFNOSUPPORT)])
    return b"".join([*code, _return(_ALLOW)])


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _when(jump: int, value: int, body: list[bytes]) -> list[bytes]:
    return [_instruction(jump, value, 0, len(body)), *body]


def _unless(jump: int, value: int, body: list[bytes]) -> list[bytes]:
    return [_instruction(jump, value, len(body), 0), *body]


def _load(offset: int) -> bytes:
    return _instruction(_LOAD, offset)


def _argument(index: int) -> bytes:
    """Load the lower half of an argument: all those that are looked at have 32 bits."""
    return _load(_ARGUMENTS + 8 * index)


def _return(action: int) -> bytes:
    return _instruction(_RETURN, action)


def _refuse(number: int) -> bytes:
    return _return(_ERRNO | number)

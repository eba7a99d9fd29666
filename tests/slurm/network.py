"""A network of this machine alone: a bridge, and a network namespace for each node, which loses packets on request.

It needs the packages iproute2 and iptables, and root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

LOOPBACK = "127.0.0.1"
INTERFACE = "eth0"  # in every namespace
ALL = [("INPUT", "-i"), ("OUTPUT", "-o")]


def missing() -> list[str]:
    """That without which there is no network here."""
    lacking = [name for name in ("ip", "iptables") if shutil.which(name) is None]
    if lacking or os.geteuid():
        return lacking + (["root"] if os.geteuid() else [])
    name = f"t{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return ["network namespaces"]
    _run("ip", "netns", "delete", name)
    return []


class Network:
    """``host`` is this machine's address in it, and ``addresses`` are those of the nodes."""

    def __init__(self, nodes: int) -> None:
        subnet, self._name = f"10.213.{os.getpid() % 256}", f"t{os.getpid()}"
        self.host, self.addresses = f"{subnet}.1", [f"{subnet}.{2 + node}" for node in range(nodes)]
        _run("ip", "link", "add", self._name, "type", "bridge")
        _run("ip", "address", "add", f"{self.host}/24", "dev", self._name)
        _run("ip", "link", "set", self._name, "up")
        for node, address in enumerate(self.addresses):
            port, inside = f"{self._name}-{node}", ["ip", "-n", self._namespace(node)]
            _run("ip", "netns", "add", self._namespace(node))
            _run("ip", "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", self._namespace(node))
            _run("ip", "link", "set", port, "master", self._name, "up")
            _run(*inside, "address", "add", f"{address}/24", "dev", INTERFACE)
            for name in ("lo", INTERFACE):
                _run(*inside, "link", "set", name, "up")

    def inside(self, node: int) -> list[str]:
        """What a command begins with that runs on a node."""
        return ["nsenter", f"--net=/run/netns/{self._namespace(node)}"]  # `ip netns exec` would hide /sys/fs/cgroup

    def cut(self, node: int) -> None:
        """Let the node lose all packets."""
        _run(*self.inside(node), "sh", "-c", cut())

    def sever(self, node: int, *alone: int) -> None:
        """Let the node lose all packets except those that come from a port of a process other than ``alone``, or go to
        one: these processes do not reach each other any more."""
        ports = {port for number in range(len(self.addresses)) for port in self._ports(number, alone)}
        allowed = [f"-p tcp --{end}port {port} -j ACCEPT" for port in sorted(ports) for end in "sd"]
        rules = [f"-A {chain} {flag} {INTERFACE} {rule}" for chain, flag in ALL for rule in (*allowed, "-j DROP")]
        restore = "\n".join(["*filter", *rules, "COMMIT", ""])
        subprocess.run([*self.inside(node), "iptables-restore"], input=restore, text=True, check=True)

    def _ports(self, node: int, without: Collection[int]) -> set[int]:
        """The ports that processes of the node have, apart from some of them."""
        namespace, found = Path("/run/netns", self._namespace(node)).stat().st_ino, set[int]()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if (process / "ns/net").stat().st_ino == namespace and int(process.name) not in without:
                    sockets = {os.readlink(descriptor) for descriptor in (process / "fd").iterdir()}
                    for line in (process / "net/tcp").read_text().splitlines()[1:]:
                        _, address, *_, number = line.split()[:10]
                        if f"socket:[{number}]" in sockets:
                            found.add(int(address.rpartition(":")[2], 16))
        return found

    def repair(self, node: int) -> None:
        """Let the node lose no packets any more."""
        _run(*self.inside(node), "iptables", "-w", "-F")

    def close(self) -> None:
        for node in range(len(self.addresses)):
            _run("ip", "link", "delete", f"{self._name}-{node}")  # a namespace stays as long as its processes
            _run("ip", "netns", "delete", self._namespace(node))
        _run("ip", "link", "delete", self._name)

    def _namespace(self, node: int) -> str:
        return f"{self._name}-{node}"


def cut() -> str:
    """Return a command of the shell by which the node that it runs on loses all packets: without a word to anybody, as
    where a cable or a switch is broken."""
    return " && ".join(f"iptables -w -A {chain} {flag} {INTERFACE} -j DROP" for chain, flag in ALL)


@contextmanager
def network(nodes: int) -> Iterator[Network]:
    made = Network(nodes)
    try:
        yield made
    finally:
        made.close()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)

"""A Slurm cluster of this machine alone: the real slurmctld, munged and one slurmd for each node.

Each node has a host name of its own (a UTS namespace), and in a :class:`Network` addresses of its own, so that jobs of
several nodes run as on several machines. State, keys, ports and configuration are the cluster's own: several clusters
may run beside each other, and beside the machine's. It needs the packages slurm-wlm and munge, and root.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.ranks import free_port
from tests.slurm.network import LOOPBACK, Network

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")
CORES = 2  # of each node, whatever the machine has
SECONDS = 30.0  # generous: other tests may use the machine
ENDS = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "DEADLINE",
    "BOOT_FAIL",
)
LIMIT = 600.0  # seconds for a job to get somewhere
CONF = """
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
OverTimeLimit=0
SchedulerParameters=sched_interval=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> list[str]:
    """The programs without which there is no cluster here."""
    return [name for name in PROGRAMS if shutil.which(name) is None] + ([] if os.geteuid() == 0 else ["root"])


class Cluster:
    """The nodes are called ``node0``, ``node1``, ... Without a ``network`` they share the loopback interface."""

    def __init__(self, nodes: int, network: Network | None = None) -> None:
        self._network = network
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)  # jobs of other users read the configuration
        (self.folder / "state").mkdir()
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment |= {"SLURM_CONF": str(self.folder / "slurm.conf"), "PYTHON": sys.executable}
        self.environment |= {"OMP_NUM_THREADS": "1"}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        host, controller = os.uname().nodename, free_port()
        address = network.host if network else LOOPBACK
        lines = [CONF.format(folder=self.folder, host=host, address=address, controller=controller)]
        for node in range(nodes):
            address = network.addresses[node] if network else LOOPBACK
            place = f"NodeHostname=node{node} NodeAddr={address} Port={free_port()}"
            lines.append(f"NodeName=node{node} {place} CPUs={CORES} RealMemory=2000 State=UNKNOWN\n")
        (self.folder / "slurm.conf").write_text("".join([lines[0], *lines[1:]]))
        try:
            self._start(nodes)
        except BaseException:
            self.stop()
            raise

    def _start(self, nodes: int) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = [f"--{name}-file={self.folder}/munged.{name}" for name in ("pid", "log", "seed")]
        socket = self.folder / "munge"
        self._daemon("munged", "--foreground", "--force", f"--socket={socket}", f"--key-file={key}", *files)
        wait_for(socket.exists, SECONDS)
        self._daemon("slurmctld", "-D", "-c")
        for node in range(nodes):
            self.start_node(node)
        wait_for(lambda: self.command("sinfo", "-h", "-o", "%T %D", check=False).strip() == f"idle {nodes}", SECONDS)

    def start_node(self, node: int) -> None:
        """Start slurmd of a node, which has a host name of its own."""
        inside = f"hostname node{node}; {reachable_python()} exec slurmd -D -N node{node}"
        outside = self._network.inside(node) if self._network else []
        self._nodes[node] = self._daemon(*outside, "unshare", "--uts", "--mount", "bash", "-ec", inside)

    def kill_node(self, node: int) -> None:
        """Kill slurmd and everything that runs on the node, as the end of a machine does."""
        daemon = self._nodes[node]
        namespace = os.readlink(f"/proc/{daemon.pid}/ns/uts")
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if entry.name.isdigit() and os.readlink(entry / "ns" / "uts") == namespace:
                    os.kill(int(entry.name), signal.SIGKILL)
        daemon.wait()

    def _daemon(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{Path(command[0]).name}.out").open("ab") as out:
            daemon = subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self._daemons.append(daemon)
        return daemon

    def stop(self) -> None:
        """Cancel all jobs and end the daemons, the nodes' first."""
        if len(self._daemons) > 1:
            self.command("scancel", "--state=PENDING", "--user=root", check=False)
            subprocess.run(["scancel", "--me"], env=self.environment, check=False, timeout=SECONDS, capture_output=True)
            for job in self.command("squeue", "-h", "-o", "%A", check=False).split():
                self.command("scancel", job, check=False)
            wait_for(lambda: not self.command("squeue", "-h", check=False).strip(), SECONDS)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, *command: str | Path, check: bool = True, **variables: str) -> str:
        """The output of a command of Slurm."""
        done = subprocess.run(
            list(map(str, command)),
            env=self.environment | variables,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *command: str | Path, **variables: str) -> Job:
        """Submit a batch script: options of sbatch, the script, its arguments."""
        return Job(self, self.command("sbatch", "--parsable", *command, **variables).strip())


class Job:
    def __init__(self, cluster: Cluster, job: str) -> None:
        self.cluster, self.id = cluster, job
        self._hastened = "0"  # the restart that does not wait

    def show(self) -> dict[str, str]:
        """What ``scontrol show job`` prints."""
        text = self.cluster.command("scontrol", "show", "job", self.id)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    @property
    def state(self) -> str:
        return self.show()["JobState"]

    def log(self) -> str:
        try:
            return Path(self.show()["StdOut"]).read_text()
        except FileNotFoundError:
            return ""

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until it holds; the job must not end before."""
        wait_for(lambda: condition() or self.ended(), LIMIT)
        assert condition(), f"{self.state}\n{self.log()}"

    def ended(self) -> bool:
        return self.state in ENDS

    def wait(self) -> str:
        """Wait for the end; a requeued job does not wait for its time to begin."""

        def ended() -> bool:
            self.begin_now()
            return self.ended()

        wait_for(ended, LIMIT)
        return self.state

    def begin_now(self) -> None:
        """A requeued job waits for two minutes, unless it is told to start. Not within a second: a node refuses the
        credential of a job that it has ended in the same second."""
        shown = self.show()
        waits = (shown["JobState"], shown["Reason"]) == ("PENDING", "BeginTime")
        if waits and shown["Restarts"] != self._hastened:  # once, or the time would never come
            self._hastened = shown["Restarts"]
            self.cluster.command("scontrol", "update", f"JobId={self.id}", "StartTime=now+2", check=False)

    def signal(self, number: signal.Signals, *options: str) -> None:
        self.cluster.command("scancel", f"--signal={number.name.removeprefix('SIG')}", *options, self.id)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


def reachable_python() -> str:
    """Shell commands that let all users reach the interpreter, in a mount namespace, where it is in a folder that is
    root's alone."""
    python = Path(sys.executable).resolve().parents[1]
    closed = [folder for folder in python.parents if not folder.stat().st_mode & 0o001]
    if not closed:
        return ""
    outer = closed[-1]  # the outermost
    kept = "kept=$(mktemp -d); mount --bind"
    return (
        f"mount --make-rprivate /; {kept} {python} $kept; mount -t tmpfs -o mode=755 none {outer}; "
        f"mkdir -p {python}; mount --move $kept {python}; "
    )

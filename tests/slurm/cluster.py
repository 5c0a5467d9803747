"""A real Slurm cluster on loopback: munged, slurmctld and several slurmd, as the user who runs the tests.

Every node is a slurmd of this machine with more cores than there are. Nothing is written outside one folder, nothing
listens beyond loopback, and every process is ended by an id that was started here.

python -m tests.slurm.cluster NODES COMMAND...    runs a command with such a cluster, and ends the cluster after it
"""

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun", "sinfo")
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
MailProg=/bin/true
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=60
KillWait=10
MinJobAge=3600
MessageTimeout=20
BatchStartTimeout=20
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""
_NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=2 ThreadsPerCore=1 RealMemory=1000 State=UNKNOWN"
)


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"no {absent[0]}: install the packages slurm-wlm and munge"
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "nothing"
    if not address.startswith("127."):
        return f"the name of this machine stands for {address}: Slurm would listen beyond loopback"
    return None


class Cluster:
    """A running cluster of nodes n1, n2, ... with two cores each, its partition `main` and one that preempts, `high`."""

    def __init__(self, nodes: int) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets have at most 108 characters
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(self.root / "slurm.conf"),
            "PATH": _path(),
        }
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Starts all daemons and waits for the nodes."""
        self.root.chmod(0o755)
        for folder in ("state", *(f"spool.{node}" for node in self.nodes)):
            (self.root / folder).mkdir()
        (self.root / "munge").mkdir(mode=0o700)
        (self.root / "munge" / "key").write_bytes(secrets.token_bytes(128))
        (self.root / "munge" / "key").chmod(0o600)
        ports = _free_ports(len(self.nodes) + 1)
        nodes = "\n".join(_NODE.format(name=name, port=port) for name, port in zip(self.nodes, ports[1:], strict=True))
        values = {"host": socket.gethostname(), "user": getpass.getuser(), "root": self.root, "port": ports[0]}
        (self.root / "slurm.conf").write_text(_CONF.format(**values, nodes=nodes))
        munge = {"key-file": "munge/key", "socket": "munge.sock", "pid-file": "munge/pid", "log-file": "munge/log"}
        munge["seed-file"] = "munge/seed"
        self._spawn("munged", "-F", *(f"--{option}={self.root / file}" for option, file in munge.items()))
        wait_until((self.root / "munge.sock").exists, 20, "munged")
        self._spawn("slurmctld", "-D", "-i")
        for node in self.nodes:
            self._spawn("slurmd", "-D", "-N", node, name=node)
        wait_until(lambda: set(self.states().values()) == {"idle"}, 60, lambda: f"idle nodes: {self.states()}")

    def call(self, *command: str) -> str:
        """What a Slurm command prints. Fails with its complaint."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def states(self) -> dict[str, str]:
        """State by node; empty while the controller starts."""
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "main", "-o", "%N %t"], env=self.environment, capture_output=True, text=True
        )
        return dict(line.split() for line in done.stdout.splitlines())

    def jobs(self) -> dict[str, str]:
        """State of every job by its name; of an array's tasks by name and number."""
        lines = self.call("squeue", "-h", "-r", "-t", "all", "-o", "%j %K %T").splitlines()
        return {
            name if task == "N/A" else f"{name}.{task}": state for name, task, state in (line.split() for line in lines)
        }

    def job_id(self, name: str) -> str:
        """Of the newest job of that name."""
        return self.call("squeue", "-h", "-t", "all", "-n", name, "-S", "-i", "-o", "%A").split()[0]

    def details(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.call("scontrol", "show", "job", "-o", job)
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    def kill_node(self, node: str) -> None:
        """Everything of a node dies at once. The controller finds out by itself, in a minute or two."""
        victims = [self._daemons[node].pid, *(pid for pid in self._ours() if _holds(pid, f"slurmd.{node}.log"))]
        for pid in [process for victim in victims for process in (victim, *_descendants(victim))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._daemons.pop(node).wait()

    def declare_lost(self, node: str) -> None:
        """Tells the controller."""
        self.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def stop(self) -> None:
        """Ends jobs, daemons and whatever a job left running."""
        with contextlib.suppress(Exception):
            jobs = self.call("squeue", "-h", "-o", "%A").split()
            if jobs:
                self.call("scancel", "-s", "KILL", "--full", *sorted(set(jobs)))
                wait_until(lambda: not self.call("squeue", "-h").strip(), 5, "the end of the jobs")
        left = self._ours()
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in left | self._ours():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.root, ignore_errors=True)

    def _spawn(self, program: str, *arguments: str, name: str = "") -> None:
        with (self.root / f"{name or program}.out").open("ab") as log:
            self._daemons[name or program] = subprocess.Popen(
                [shutil.which(program, path=_path()) or program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
                cwd=self.root,
            )

    def _ours(self) -> set[int]:
        """The jobs' processes, by their environment: slurmstepd is no child of slurmd, and may leave children behind."""
        mark = f"SLURM_CONF={self.root / 'slurm.conf'}".encode()
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    variables = (entry / "environ").read_bytes().split(b"\0")
                    of_a_job = any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables)
                    if mark in variables and (of_a_job or (entry / "comm").read_text().strip() == "slurmstepd"):
                        found.add(int(entry.name))
        return found


def wait_until(condition: Callable[[], object], seconds: float, what: str | Callable[[], str]) -> None:
    """Fails where it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what() if callable(what) else what}"
        time.sleep(0.2)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _holds(pid: int, file: str) -> bool:
    """True if a process has a file of that name open."""
    with contextlib.suppress(OSError):
        return any(os.readlink(entry).endswith(f"/{file}") for entry in Path(f"/proc/{pid}/fd").iterdir())
    return False


def _descendants(pid: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                    yield from _descendants(int(entry.name))
                    yield int(entry.name)


def main() -> int:
    """Runs the command of the command line; gives its exit code."""
    reason = why_not()
    if reason:
        sys.exit(reason)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cluster = Cluster(int(sys.argv[1]))
    try:
        cluster.start()
        return subprocess.run(sys.argv[2:], env=cluster.environment).returncode
    finally:
        cluster.stop()


if __name__ == "__main__":
    sys.exit(main())

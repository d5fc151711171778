"""A throw-away SLURM cluster on this machine: real daemons, pretended nodes, loopback only.

By hand, from the repository::

    python tests/slurm/cluster.py up /tmp/cluster      # prints what to export
    python tests/slurm/cluster.py down /tmp/cluster

It needs Debian's packages slurmctld, slurmd, slurm-client and munge (and starts none of their
services), and runs as whoever starts it. Everything it writes is in its folder, and it ends only
the processes that it started.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged", "munge")
# Debian keeps daemons out of an ordinary user's path.
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))

CONF = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
# Nothing of it can be reached from outside.
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credentials are void: seconds, in place of two minutes (which
# less than 5 would mean).
AuthInfo=socket={folder}/munge.sock,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,defer_batch
# The nodes have the cores that are written here.
SlurmdParameters=config_overrides
ReturnToService=2
PropagateResourceLimits=NONE
# As on many clusters: jobs are requeued only if they ask for it.
JobRequeue=0
KillWait=20
# Fresh numbers each time: what an earlier cluster's jobs wrote can't be taken for a new one's.
FirstJobId={first_job}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Gres=gpu:2"
# Any device file may pose as a GPU.
GRES = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"


def missing() -> str:
    """Why no cluster can be had here; empty if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if not absent:
        return ""
    return f"no {', '.join(absent)} here: apt-get install {' '.join(PACKAGES)}"


class Cluster:
    """munged, slurmctld and one slurmd a node, with their files in ``folder``."""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 16) -> None:
        self.folder = folder
        # Names that resolve everywhere: the first node of a job is where its processes meet.
        self.nodes = [f"127.0.0.{number + 1}" for number in range(nodes)]
        self.cpus = cpus
        self.started: list[subprocess.Popen] = []
        self.env = {
            **os.environ,
            "PATH": PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
            # The machine's own name needn't lead anywhere, so gloo is told where to listen.
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def start(self) -> None:
        """Bring the cluster up and run something on every node."""
        self._configure()
        # munged wants its socket where everybody may look, and checks.
        munged = ["munged", "--foreground", f"--key-file={self.folder / 'munge.key'}"]
        for option, file in (("socket", "sock"), ("pid-file", "pid"), ("seed-file", "seed")):
            munged.append(f"--{option}={self.folder / f'munge.{file}'}")
        self._spawn([*munged, f"--log-file={self.folder / 'munge.log'}"])
        self._wait_for("munge", ["munge", "--no-input", f"--socket={self.folder / 'munge.sock'}"])
        self._spawn(["slurmctld", "-D", "-i"])
        for node in self.nodes:
            self._spawn(["slurmd", "-D", "-N", node])
        # A node reads "idle" before it has answered; a job that ran is the proof.
        self._wait_for("the controller", ["scontrol", "ping"])
        everywhere = ["srun", "--quiet", f"--nodes={len(self.nodes)}", "--chdir=/", "true"]
        self._wait_for("the nodes", everywhere)

    def _configure(self) -> None:
        for name in ("state", *(f"spool.{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host, ports = socket.gethostname().partition(".")[0], free_ports(len(self.nodes) + 1)
        nodes = [
            NODE.format(name=node, host=host, port=port, cpus=self.cpus)
            for node, port in zip(self.nodes, ports[1:], strict=True)
        ]
        conf = CONF.format(
            host=host,
            user=subprocess.check_output(["id", "-un"], text=True).strip(),
            ports=ports,
            folder=self.folder,
            first_job=int(time.time()) % 60_000_000 + 1,
            nodes="\n".join(nodes),
        )
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text(GRES)

    def _spawn(self, command: Sequence[str]) -> None:
        with open(self.folder / "daemons.log", "ab") as log:
            daemon = subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(daemon)

    def _wait_for(self, what: str, command: Sequence[str], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                answer = subprocess.run(
                    command, env=self.env, capture_output=True, text=True, timeout=seconds
                )
                if answer.returncode == 0:
                    return
                reason = answer.stderr
            except subprocess.TimeoutExpired:
                reason = f"no answer in {seconds:g} seconds"
            dead = [daemon.args for daemon in self.started if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                log = (self.folder / "daemons.log").read_text(errors="replace")[-3000:]
                self.stop()
                raise RuntimeError(f"{what} did not come up: {reason}{log}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Cancel all jobs and end the daemons."""
        if self.started and all(daemon.poll() is None for daemon in self.started):
            self.run("scancel", "--signal=KILL", "--full", "--state=RUNNING", check=False)
            self.run("scancel", "--state=PENDING", check=False)
            deadline = time.monotonic() + 20
            while self.run("squeue", "--noheader", check=False) and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self.started):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.started.clear()

    def run(self, *command: str, check: bool = True) -> str:
        """The output of one of SLURM's commands."""
        return subprocess.run(
            command, env=self.env, check=check, stdout=subprocess.PIPE, text=True, timeout=60
        ).stdout

    def show(self, job: str) -> dict[str, str]:
        """SLURM's account of a job: JobState, ExitCode, Restarts …"""
        pairs = self.run("scontrol", "show", "job", "-o", job).split()
        return dict(pair.partition("=")[::2] for pair in pairs)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _up(folder: Path) -> None:
    cluster = Cluster(folder)
    cluster.start()
    (folder / "pids").write_text("\n".join(str(daemon.pid) for daemon in cluster.started))
    print(f"up: {len(cluster.nodes)} nodes. To use it:")
    for name in ("PATH", "SLURM_CONF", "GLOO_SOCKET_IFNAME"):
        print(f"export {name}={cluster.env[name]}")


def _down(folder: Path) -> None:
    for pid in reversed((folder / "pids").read_text().split()):
        if _is_ours(pid, folder):
            os.kill(int(pid), signal.SIGTERM)
        while _is_ours(pid, folder):
            time.sleep(0.1)
    shutil.rmtree(folder)


def _is_ours(pid: str, folder: Path) -> bool:
    """Whether the process still runs; its number may belong to another one by now."""
    try:
        environment = Path("/proc", pid, "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"SLURM_CONF={folder / 'slurm.conf'}".encode() in environment


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("up", "down"):
        sys.exit("usage: python tests/slurm/cluster.py up|down FOLDER")
    if missing():
        sys.exit(missing())
    {"up": _up, "down": _down}[sys.argv[1]](Path(sys.argv[2]).absolute())

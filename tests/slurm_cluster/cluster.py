"""A real Slurm on one machine: munged, slurmctld and several slurmd under one folder, for the tests marked `slurm`.

Each node is a namespace of its own (network, host name, processes), so that its power can be cut and its cable pulled
without the rest of the world noticing anything but silence. Needs root and Debian's packages slurmctld, slurmd,
slurm-client and munge; `why_not()` says what is missing.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

HERE = Path(__file__).parent
PREFIX = "bdn"
NETWORK = "10.97.0"
BRIDGE = "bd3lm-br"
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "ip", "nsenter", "unshare")
DONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")

# PID 1 of a node: starts slurmd, waits, reaps orphans; killing it ends every process of the node at once
INIT = """
hostname "$1"; mount --bind "$2/etc/hosts" /etc/hosts
slurmd -D -N "$1" & daemon=$!
trap "kill -TERM $daemon" TERM
while kill -0 $daemon 2>/dev/null; do wait; done
"""


def why_not() -> str:
    """Empty where a cluster can be started, otherwise the reason."""
    if os.geteuid() != 0:
        return "a private Slurm needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found; use: apt-get install slurmctld slurmd slurm-client munge iproute2"
    if not Path("/sys/fs/cgroup").is_dir():
        return "/sys/fs/cgroup is not mounted, which slurmd needs"
    made = call("ip", "netns", "add", "bd3lm-probe")
    call("ip", "netns", "del", "bd3lm-probe")
    return "" if made.returncode == 0 else f"no network namespaces here: {made.stderr.strip()}"


def call(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def must(*command: str, **options) -> str:
    done = call(*command, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


class Cluster:
    """`with Cluster(folder, 4) as cluster:`; names of nodes: bdn1, bdn2, ..."""

    def __init__(self, folder: Path, num_nodes: int, cpus: int = 4, slurmd_timeout: int = 60) -> None:
        self.folder = folder
        self.nodes = [f"{PREFIX}{i}" for i in range(1, num_nodes + 1)]
        self.cpus = cpus
        self.slurmd_timeout = slurmd_timeout
        self.environment = os.environ | {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}
        self._inits: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    # --- jobs

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), cwd: Path, env: dict) -> str:
        """sbatch; the job's number."""
        command = ["sbatch", "--parsable", *options, script, *arguments]
        return must(*command, cwd=cwd, env=self.environment | env).strip()

    def slurm(self, *command: str) -> str:
        """Output of one of Slurm's commands."""
        return must(*command, env=self.environment)

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says about a job: JobState, Restarts, NodeList, ExitCode, BatchHost ..."""
        return dict(word.split("=", 1) for word in self.slurm("scontrol", "show", "job", number).split() if "=" in word)

    def wait(self, number: str, timeout: float) -> dict[str, str]:
        """The job's record once it has ended for good."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            record = self.job(number)
            if record["JobState"] in DONE:
                return record
            time.sleep(0.3)
        raise TimeoutError(f"job {number} still {self.job(number)['JobState']} after {timeout:.0f} s")

    def cancel_everything(self) -> None:
        """Leave no job to the next test."""
        self.slurm("scancel", "--user=root")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.slurm("squeue", "--noheader").strip():
            time.sleep(0.2)

    # --- faults

    def power_cut(self, node: str) -> None:
        """The node vanishes: the link first, so that no reset reaches the others, then every process."""
        self.unplug(node)
        self._inits[node].kill()
        self._inits[node].wait()

    def unplug(self, node: str) -> None:
        """The network cable is pulled; processes run on."""
        must("ip", "link", "set", f"bd-{node}", "down")

    def plug_in(self, node: str) -> None:
        """The cable is back."""
        must("ip", "link", "set", f"bd-{node}", "up")

    @contextmanager
    def without_controller(self) -> Iterator[None]:
        """slurmctld is down meanwhile, and comes back with what it knew."""
        pid = int((self.folder / "run" / "slurmctld.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        try:
            yield
        finally:
            must("slurmctld", env=self.environment)

    def signal_process(self, node: str, pid: int, name: str) -> None:
        """Send a signal to a process by its number inside the node."""
        (init,) = psutil.Process(self._inits[node].pid).children()
        must("nsenter", f"--target={init.pid}", "--pid", "kill", f"-{name}", str(pid))

    def boot(self, node: str) -> None:
        """Switch the node on (again)."""
        space, link, address = f"bd-{node}", f"bd-{node}", f"{NETWORK}.{node.removeprefix(PREFIX)}"
        self._shut_down(node)
        must("ip", "netns", "add", space)
        must("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        must("ip", "link", "set", link, "master", BRIDGE, "up")
        must("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        must("ip", "-n", space, "link", "set", "eth0", "up")
        must("ip", "-n", space, "link", "set", "lo", "up")
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        # nsenter, not `ip netns exec`: that mounts a bare /sys, without which slurmd dies
        unshare = ["unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        command = ["nsenter", f"--net=/run/netns/{space}", *unshare, "bash", "-c", INIT, "init", node, str(self.folder)]
        log = (self.folder / "log" / f"init-{node}").open("a")
        with log:
            self._inits[node] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def wait_for_idle(self, timeout: float = 30) -> None:
        """Until every node is idle."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            done = call(
                "sinfo", "--noheader", "--partition=main", "-N", "--states=idle", "-o", "%N %t", env=self.environment
            )
            if sum(line.split()[-1] == "idle" for line in done.stdout.splitlines()) == len(self.nodes):
                return
            time.sleep(0.1)
        raise TimeoutError(f"nodes not idle after {timeout:.0f} s:\n{self.slurm('sinfo', '-N', '-l')}")

    def repair(self) -> None:
        """All nodes on, plugged in and idle."""
        self.cancel_everything()
        for node in self.nodes:
            if self._inits[node].poll() is not None:
                self.boot(node)
            else:
                self.plug_in(node)
        self.wait_for_idle(60)

    def set_slurmd_timeout(self, seconds: int) -> None:
        """After how long a silent node counts as down; 300 s on real sites."""
        conf = self.folder / "etc" / "slurm.conf"
        conf.write_text(re.sub(r"SlurmdTimeout=\d+", f"SlurmdTimeout={seconds}", conf.read_text()))
        self.slurm("scontrol", "reconfigure")

    # --- start and stop

    def _start(self) -> None:
        for name in ("etc", "log", "run", "munge", "state"):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        self.folder.chmod(0o755)
        host = socket.gethostname().split(".")[0]
        self._write_configuration(host)
        munge = self.folder / "munge"
        key = self.folder / "etc" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        must(
            "munged", f"--key-file={key}", f"--socket={munge / 'munge.socket'}", f"--seed-file={munge / 'munged.seed'}",
            f"--pid-file={self.folder / 'run' / 'munged.pid'}", f"--log-file={self.folder / 'log' / 'munged.log'}",
            "--num-threads=2",
        )  # fmt: skip
        must("ip", "link", "add", BRIDGE, "type", "bridge")
        must("ip", "addr", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        must("ip", "link", "set", BRIDGE, "up")
        must("slurmctld", "-c", env=self.environment)
        for node in self.nodes:
            self.boot(node)
        self.wait_for_idle()

    def _write_configuration(self, host: str) -> None:
        words = {
            "HOST": host, "CONTROL_ADDRESS": f"{NETWORK}.254", "CONTROL_PORT": "16817", "DIR": str(self.folder),
            "SLURMD_TIMEOUT": str(self.slurmd_timeout),
        }  # fmt: skip
        text = (HERE / "slurm.conf").read_text()
        for word, value in words.items():
            text = text.replace(f"@{word}@", value)
        text += "SlurmdPort=16818\n"
        names = ["127.0.0.1 localhost", f"{NETWORK}.254 {host}"]
        for i, node in enumerate(self.nodes, start=1):
            text += f"NodeName={node} NodeAddr={NETWORK}.{i} CPUs={self.cpus} State=UNKNOWN\n"
            names.append(f"{NETWORK}.{i} {node}")
        every = f"Nodes={','.join(self.nodes)} MaxTime=INFINITE State=UP"
        text += f"PartitionName=main {every} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30\n"
        text += f"PartitionName=urgent {every} PriorityTier=10 PreemptMode=OFF\n"
        (self.folder / "etc" / "slurm.conf").write_text(text)
        (self.folder / "etc" / "hosts").write_text("\n".join(names) + "\n")

    def stop(self) -> None:
        """Take everything down that was started here, and nothing else."""
        if (self.folder / "run" / "slurmctld.pid").exists():
            call("scancel", "--user=root", env=self.environment)
        for node in self.nodes:
            self._shut_down(node)
        call("ip", "link", "del", BRIDGE)
        for name in ("slurmctld", "munged"):
            path = self.folder / "run" / f"{name}.pid"
            pid = path.read_text().strip() if path.exists() else ""
            # a stale pid file must never hit a stranger
            if pid and Path(f"/proc/{pid}/comm").exists() and Path(f"/proc/{pid}/comm").read_text().strip() == name:
                os.kill(int(pid), signal.SIGTERM)
                deadline = time.monotonic() + 10
                while path.exists() and time.monotonic() < deadline:  # both remove it when they are done
                    time.sleep(0.05)

    def _shut_down(self, node: str) -> None:
        init = self._inits.pop(node, None)
        if init is not None and init.poll() is None:
            init.kill()  # unshare --kill-child takes the whole node with it
            init.wait()
        call("ip", "link", "del", f"bd-{node}")
        call("ip", "netns", "del", f"bd-{node}")

"""A real SLURM on this machine: munged, slurmctld and one slurmd of the test's own, in a directory of their own."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from helpers import wait_until
from processes import free_port

__all__ = ["DAEMONS", "Slurm", "slurm_site"]

#: Debian's packages slurmctld, slurmd, slurm-client and munge.
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "squeue")

#: One node that claims more CPUs and memory than it has: jobs of a test are small.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs=32 RealMemory=65536
PartitionName=main Nodes={host} Default=YES State=UP
"""


def daemon(name: str) -> str | None:
    """Return where a program is; the daemons are in no user's path."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Slurm:
    """The daemons, and what a user does at a login node."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._daemons: list[subprocess.Popen[bytes]] = []
        (directory / "state").mkdir()
        (directory / "spool").mkdir()
        fields = {
            "directory": directory,
            "host": socket.gethostname().partition(".")[0],
            "user": getpass.getuser(),
            "controller_port": free_port(),
            "node_port": free_port(),
        }
        self.configuration = directory / "slurm.conf"
        self.configuration.write_text(CONFIGURATION.format(**fields))
        key = directory / "munge.key"
        key.write_bytes(secrets.token_bytes(64))
        key.chmod(0o600)
        #: What the commands of SLURM and the daemons need in their environment.
        self.environment = {"SLURM_CONF": str(self.configuration)}

    def start(self) -> None:
        """Start the daemons, and wait until the node takes jobs."""
        at = self.directory
        self._start(
            *("munged", "--foreground", "--force", "--key-file", f"{at}/munge.key", "--socket", f"{at}/munge.socket"),
            *("--pid-file", f"{at}/munged.pid", "--log-file", f"{at}/munged.log", "--seed-file", f"{at}/munge.seed"),
        )
        wait_until((at / "munge.socket").exists)
        self._start("slurmctld", "-D")
        self._start("slurmd", "-D")
        wait_until(lambda: self.run("sinfo", "--noheader", "--format=%T", check=False).strip() == "idle", timeout=30)

    def run(self, *command: str, check: bool = True) -> str:
        """Return what a command of SLURM prints."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def jobs(self, name: str | None = None) -> dict[str, str]:
        """Return the states of the jobs in the queue (each member of an array) by id."""
        only = [] if name is None else [f"--name={name}"]
        lines = self.run("squeue", "--noheader", "--array", "--format=%i %T", *only).splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}

    def close(self) -> None:
        """Kill what runs, and end the daemons."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            for job in self.jobs():
                self.run("scancel", "--signal=KILL", "--full", job, check=False)
                self.run("scancel", job, check=False)
            wait_until(lambda: not self.jobs(), timeout=30)
        for process in reversed(self._daemons):
            process.terminate()
        for process in reversed(self._daemons):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()
            process.wait()

    def _start(self, name: str, *arguments: str) -> None:
        with (self.directory / f"{name}.out").open("wb") as out:
            process = subprocess.Popen(
                [str(daemon(name)), *arguments],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._daemons.append(process)


@contextlib.contextmanager
def slurm_site() -> Iterator[Slurm]:
    """Start SLURM, and end it with all of its jobs."""
    # Not in pytest's directory: the socket's path has a limit of 107 characters.
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    directory.chmod(0o755)
    site = Slurm(directory)
    try:
        site.start()
        yield site
    finally:
        site.close()
        shutil.rmtree(directory, ignore_errors=True)

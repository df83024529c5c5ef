"""Which process of how many this is: torchrun's variables, or those of a scheduler that started the processes."""

from __future__ import annotations

import os
import re

from megamug.errors import UserError

PORTS = range(20000, 30000)  # a job's port under SLURM, by its number


def world_size() -> int:
    """Processes of this run, from WORLD_SIZE as torchrun sets it; one without. Raises UserError for nonsense."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"WORLD_SIZE is {text!r}, not a number of processes; start with torchrun, or unset WORLD_SIZE")
    rank = os.environ.get("RANK")
    if rank is None and int(text) > 1:
        raise UserError(f"WORLD_SIZE is {text} but RANK is not set; start with torchrun, or unset WORLD_SIZE")
    if rank is not None and not (rank.isdecimal() and int(rank) < int(text)):
        raise UserError(f"RANK is {rank!r} but WORLD_SIZE is {text}; start with torchrun, or unset RANK and WORLD_SIZE")
    return int(text)


def rank() -> int:
    """Which of the processes this one is, before any process group exists; `world_size` has looked at it."""
    return int(os.environ.get("RANK", 0))


def check_address() -> None:
    """Where the processes of a launcher meet is known. Raises UserError where it is not. Before they meet."""
    if "RANK" not in os.environ:
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"RANK is set but {name} is not; start with torchrun, set {name}, or unset RANK and"
                            f" WORLD_SIZE for one process")  # fmt: skip
    port = os.environ["MASTER_PORT"]
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"MASTER_PORT is {port!r}, not a port; start with torchrun, or set it to a free one")


def adopt() -> None:
    """Takes over the processes that srun started without torchrun: sets RANK, WORLD_SIZE, LOCAL_RANK and the address.

    Changes nothing where RANK is set, or where there is one process. Raises UserError where several processes are
    meant (by SLURM or MPI) and it is not plain which this one is: each would train alone, in the same folder.
    """
    environment = os.environ
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return
    if (count := environment.get("OMPI_COMM_WORLD_SIZE", "1")) != "1":
        raise UserError(
            f"OMPI_COMM_WORLD_SIZE is {count} but RANK is not set: mpirun started {count} processes that do not know of"
            " one another; start with torchrun or srun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"
        )
    if environment.get("SLURM_NTASKS", "1") == "1" and environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    wanted = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    if missing := [name for name in wanted if not environment.get(name)]:
        raise UserError(
            f"SLURM_NTASKS is {environment.get('SLURM_NTASKS')} but this process was not started by srun ({missing[0]}"
            " is not set): it would train alone; start with srun (examples/cluster/slurm.sh) or torchrun, or unset"
            " SLURM_NTASKS for one process"
        )
    if environment["SLURM_STEP_NUM_TASKS"] == "1":
        return
    environment.update(
        RANK=environment["SLURM_PROCID"], WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
        MASTER_ADDR=environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        MASTER_PORT=environment.get("MASTER_PORT") or str(PORTS[int(environment["SLURM_JOB_ID"]) % len(PORTS)]),
    )  # fmt: skip
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 8(x2),4: not the same everywhere
    if match := re.fullmatch(r"(\d+)(\(x\d+\))?", tasks):
        environment["LOCAL_WORLD_SIZE"] = match[1]


def first_host(nodes: str) -> str:
    """The first host of SLURM's compressed list: `a[003-005,9],b` -> `a003`."""
    match = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^\[,]*)", nodes)
    return match[1] + (match[2] or "") + match[3]

"""Processes and groups: from the environment that torchrun sets to Megatron's tensor, pipeline and data groups."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megamug.command_line import launcher
from megamug.configuration.sections import ParallelConfig
from megamug.distributed import cpu_backend


@dataclass(frozen=True)
class World:
    """This process's place. Sizes and ranks of the tensor (tp), pipeline (pp) and data (dp) groups."""

    rank: int
    size: int
    device: torch.device
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    reason: str  # why this device and backend

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def tp_group(self) -> dist.ProcessGroup:
        from megatron.core import parallel_state

        return parallel_state.get_tensor_model_parallel_group()

    @property
    def pp_group(self) -> dist.ProcessGroup:
        from megatron.core import parallel_state

        return parallel_state.get_pipeline_model_parallel_group()

    @property
    def dp_group(self) -> dist.ProcessGroup:
        from megatron.core import parallel_state

        return parallel_state.get_data_parallel_group()


def start(parallel: ParallelConfig, seed: int, embedding_stages: list[int] | None = None) -> World:
    """Joins the process group and builds Megatron's groups.

    One process needs no launcher; several are started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ...).
    `embedding_stages` are the pipeline stages, virtual ones counted, that hold a copy of a tied vocabulary weight
    (`[k]` or `[k, last]`).
    """
    rank, size = launcher.rank(), launcher.world_size()
    timeout = timedelta(minutes=parallel.timeout_minutes)
    if cpu_backend.apply():
        device, backend, reason = torch.device("cpu"), "gloo", "no CUDA device: CPU tensors over gloo"
    else:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
        reason = f"{torch.cuda.get_device_name(device)} over NCCL"
    if not dist.is_initialized():
        store = meeting_store(rank, size, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)

    try:
        return _join(parallel, seed, embedding_stages, rank, size, device, reason)
    except BaseException:
        stop()
        raise


def meeting_store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Where the processes meet. Without a launcher no address and no port is needed. Raises UserError where there is a
    launcher that says no address."""
    if "RANK" not in os.environ:
        return dist.HashStore()
    launcher.check_address()
    # torchrun keeps one store for all of a job's starts: what a start that failed left in it must not meet the next.
    # Elsewhere rank 0 keeps it, and each start has a new one.
    torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=rank == 0 and not torchruns,
        timeout=timeout, multi_tenant=True,
    )  # fmt: skip
    return dist.PrefixStore(f"megamug/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _join(
    parallel: ParallelConfig, seed: int, embedding_stages: list[int] | None, rank: int, size: int,
    device: torch.device, reason: str,
) -> World:  # fmt: skip
    """Builds Megatron's groups inside the process group."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        distributed_timeout_minutes=int(max(1, parallel.timeout_minutes)),
        create_gloo_process_groups=False,
        get_embedding_ranks=_ranks_of(embedding_stages),
    )
    # No module of ours draws from these; Megatron's regions require that they exist.
    # Under CUDA graphs Transformer Engine's own are wanted: the others are read back by the host.
    graphed = parallel.cuda_graphs is not False and torch.cuda.is_available()
    theirs = graphed and importlib.util.find_spec("transformer_engine") is not None
    tensor_parallel.model_parallel_cuda_manual_seed(seed, te_rng_tracker=theirs)
    return World(
        rank=rank, size=size, device=device, reason=reason,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(), tp_size=parallel.tensor,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(), pp_size=parallel.pipeline,
        dp_rank=parallel_state.get_data_parallel_rank(), dp_size=parallel_state.get_data_parallel_world_size(),
    )


def _ranks_of(stages: list[int] | None) -> Callable:
    def embedding_ranks(pp_ranks, *_):
        return sorted({pp_ranks[stage % len(pp_ranks)] for stage in stages or [0]})

    return embedding_ranks


def stop() -> None:
    """Leaves all groups. Safe to call twice."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

"""Parameters that should be the same on several ranks are, or the run ends with the names of those that differ.

A bit that flips in one replica's memory, or a step that one replica skips alone, makes it train another model without
a word: gradients are averaged, parameters are not.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megamug.checkpoint.fp8_parameters import is_fp8


class ReplicasDiffer(RuntimeError):
    """Ranks that should hold the same parameters do not."""


@torch.no_grad()
def checksum(parameters: list[Tensor]) -> Tensor:
    """int64 scalar: a sum over the bits of all parameters that any single change of a bit changes, on their device."""
    device = parameters[0].device if parameters else "cpu"
    total = torch.zeros((), dtype=torch.int64, device=device)
    for number, parameter in enumerate(parameters, start=1):
        values = parameter.dequantize() if is_fp8(parameter) else parameter.detach()
        bits = values.reshape(-1).view({4: torch.int32, 2: torch.int16, 8: torch.int64}[values.element_size()])
        total += (2 * number + 1) * bits.sum(dtype=torch.int64)  # odd: no bit is multiplied away modulo 2**64
    return total


def compare(chunks: list[torch.nn.Module], world, step: int) -> None:
    """A collective of all ranks. Raises ReplicasDiffer on all of them where data-parallel replicas differ, or
    tensor-parallel ranks in what each holds whole (norms, biases of rows, positions)."""
    if world.size == 1:
        return
    everything = [p for chunk in chunks for p in chunk.parameters()]
    whole = [p for p in everything if not getattr(p, "tensor_model_parallel", False)]
    place = torch.tensor([world.tp_rank, world.pp_rank, world.dp_rank], dtype=torch.int64, device=world.device)
    own = torch.cat([place, torch.stack([checksum(everything), checksum(whole)]).to(world.device)])
    rows = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(rows, own)
    told = differences([row.tolist() for row in rows])
    if told:
        raise ReplicasDiffer(
            f"after step {step} {told}; the machine of that rank may be faulty. Start again to go on from the newest"
            " checkpoint, made before; if that differs too, go back further by checkpoint.go_back_to=STEP"
        )


def differences(rows: list[list[int]]) -> str:
    """Which ranks differ, in words; "" where none does. `rows` by rank: [tp, pp, dp, checksum of all, of the whole]."""
    for what, alike, column in (
        ("parameters", lambda row: (row[0], row[1]), 3),  # over data-parallel ranks
        ("unsplit parameters", lambda row: (row[1], row[2]), 4),  # over tensor-parallel ranks
    ):
        groups: dict[tuple, list[int]] = {}
        for rank, row in enumerate(rows):
            groups.setdefault(alike(row), []).append(rank)
        for ranks in groups.values():
            sums = {rank: rows[rank][column] for rank in ranks}
            if len(set(sums.values())) > 1:
                return _in_words(what, sums)
    return ""


def _in_words(what: str, sums: dict[int, int]) -> str:
    values = list(sums.values())
    most = max(values, key=values.count)
    odd = [rank for rank, value in sums.items() if value != most]
    if values.count(most) * 2 > len(values):
        return f"the {what} of rank {', '.join(map(str, odd))} differ from those of {values.count(most)} other ranks"
    return f"the {what} of ranks {', '.join(map(str, sums))} differ from one another"

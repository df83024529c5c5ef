"""Trains a tiny model for some steps under one layout after another; a JSON line for each: losses and gradient norms.

    python layout_worker.py '[{"parallel": {...}, "model": {...}, "steps": 10, "save": DIR, "load": DIR, ...}, ...]'

Options beside the sections of the configuration:

    case         module with `tiny(options) -> Config`, `make_task(config)` and
                 `micro_batches(step, plan, config, world) -> (batches, totals)`; default: mug_case
    steps, first steps first + 1 .. steps are done (10, 0)
    load, save   checkpoint folders (tensors alone)
    gradients    FILE: the first step's gradient of every parameter by global name, before clipping
    freeze       regular expression: parameters whose global name it finds stay as they are
    validate     the losses of a forward pass at the end, by averages of the weights where there are some
    copies       compare the copies of a tied vocabulary weight
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import re
import sys
from pathlib import Path

import torch

from megamug.distributed import setup
from tests.distributed.cases.mug_case import micro_batches, sample, tiny

__all__ = ["micro_batches", "sample", "tiny"]  # other tests take these from here


def gather_gradients(chunks: list, optimizer, world) -> dict[str, torch.Tensor]:
    """Global name -> whole gradient, put together from all ranks' parts."""
    from megamug.checkpoint.state import entries_of

    gradients = {p.data_ptr(): p.main_grad for chunk in chunks for p in chunk.parameters() if p.requires_grad}
    if optimizer.distributed:
        spans = {state.parameter.data_ptr(): state.span for state in optimizer.main_states()}
        gradients = {where: own_part(whole, spans.get(where, (0, 0))) for where, whole in gradients.items()}
    mine = []
    for entry in entries_of(chunks):
        gradient = gradients.get(entry.data.data_ptr())
        if gradient is None:
            continue
        if hasattr(entry, "build_fn"):  # a factory: one parameter stored in parts
            parts = entry.build_fn(entry.key, gradient, entry.replica_id, None)
            parts = list(parts.values()) if isinstance(parts, dict) else parts
        else:
            parts = [dataclasses.replace(entry, data=gradient.view(entry.local_shape), dtype=gradient.dtype)]
        mine += [(part.key, part.global_shape, part.global_offset, part.data.cpu().clone()) for part in parts]
    everyone = [None] * world.size
    torch.distributed.all_gather_object(everyone, mine)
    whole: dict[str, torch.Tensor] = {}
    for key, shape, offset, part in (item for items in everyone for item in items):
        target = whole.setdefault(key, torch.full(shape, torch.nan))
        target = target[tuple(slice(o, o + s) for o, s in zip(offset, part.shape, strict=True))]
        target.copy_(torch.where(part.isnan(), target, part))
    return whole


def own_part(gradient: torch.Tensor, span: tuple[int, int]) -> torch.Tensor:
    """NaN outside of `span` of the flattened gradient: the distributed optimizer scatters the sums over the
    data-parallel ranks, so a rank's buffer holds them in its own shard, and what it computed by itself in the others'.
    """
    own = torch.full_like(gradient, torch.nan)
    own.view(-1)[slice(*span)] = gradient.view(-1)[slice(*span)]
    return own


def copies_equal(chunks: list, world) -> list[bool]:
    """Of each rank: are its copies of the tied vocabulary weight the same as the first one found?"""
    mine = [chunk.tied_weight().detach().clone() for chunk in chunks if chunk.tied_weight() is not None]
    weights = [None] * world.size
    torch.distributed.all_gather_object(weights, mine)
    first = next(weight for rank in weights for weight in rank)
    return [all(torch.equal(weight, first) for weight in rank) for rank in weights]


def on_device(found, device: torch.device):
    """Micro-batches, or whatever holds tensors, on `device`."""
    if torch.is_tensor(found):
        return found.to(device)
    if dataclasses.is_dataclass(found):
        fields = {f.name: on_device(getattr(found, f.name), device) for f in dataclasses.fields(found)}
        return dataclasses.replace(found, **fields)
    return [on_device(one, device) for one in found] if isinstance(found, list) else found


def freeze(chunks: list, pattern: str) -> None:
    from megamug.checkpoint.state import entries_of

    names = {entry.data.data_ptr(): entry.key for entry in entries_of(chunks)}
    for chunk in chunks:
        for parameter in chunk.parameters():
            if re.search(pattern, names[parameter.data_ptr()]):
                parameter.requires_grad_(False)


def main() -> None:
    options = json.loads(sys.argv[1])
    for one in options if isinstance(options, list) else [options]:
        run(one)
        leave_groups()
    setup.stop()


def leave_groups() -> None:
    """Ends the groups of a layout. Megatron does no more than forget them, and gloo's have threads that poll: those of
    a dozen layouts would take more time than the layouts do."""
    from megatron.core import parallel_state

    made = parallel_state._global_process_group_list
    groups = {id(group): group for group in made if isinstance(group, torch.distributed.ProcessGroup)}
    parallel_state.destroy_model_parallel()
    for group in groups.values():
        torch.distributed.destroy_process_group(group)
    del made, groups
    gc.collect()  # the last references are in cycles of the model's


def run(options: dict) -> dict:
    """The result of one layout's training, which it prints as well."""
    case = importlib.import_module(options.get("case", "tests.distributed.cases.mug_case"))
    config = case.tiny(options)
    from megamug.distributed import cpu_backend

    cpu_backend.apply()
    from megamug.checkpoint import state
    from megamug.training.optim import Optimizer, wrap_chunks
    from megamug.training.pipeline import reduce_losses, run_batch
    from megamug.training.step_graph import step_runner
    from megamug.training.updates import averages

    task = case.make_task(config)
    plan, names = task.plan, task.loss_names
    world = setup.start(config.parallel, config.seed, plan.vocabulary_stages)
    task.join(world)
    chunks = task.build(world)
    if options.get("freeze"):
        freeze(chunks, options["freeze"])
    models = wrap_chunks(chunks, config)
    optimizer = Optimizer(config, models)
    runner, first = step_runner(config, models, world), options.get("first", 0)
    if options.get("load"):
        state.load_tensors(chunks, optimizer, world, Path(options["load"]), step=first)
    records = []
    for step in range(first, options.get("steps", 10)):
        batches, totals = case.micro_batches(step, plan, config, world)
        optimizer.zero_grad()
        sums = runner.run(on_device(batches, world.device), totals, loader=None)
        losses = {k: v.item() for k, v in reduce_losses(sums, names, world).items()}
        if options.get("gradients") and step == first:
            gradients = gather_gradients(chunks, optimizer, world)
            if world.is_first:
                torch.save(gradients, options["gradients"])
        norm, _ = optimizer.prepare(step + 1)
        optimizer.apply(norm)
        records.append([*(losses[n] / losses[f"{n}_count"] for n in names), float(norm)])
    validation = None
    if options.get("validate"):
        batches, _ = case.micro_batches(1000, plan, config, world)
        with averages.in_place(chunks, optimizer, world), torch.no_grad():
            ones = dict.fromkeys(plan.loss_weights, 1.0)
            sums = run_batch(models, on_device(batches, world.device), ones, backward=False)
        validation = {k: v.item() for k, v in reduce_losses(sums, names, world).items()}
    if options.get("save"):
        folder = Path(options["save"])
        folder.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        state.save_tensors(state.sharded_state(chunks, optimizer, world), folder)
    starts = [plan.blocks[run[0]] for run in plan.stages]
    blocks = [f"{block.part}.{block.name}.{block.index}" for block in starts]
    result = {"records": records, "stage_starts": blocks, "vocabulary": plan.vocabulary_stages}
    if validation is not None:
        result["validation"] = validation
    if options.get("copies"):
        result["copies_equal"] = copies_equal(chunks, world)
    print("RESULT " + json.dumps(result))
    return result


if __name__ == "__main__":
    main()

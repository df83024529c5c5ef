"""The one place that knows which task belongs to which `model.kind`.

A task is what the trainer, the tools that read runs and the tests know of a model:

    task = make_task(config)                  # needs no process group; task.plan: sizes, blocks, stages, loss weights
    world = setup.start(config.parallel, config.seed, task.plan.vocabulary_stages)
    task.join(world)
    chunks = task.build(world)                # this rank's part of the model, a list of `parallel.virtual` modules
    loader = task.loader(world, train=True)
    batches = [task.batch(micro_batch) for micro_batch in loader.next().micro_batches]

A chunk has `config` (what Megatron's schedules read), `plan`, `incoming` and `outgoing` (`stages.Boundary` or None),
`set_input_tensor`, `tied_weight()` (the vocabulary matrix where another stage holds a copy of it, else None),
`share_embeddings_and_output_weights = False`, a `sharded_state_dict` with global names, and
`forward(batch) -> (packed tensor for the next stage or None, {loss name: (sum, count)})`.
"""

from __future__ import annotations

from megamug.configuration.sections import Config
from megamug.models.task import Task


def task_type(kind: str) -> type[Task]:
    """The task of a `model.kind`; its `plan_type` and `model` are the classes of plan and chunk."""
    if kind == "mug":
        from megamug.models.mug.task import MugTask

        return MugTask
    if kind == "decoder_lm":
        from megamug.models.language.task import LmTask

        return LmTask
    if kind == "classifier":
        from megamug.models.classifier.task import ClassifierTask

        return ClassifierTask
    if kind == "segmenter":
        from megamug.models.segmenter.task import SegmenterTask

        return SegmenterTask
    assert kind == "jam_cross", kind
    from megamug.models.jam.task import JamTask

    return JamTask


def model_of(kind: str) -> tuple[type, type]:
    """Classes of plan and chunk of a `model.kind`: `model(plan(config, vocabulary), stage)`."""
    task = task_type(kind)
    return task.plan_type, task.model


def make_task(config: Config) -> Task:
    """The task of `config` (resolved, validated). Raises UserError where its tokenizer or vocabulary cannot be read."""
    return task_type(config.model.kind)(config)

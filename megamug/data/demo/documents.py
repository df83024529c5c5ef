"""Documents about the demo's scenes: text alone, and instructions with a picture after each step.

The texts share their words with the captions but say more: what follows from a relation, which of two things is larger,
how many things, holes and arms there are, which colours mix to which. Who knows the rules can finish them; who has read
captions alone cannot. An instruction asks for a scene and one change of it; the response tells and shows both steps.
A document is a pure function of (seed, split, its number).
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from megamug.data.demo.scenes import COLOURS, RADII, SHAPES, Scene, claim_folder, compose, render
from megamug.data.random import uniform
from megamug.data.shards.tar_writer import write_members
from megamug.data.tooling import Progress, default_processes, parallel_map
from megamug.errors import UserError

DOCUMENTS_PER_SHARD = {"text": 5000, "instructions": 500}
NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()
PARTS = {"circle": (0, "hole"), "ring": (1, "hole"), "cross": (4, "arm")}
MIXTURES = {("red", "yellow"): "orange", ("yellow", "blue"): "green", ("red", "blue"): "purple"}
_LAYOUT, _CHOICES = 48, 32  # random numbers for a scene, and for what is said
_CLOUDS = 7


def _plural(count: int, noun: str) -> str:
    return f"{NUMBERS[count]} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


def _relations(scene: Scene, numbers: Iterator[float]) -> str:
    first, second = scene.first, scene.second
    if scene.dark:  # the caption begins with the second thing: say the other direction
        one, way, other = first, "left of" if scene.horizontal else "above", second
    else:
        one, way, other = second, "to the right of" if scene.horizontal else "under", first
    text = f"{scene.caption()}, so the {one.words()} is {way} the {other.words()}"
    if first.size == second.size:
        return f"{text}. both are {first.size}"
    large, small = (first, second) if first.size == "large" else (second, first)
    return f"{text}. the {large.colour} {large.shape} is larger than the {small.colour} {small.shape}"


def _counting(scene: Scene, numbers: Iterator[float]) -> str:
    a, b = 1 + int(next(numbers) * 5), 1 + int(next(numbers) * 5)
    one, other = scene.first, scene.second
    text = f"there {'is' if a == 1 else 'are'} {_plural(a, f'{one.colour} {one.shape}')}"
    text += f" and {_plural(b, f'{other.colour} {other.shape}')}, so there are {NUMBERS[a + b]} shapes"
    if a == b:
        return f"{text}. there are as many {one.colour} as {other.colour} shapes"
    return f"{text}. there are more {one.colour if a > b else other.colour} shapes"


def _parts(scene: Scene, numbers: Iterator[float]) -> str:
    count, shape = 1 + int(next(numbers) * 3), scene.first.shape
    each, part = PARTS[shape]
    total = _plural(count * each, part)
    return f"a {shape} has {_plural(each, part)}, so {_plural(count, shape)} {'has' if count == 1 else 'have'} {total}"


def _mixing(scene: Scene, numbers: Iterator[float]) -> str:
    (one, other), mixed = list(MIXTURES.items())[int(next(numbers) * len(MIXTURES))]
    if next(numbers) < 0.5:
        one, other = other, one
    shape = scene.second.shape
    article = "an" if mixed == "orange" else "a"
    return f"{one} and {other} make {mixed}, so a {one} {shape} painted {other} is {article} {mixed} {shape}"


def _growing(scene: Scene, numbers: Iterator[float]) -> str:
    thing = scene.first
    turned = next(size for size in RADII if size != thing.size)
    verb = "grows" if turned == "large" else "shrinks"
    return f"a {thing.words()} {verb}. now it is a {turned} {thing.colour} {thing.shape}"


_PARAGRAPHS = (_relations, _counting, _parts, _mixing, _growing)


def text_document(layout: np.ndarray, choices: np.ndarray) -> str:
    """Two to four paragraphs about one scene. `layout`: the scene's numbers; `choices`: uniform [_CHOICES]."""
    scene, numbers = compose(layout), iter(choices.tolist())
    order = sorted(_PARAGRAPHS, key=lambda _: next(numbers))
    count = 2 + int(next(numbers) * 3)
    return ". ".join(paragraph(scene, numbers) for paragraph in order[:count]) + "."


def instruction_document(layout: np.ndarray, choices: np.ndarray, tidy: bool = False) -> tuple[list[dict], list[Scene]]:
    """(segments, the scenes that its images show): a scene, and then one of its things in another colour or shape."""
    scene, numbers = compose(layout, tidy), iter(choices.tolist())
    first = next(numbers) < 0.5
    thing = scene.first if first else scene.second
    if next(numbers) < 0.5:
        taken = (scene.first.colour, scene.second.colour)
        free = [colour for colour in COLOURS if colour not in taken]
        turned = replace(thing, colour=free[int(next(numbers) * len(free))])
        what = turned.colour
    else:
        free = [shape for shape in SHAPES if shape != thing.shape]
        turned = replace(thing, shape=free[int(next(numbers) * len(free))])
        what = f"into a {turned.shape}"
    after = replace(scene, first=turned) if first else replace(scene, second=turned)
    step = f"turn the {thing.colour} {thing.shape} {what}"
    segments = [
        {"text": f"draw this: {scene.caption()}. then {step}.", "role": "prompt"},
        {"text": f"first, {scene.caption()}.", "role": "response"},
        {"image": "0.jpg", "role": "response"},
        {"text": f"then, {after.caption()}.", "role": "response"},
        {"image": "1.jpg", "role": "response"},
    ]
    return segments, [scene, after]


@dataclass(frozen=True)
class _Job:
    path: Path
    kind: str
    split: str
    start: int
    count: int


@dataclass(frozen=True)
class DemoDocuments:
    text: int = 20000
    instructions: int = 2000
    heldout: int = 256  # of each kind
    seed: int = 1
    size: int = 72  # pixels a side
    tidy: bool = False  # see `demo.compose`
    version: int = 3


def _members(job: _Job, seed: int, size: int, tidy: bool) -> Iterator[tuple[str, bytes]]:
    numbers = np.arange(job.start, job.start + job.count)
    stream = f"demo documents/{job.kind}/{job.split}"
    layouts = uniform(seed, f"{stream}/scene", 0, numbers, _LAYOUT)
    choices = uniform(seed, f"{stream}/choices", 0, numbers, _CHOICES)
    clouds = uniform(seed, f"{stream}/clouds", 0, numbers, _CLOUDS * _CLOUDS).reshape(-1, _CLOUDS, _CLOUDS)
    for number, layout, choice, cells in zip(numbers, layouts, choices, clouds, strict=True):
        key = f"{number:08d}"
        if job.kind == "text":
            yield f"{key}.txt", text_document(layout, choice).encode()
            continue
        segments, shown = instruction_document(layout, choice, tidy)
        yield f"{key}.json", json.dumps({"segments": segments}).encode()
        for i, scene in enumerate(shown):
            buffer = io.BytesIO()
            Image.fromarray(render(scene, layout, cells, size)).save(buffer, "JPEG", quality=92, subsampling=0)
            yield f"{key}.{i}.jpg", buffer.getvalue()


def _make_shard(job: _Job, seed: int, size: int, tidy: bool) -> None:
    write_members(job.path, _members(job, seed, size, tidy))


def make_demo_documents(output: str | Path, parameters: DemoDocuments, processes: int | None = None) -> list[Path]:
    """Write `output/{text,instructions}/{train,heldout}/*.tar`; returns their paths. Same parameters, same bytes.

    A call that was interrupted is continued by the next one. Raises `UserError` where `output` holds anything else.
    """
    output = Path(output)
    if min(parameters.text, parameters.instructions, parameters.heldout) < 1 or parameters.size < 32:
        raise UserError(f"{parameters}: a document or more of each kind, and pictures at least 32 pixels")
    claim_folder(output, "demo_documents.json", parameters)
    jobs = []
    for kind, total in (("text", parameters.text), ("instructions", parameters.instructions)):
        for split, count in (("train", total), ("heldout", parameters.heldout)):
            step = DOCUMENTS_PER_SHARD[kind]
            for start in range(0, count, step):
                path = output / kind / split / f"{kind}-{start // step:06d}.tar"
                jobs.append(_Job(path, kind, split, start, min(step, count - start)))
    missing = [job for job in jobs if not job.path.exists()]
    progress = Progress("documents", sum(job.count for job in missing))
    work = functools.partial(_make_shard, seed=parameters.seed, size=parameters.size, tidy=parameters.tidy)
    for job, _ in parallel_map(work, missing, processes or default_processes()):
        progress.update(job.count)
    return [job.path for job in jobs]

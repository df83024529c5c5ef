"""A whole trained model in Python: a MUG that captions and repaints pictures, a language model that writes documents.

    model = megamug.load("runs/vit_s16")
    model.caption(["cat.jpg"])

What `megamug generate` does, without a folder: the same tokens and pixels. One process.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from megamug.command_line import console
from megamug.command_line.launcher import world_size
from megamug.data.documents.vocabulary import Vocabulary
from megamug.data.pairs.images import centre_squares
from megamug.distributed import setup
from megamug.errors import UserError
from megamug.generation import documents, options

if TYPE_CHECKING:
    from PIL.Image import Image

    from megamug.generation.loading import LoadedRun
    from megamug.transfer.encoder import VisionEncoder

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # as precision.dtype calls them


def load(
    path: str | Path, *, step: int | None = None, dtype: torch.dtype | None = None
) -> LoadedMug | LoadedLanguageModel:
    """The model of a run folder (its newest complete checkpoint, or that of `step`) or of a checkpoint
    `step-XXXXXXXX` in one, in evaluation mode, on the GPU where there is one.

    `dtype`: torch.float32 or torch.bfloat16 to compute in, default: the run's. Every byte is checked first. No process
    group is left behind, and torch's random states are as before.

    Raises UserError: no run there, no complete checkpoint or a damaged one, a model that writes nothing, a process of
    several, a process group that is running.
    """
    from megamug.generation.loading import load_run, read_config

    path = Path(path)
    if path.parent.name == "checkpoints" and path.name.removeprefix("step-").isdigit():
        if step is not None:
            raise UserError(f"step: {path} is a checkpoint already; name the run folder, or leave step out")
        path, step = path.parent.parent, int(path.name.removeprefix("step-"))
    if not path.exists():
        raise UserError(f"{path}: no such folder (looked in {Path.cwd()}); give the folder of a run")
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is not a run folder: it has no config.yaml; give run_dir of the configuration"
                        " (encoders that were exported are read by megamug.load_encoder)")  # fmt: skip
    kind = read_config(path).model.kind
    if kind != "mug" and kind not in documents.WRITERS:
        raise UserError(f"{path} is a run of model.kind={kind}, which writes nothing; measure it by megamug evaluate")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype is {dtype}; it must be torch.float32 or torch.bfloat16")
    if world_size() > 1:
        raise UserError(f"WORLD_SIZE is {world_size()}, and megamug.load is of one process; start it without torchrun")
    if dist.is_available() and dist.is_initialized():
        raise UserError("this process has a process group, and models are loaded without one; load before it is made")
    with console.own(), _states_kept():
        with load_run(path, step, dtype=None if dtype is None else DTYPES[dtype]) as run:
            run.model.requires_grad_(False)
    return (LoadedMug if kind == "mug" else LoadedLanguageModel)(run, path)


class _Loaded:
    """What both kinds have."""

    def __init__(self, run: LoadedRun, path: Path) -> None:
        self._run, self._path = run, path
        self.config, self.module = run.config, run.model
        self.step, self.checkpoint, self.device = run.step, run.checkpoint, run.world.device

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.module.parameters())
        which = f"{str(self._path)!r}, step={self.step}, parameters={count:,}, device={self.device}"
        return f"{type(self).__name__}({which})"

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Megatron's layers want a process group, also where each of theirs is of one process: inside there is one.
        Where the caller has one it is left alone, as the layers keep their own."""
        if dist.is_initialized():
            yield
            return
        with console.own(), _states_kept():
            setup.start(self.config.parallel, self.config.seed, self._run.task.plan.vocabulary_stages)
            try:
                yield
            finally:
                setup.stop()


class LoadedMug(_Loaded):
    """A MUG. `config`, `step`, `checkpoint`, `device` say which; `module` is the model as it is trained.

    Images are paths, bytes of files, Pillow images or uint8 tensors [3, H, W]; the centred square of each is seen.
    """

    def caption(
        self, images, *, mask_ratio: float = 0.0, top_p: float | None = None, temperature: float = 1.0,
        seed: int | None = None,
    ) -> list[str]:  # fmt: skip
        """A caption of each image: the likeliest tokens, or drawn from the top `top_p` of the probability.

        `mask_ratio`: share of hidden patches. `seed`: of what is drawn (default: the run's); an image's draws depend on
        it and on the image's place in `images`. Raises UserError: a run without captions, values out of range, an image
        that cannot be read.
        """
        from megamug.generation.images import batches, captions_of

        if not self._run.task.plan.writes:
            raise UserError(f"{self._path} was trained with model.caption_loss_weight=0, so it has no text decoder and"
                            " writes no captions")  # fmt: skip
        if self._run.task.plan.masked_text:
            raise UserError(f"{self._path} was trained with model.text_objective=masked: its text decoder fills in"
                            " hidden words of a caption and writes none; measure it by megamug evaluate --task"
                            " masked_text")  # fmt: skip
        options.check("mug", {"top_p": top_p, "temperature": temperature, "seed": seed}, str)
        if top_p is None and temperature != 1.0:
            raise UserError(f"temperature is {temperature:g} but nothing is drawn at random; give top_p as well")
        files, regions, visible = self._prepared(images, mask_ratio)
        seed = self.config.seed if seed is None else seed
        texts: list[str] = []
        with self._running():
            for numbers, batch in batches(self._run, files, regions, visible):
                texts += captions_of(self._run, batch, numbers, top_p, temperature, seed)
        return texts

    def reconstruct(self, images, *, mask_ratio: float | None = None) -> list[Image]:
        """Each image's centred square, S x S pixels, with `mask_ratio` of its patches (default: the run's) hidden and
        painted by the model.

        Which are hidden depends on the run's seed and on the image's place in `images`. A run with
        `model.norm_pix_loss` paints in units of the hidden patches' own mean and deviation, which are taken from them.
        Raises UserError: a run that paints nothing, a ratio out of range, an image that cannot be read.
        """
        from PIL import Image

        from megamug.generation.images import batches
        from megamug.generation.pictures import repainted

        if not self._run.task.plan.paints:
            raise UserError(f"{self._path} was trained with model.image_loss_weight=0, so it has no image decoder and"
                            " paints nothing")  # fmt: skip
        ratio = self.config.model.mask_ratio if mask_ratio is None else mask_ratio
        files, regions, visible = self._prepared(images, ratio)
        painted: list[Image.Image] = []
        with self._running():
            for _, batch in batches(self._run, files, regions, visible):
                pixels = repainted(self.module, batch).permute(0, 2, 3, 1).cpu().numpy()
                painted += [Image.fromarray(image) for image in pixels]
        return painted

    @functools.cached_property
    def encoder(self) -> VisionEncoder:
        """The encoder of this checkpoint in plain torch, see `megamug.load_encoder`; weights are its own copy."""
        from megamug.transfer.encoder import load_encoder

        parameter = next(self.module.parameters())
        return load_encoder(self._path, step=self.step, device=self.device, dtype=parameter.dtype)

    def _prepared(self, images, ratio: float) -> tuple[list[Path | bytes], np.ndarray, int]:
        from megamug.generation.images import image_sizes, visible_patches

        options.check("mug", {"mask_ratio": ratio}, str)
        visible = visible_patches(self._run.task.plan.patches, ratio, "mask_ratio")
        single = not isinstance(images, list | tuple)
        if not single and not images:
            raise UserError("an empty list of images; give one at least")
        files = [_file(image) for image in ([images] if single else images)]
        return files, centre_squares(*image_sizes(files, "")), visible


@dataclass
class Document:
    """What a language model wrote, and what it went on from."""

    segments: list[str | Image]  # texts and images in turn, those of the prompt included
    written: str  # the text behind the prompt, that of later texts included, a line each
    ended: str  # eos, images (one more was begun than max_images) or length (nothing more fitted)
    tokens: list[int]

    @property
    def text(self) -> str:
        """All its texts, a line each."""
        return "\n".join(segment for segment in self.segments if isinstance(segment, str))

    @property
    def images(self) -> list[Image]:
        return [segment for segment in self.segments if not isinstance(segment, str)]


class LoadedLanguageModel(_Loaded):
    """A language model, of text or of text and images (JAM). `config`, `step`, `checkpoint`, `device` say which;
    `module` is the model as it is trained, `vocabulary` its tokens."""

    def __init__(self, run: LoadedRun, path: Path) -> None:
        super().__init__(run, path)
        self.vocabulary = Vocabulary.load(run.config.data.tokenizer)

    def generate(
        self, prompt: str | Sequence[str] = "", *, image=None, max_images: int | None = None,
        max_tokens: int | None = None, temperature: float = 1.0, top_p: float | None = None,
        guidance: float | None = None, contrastive: float | None = None, contrastive_top_k: int | None = None,
        samples: int = 1, seed: int | None = None,
    ) -> list[Document]:  # fmt: skip
        """Goes on with each prompt, `samples` times: sample s of prompt p of P is at s * P + p.

        Args:
            prompt: a text or several; one that ends in `<break>` is followed by an image at once.
            image: a picture that stands before each prompt: a path, bytes, a Pillow image or a uint8 tensor [3, H, W].
            max_images, max_tokens: written in each document at most (default: as many as fit).
            temperature: 0 is always the likeliest. top_p: the top share of the probability drawn from (default: 0.9).
            guidance, contrastive, contrastive_top_k: see `megamug.generation.decoding`.
            seed: of the draws (default: the run's).

        Raises UserError: a prompt or an image that this vocabulary or context cannot hold, values out of range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        options.check(self.config.model.kind, {
            "max_images": max_images, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p,
            "guidance": guidance, "contrastive": contrastive, "contrastive_top_k": contrastive_top_k,
            "samples": samples, "seed": seed,
        }, str)  # fmt: skip
        if not prompts:
            raise UserError("an empty list of prompts; give one at least")
        vocabulary = self.vocabulary
        file = None if image is None else _file(image)
        documents.check_options(vocabulary, prompts, file, max_images, guidance, contrastive, contrastive_top_k)
        starts, limits = documents.beginnings(self.config, vocabulary, prompts, file, max_tokens)
        sampling = documents.sampling_of(
            self.config, temperature, top_p, guidance, contrastive, contrastive_top_k, seed
        )
        with self._running():
            rows = documents.write_samples(self.module, vocabulary, starts, limits, sampling, max_images, samples)
        return self._documents(rows)

    def _documents(self, rows: Sequence) -> list[Document]:
        from PIL import Image

        described, pictures = documents.describe(rows, self.vocabulary)
        with torch.inference_mode():
            pngs = documents.decode_images(pictures, self.vocabulary, self.device)
        made = []
        for entry in described:
            segments: list = []
            for segment in entry["segments"]:
                if "text" in segment:
                    segments.append(segment["text"])
                else:
                    segments.append(Image.open(io.BytesIO(pngs[segment["image"]])).copy())
            written = [segment["text"][segment["given"] :] for segment in entry["segments"] if "text" in segment]
            made.append(Document(segments, "\n".join(filter(None, written)), entry["ended"], entry["tokens"]))
        return made


def _states_kept():
    """Inside, torch's random states may be set; at the end they are as before."""
    here = [int(os.environ.get("LOCAL_RANK", 0))] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=here)


def _file(image) -> Path | bytes:
    """A path, or bytes of a file with the same pixels. Raises UserError for what is no image."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        path = Path(image)
        if not path.is_file():
            raise UserError(f"{path} is no file" if path.exists() else f"{path} does not exist")
        return path
    from PIL import Image

    if isinstance(image, torch.Tensor):
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
            raise UserError(f"an image as a tensor: uint8 [3, H, W] wanted, not {image.dtype} {list(image.shape)}")
        image = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    if not isinstance(image, Image.Image):
        raise UserError(f"an image: Pillow's, a path, bytes or a uint8 tensor, not {type(image).__name__}")
    file = io.BytesIO()
    try:
        image.save(file, "PNG")
    except OSError as error:
        raise UserError(f"an image of mode {image.mode} cannot be used: {error}; convert it to RGB") from None
    return file.getvalue()

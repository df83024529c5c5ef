"""`megamug generate` for language models: prompts in, documents of text and images out, as JSON, PNGs and a page."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from megamug.configuration import validate_lm
from megamug.configuration.reading import towers
from megamug.configuration.sections import Config
from megamug.configuration.shapes import positions_of
from megamug.data.documents.reading import Picture
from megamug.data.documents.vocabulary import Vocabulary
from megamug.data.shards.verify import DEFAULT_LIMITS, Rejected, check_header
from megamug.durable import write_atomically
from megamug.errors import UserError

BREAK = "<break>"
TOP_P = 0.9
WRITERS = ("decoder_lm", "jam_cross")  # kinds of model
ROWS = 16  # documents written at once


def generate_documents(
    run_dir: str | Path,
    prompts: Sequence[str] = ("",),
    *,
    image: str | Path | None = None,
    max_images: int | None = None,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    top_p: float | None = None,
    guidance: float | None = None,
    contrastive: float | None = None,
    contrastive_top_k: int | None = None,
    samples: int = 1,
    seed: int | None = None,
    output: str | Path | None = None,
    step: int | None = None,
) -> dict:
    """Goes on with each prompt, `samples` times, by the newest checkpoint of a language model's run, or that of `step`.

    Args:
        prompts: texts; one that ends in `<break>` is followed by an image at once.
        image: a picture that stands before each prompt (`<bos> image <break> prompt`), cut to its centred square.
        max_images: written in each document (default: as many as fit).
        max_tokens: written in each document (default: up to data.context_length of the run).
        temperature, top_p, guidance, contrastive, contrastive_top_k: see `decoding.Sampling`; top_p is `TOP_P` and
            contrastive_top_k 1 where they are None.
        seed: of the draws (default: the run's).
        output: folder of the results (default: a new one, RUN/generate/step-XXXXXXXX[-n]).

    Writes a PNG for each image, `document.json` (what is returned) and `document.html`. In several processes the model
    is split over them (tensor parallelism) and the first one writes. Raises `UserError`: a prompt or an image that this
    vocabulary or context cannot hold, guidance without text or image, a run that cannot be read.
    """
    config = _read_config(Path(run_dir))
    vocabulary = Vocabulary.load(config.data.tokenizer)
    check_options(vocabulary, prompts, image, max_images, guidance, contrastive, contrastive_top_k)
    starts, limits = beginnings(config, vocabulary, prompts, None if image is None else Path(image), max_tokens)

    import torch
    import torch.distributed as dist

    from megamug.generation.images import new_folder
    from megamug.generation.loading import load_run

    sampling = sampling_of(config, temperature, top_p, guidance, contrastive, contrastive_top_k, seed)
    with load_run(run_dir, step) as run:
        if run.world.size > 1:  # an image's codes may differ between machines
            dist.broadcast_object_list(starts, src=0)
        rows = write_samples(run.model, vocabulary, starts, limits, sampling, max_images, samples)
        settings = {
            "checkpoint": str(run.checkpoint), "step": run.step, "temperature": temperature,
            "top_p": sampling.top_p if temperature else None, "guidance": guidance, "contrastive": contrastive,
            "contrastive_top_k": sampling.contrastive_top_k if contrastive is not None else None,
            "seed": sampling.seed, "max_images": max_images, "max_tokens": max_tokens,
            "image": None if image is None else str(image),
        }  # fmt: skip
        documents, pictures = describe(rows, vocabulary)
        figures = {**settings, "prompts": list(prompts), "documents": documents}
        if run.world.is_first:
            with torch.inference_mode():
                pngs = decode_images(pictures, vocabulary, run.world.device)
            name = f"step-{run.step:08d}"
            folder = Path(output) if output is not None else new_folder(Path(run_dir) / "generate", name)
            _write(folder, f"{Path(run_dir).name}, step {run.step}", figures, settings, pngs)
    return figures


def beginnings(
    config: Config, vocabulary: Vocabulary, prompts: Sequence[str], image: Path | bytes | None, max_tokens: int | None
) -> tuple[list[list[int]], list[int]]:
    """(ids of each document's beginning, the most tokens of each document). Raises UserError, see `prompt_ids`,
    `encode_image` and `token_limit`."""
    picture = [] if image is None else encode_image(image, vocabulary)
    starts = [prompt_ids(text, picture, vocabulary) for text in prompts]
    return starts, [token_limit(config, vocabulary, start, max_tokens) for start in starts]


def sampling_of(
    config: Config, temperature: float, top_p: float | None, guidance: float | None, contrastive: float | None,
    contrastive_top_k: int | None, seed: int | None,
):  # fmt: skip
    """`decoding.Sampling` with defaults in the places of None."""
    from megamug.generation.decoding import Sampling

    return Sampling(
        temperature, TOP_P if top_p is None else top_p, guidance, contrastive, contrastive_top_k or 1,
        config.seed if seed is None else seed,
    )  # fmt: skip


def write_samples(
    model, vocabulary: Vocabulary, starts: list[list[int]], limits: list[int], sampling, max_images: int | None,
    samples: int,
) -> list:  # fmt: skip
    """The rows of `samples` documents for each beginning. Sample s of prompt p has number s * prompts + p: more samples
    leave the first ones as they are."""
    from megamug.generation.decoding import write_documents

    rows: list = []
    numbers = range(samples * len(starts))
    for first in range(0, len(numbers), ROWS):
        part = numbers[first : first + ROWS]
        which = [n % len(starts) for n in part]
        rows += write_documents(
            model, vocabulary, [starts[i] for i in which], sampling, limits=[limits[i] for i in which],
            max_images=max_images, samples=part,
        )  # fmt: skip
    return rows


def _read_config(run_dir: Path) -> Config:
    from megamug.generation.loading import read_config

    config = read_config(run_dir)
    if config.model.kind == "mug":
        raise UserError(f"{run_dir} is a run of MUG, which writes no documents; give it pictures with --images")
    if config.model.kind not in WRITERS:
        raise UserError(f"{run_dir} is a run of model.kind={config.model.kind}, which writes nothing")
    validate_lm.reading(config, run_dir)
    return config


def check_options(
    vocabulary: Vocabulary, prompts: Sequence[str], image, max_images: int | None, guidance: float | None,
    contrastive: float | None, contrastive_top_k: int | None,
) -> None:  # fmt: skip
    """Raises UserError where options do not go together, or not with this vocabulary."""
    if not vocabulary.codes and (image is not None or max_images):
        option = f"--image {image}" if image is not None else f"--max-images {max_images}"
        raise UserError(f"{option}: {vocabulary.folder} is a vocabulary of text alone, without an image tokenizer; "
                        "leave the option out, or train with a vocabulary made with --image-tokenizer")
    if contrastive_top_k is not None and contrastive is None:
        raise UserError(f"--contrastive-top-k is {contrastive_top_k} but there is no --contrastive; give its alpha")
    if guidance is None and contrastive is None:
        return
    option = "--guidance" if guidance is not None else "--contrastive"
    if guidance is not None and contrastive is not None:
        raise UserError("--guidance and --contrastive are two ways of the same thing; give one of them")
    if max_images == 0 or not vocabulary.codes:
        raise UserError(f"{option} is for images, and none is to be written; leave it out, or raise --max-images")
    if not all(text.removesuffix(BREAK).strip() for text in prompts):
        raise UserError(f"{option} compares images with and without the text before them, but the prompt has no text; "
                        "give --prompt a text")


def prompt_ids(text: str, picture: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """`<bos> [picture <break>] text [<break>]` as ids. Raises `UserError` for a `<break>` where none can stand."""
    body = text.strip()
    ends = body.endswith(BREAK)
    body = " ".join(body.removesuffix(BREAK).split())  # as the texts of documents are read
    if BREAK in body:
        raise UserError(f"--prompt: {BREAK} can only stand at its end, where an image is to follow; remove the others")
    if ends and not body:
        raise UserError(f"--prompt: {text!r} has no text before {BREAK}; describe the image that is to follow")
    if ends and not vocabulary.codes:
        raise UserError(f"--prompt: {BREAK} asks for an image, but {vocabulary.folder} is a vocabulary of text alone")
    ids = [vocabulary.bos_id]
    if len(picture):
        ids += [*picture, vocabulary.break_id]
    return [*ids, *vocabulary.encode_text(body), *([vocabulary.break_id] if ends else [])]


def token_limit(config: Config, vocabulary: Vocabulary, start: list[int], max_tokens: int | None) -> int:
    """The most tokens of a document that begins with `start`. Raises `UserError` where they do not fit the context."""
    context = config.data.context_length
    limit = context if max_tokens is None else len(start) + max_tokens
    for name, tower in towers(config).items():
        positions = positions_of(tower)
        if positions is not None and max(limit, len(start) + 1) > positions:
            asked = "" if max_tokens is None else f" and --max-tokens {max_tokens}"
            key = "max_positions" if tower.positions == "learned" else "grid"
            raise UserError(f"a prompt of {len(start)} tokens{asked} is more than the {positions} {tower.positions} "
                            f"positions of {name} ({name}.{key}); shorten it or lower --max-tokens")
    if limit <= len(start):
        raise UserError(f"the prompt has {len(start)} tokens and the run was trained on {context} (data.context_length)"
                        ": nothing can follow; shorten it, or give --max-tokens")
    room = limit - len(start)
    if start[-1] == vocabulary.break_id and start[-2] < vocabulary.text_pieces and room < vocabulary.image_tokens:
        raise UserError(f"an image of {vocabulary.image_tokens} tokens is to follow, and there is room for {room}; "
                        "raise --max-tokens or shorten the prompt")
    return limit


def encode_image(image: Path | bytes, vocabulary: Vocabulary) -> list[int]:
    """The ids of a picture file, or of its bytes, as those of training data are made. Raises `UserError` where it
    cannot be read."""
    from megamug.models.image_tokenizer.encoder import ImageEncoder

    path = Path("image") if isinstance(image, bytes) else image
    try:
        data = image if isinstance(image, bytes) else path.read_bytes()
        width, height = check_header(data, DEFAULT_LIMITS)
    except OSError as error:
        raise UserError(f"--image: {path} cannot be read: {error.strerror}") from error
    except Rejected as reason:
        raise UserError(f"--image: {path} is no picture that can be used: {reason}") from reason
    [ids] = ImageEncoder(vocabulary)([Picture(path.name, data, width, height)])
    if isinstance(ids, str):
        raise UserError(f"--image: {path} {ids}")
    return ids.tolist()


def describe(rows: Sequence, vocabulary: Vocabulary) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Entries of `document.json` for the written rows, and the codes [rows, columns] of their images by file name."""
    documents, pictures = [], {}
    for sample, row in enumerate(rows):
        segments, images = [], 0
        for is_image, run in groupby(enumerate(row.tokens), lambda entry: kind(entry[1], vocabulary)):
            places, ids = zip(*run, strict=True)
            given = sum(at < row.prompt for at in places)
            if is_image is None:  # marks
                continue
            if is_image:
                images += 1
                name = f"sample-{sample:03d}-image-{images}.png"
                pictures[name] = vocabulary.image_codes(np.array(ids))
                segments.append({"image": name, "prompt": given > 0})
                continue
            text, begin = vocabulary.decode_text(ids), vocabulary.decode_text(ids[:given])
            if not text.startswith(begin):  # bytes of one character on both sides of the border
                begin = text[: len(begin)]
            segments.append({"text": text, "given": len(begin)})
        documents.append({
            "sample": sample, "segments": segments, "ended": row.ended, "tokens_given": row.prompt,
            "tokens_written": len(row.tokens) - row.prompt, "tokens": row.tokens,
        })  # fmt: skip
    return documents, pictures


def kind(token: int, vocabulary: Vocabulary) -> bool | None:
    """True: an image code; False: a text piece; None: a mark."""
    if token in (vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id) or token >= vocabulary.break_id:
        return None
    return token >= vocabulary.first_code


def decode_images(pictures: dict[str, np.ndarray], vocabulary: Vocabulary, device) -> dict[str, bytes]:
    """PNG files of codes [rows, columns], by name."""
    import torch
    from PIL import Image

    from megamug.models.image_tokenizer.model import to_bytes
    from megamug.models.image_tokenizer.vocabulary import load_image_tokenizer

    if not pictures:
        return {}
    tokenizer = load_image_tokenizer(vocabulary, str(device))
    pngs = {}
    for name, codes in pictures.items():
        pixels = to_bytes(tokenizer.decode(torch.from_numpy(codes).unsqueeze(0).to(device)))[0]
        file = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(file, "PNG")
        pngs[name] = file.getvalue()
    return pngs


def _write(folder: Path, title: str, figures: dict, settings: dict, pngs: dict[str, bytes]) -> None:
    from megamug.generation.page import page

    folder.mkdir(parents=True, exist_ok=True)
    for name, data in pngs.items():
        write_atomically(folder / name, data)
    html, document = folder / "document.html", folder / "document.json"
    write_atomically(html, page(title, figures["documents"], pngs, settings).encode())
    write_atomically(document, (json.dumps(figures, indent=1) + "\n").encode())
    for path in (*(folder / name for name in pngs), document, html):
        print(path, file=sys.stderr)

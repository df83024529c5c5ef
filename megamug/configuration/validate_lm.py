"""Checks of the language models' part of a configuration (`decoder_lm`, `jam_cross`), run by `validate`.

As there: one function per concern, a `UserError` with both numbers and the fix, nothing of torch.
"""

from __future__ import annotations

import math
from pathlib import Path

from megamug.configuration.counts import round_up
from megamug.configuration.reading import towers
from megamug.configuration.sections import Config
from megamug.configuration.shapes import positions_of
from megamug.errors import UserError

TOWER_SIZES = (
    "layers", "width", "heads", "query_groups", "ffn_width", "norm", "activation", "bias", "positions", "qk_norm",
    "qk_norm_per_head", "res_post_norm",
)  # fmt: skip
FUSION_SIZES = ("cross_every", "cross_ffn", "gate", "shared_embedding", "output_width")


def widths(config: Config) -> None:
    """Heads share the width and queries their groups evenly; rotary positions turn pairs of numbers."""
    for name, tower in towers(config).items():
        if tower.width % tower.heads:
            raise UserError(f"{name}.width({tower.width}) is not divisible by {name}.heads({tower.heads});"
                            f" set {name}.width={round_up(tower.width, tower.heads)}")
        if tower.heads % tower.query_groups:
            fits = _divisors(tower.heads)
            raise UserError(f"{name}.heads({tower.heads}) is not divisible by {name}.query_groups"
                            f"({tower.query_groups}); set {name}.query_groups to one of {fits}")
        head = tower.width // tower.heads
        if tower.positions == "rotary" and head % 2:
            raise UserError(f"{name}: rotary positions need an even head width, but {name}.width({tower.width}) /"
                            f" {name}.heads({tower.heads}) = {head}; set {name}.width={tower.heads * (head + 1)}")
        if tower.positions == "rotary_grid" and head % 4:
            raise UserError(f"{name}: rows and columns of a grid need a head width divisible by 4, but {name}.width"
                            f"({tower.width}) / {name}.heads({tower.heads}) = {head};"
                            f" set {name}.width={tower.heads * round_up(head, 4)}")
        scaling = tower.rotary_scaling
        if scaling and (scaling[1] >= scaling[2] or tower.positions != "rotary"):
            raise UserError(f"{name}.rotary_scaling({scaling}) is for {name}.positions=rotary: factor, low and"
                            f" high frequency factor, positions; set {name}.rotary_scaling=[] for none")
        if tower.qk_norm_per_head and not tower.qk_norm:
            raise UserError(f"{name}.qk_norm_per_head(true) says what {name}.qk_norm(false) is made of; set"
                            f" {name}.qk_norm=true or {name}.qk_norm_per_head=false")


def context(config: Config) -> None:
    """A learned position, or a place in the grid, for every token of a row."""
    length = config.data.context_length
    for name, tower in towers(config).items():
        if tower.positions == "rotary_grid" and tower.grid == 0:
            raise UserError(f"{name}.grid is 0, and {name}.positions is rotary_grid; set"
                            f" {name}.grid={math.isqrt(length)} for {math.isqrt(length)} x {math.isqrt(length)} codes")
        if tower.positions == "rotary_grid" and length > positions_of(tower):
            raise UserError(f"data.context_length({length}) is more than the {positions_of(tower)} positions of"
                            f" {name}.grid({tower.grid}), a first token and {tower.grid} x {tower.grid} codes; set"
                            f" data.context_length={positions_of(tower)}")
        if tower.positions == "learned" and length > tower.max_positions:
            raise UserError(
                f"data.context_length({length}) is more than {name}.max_positions({tower.max_positions}), the rows"
                f" of its learned positions; set data.context_length={tower.max_positions}"
                f" or {name}.max_positions={length}"
            )


def fusion(config: Config) -> None:
    """Towers that the fusion fits: deep enough for a cross block, of one width where they share an embedding."""
    if config.model.kind != "jam_cross":
        return
    options, text, image = config.fusion, config.text_tower, config.image_tower
    depth = min(text.layers, image.layers)
    if options.cross_every > depth:
        raise UserError(f"fusion.cross_every({options.cross_every}) is more than the shallower tower's layers({depth}):"
                        f" the towers would never meet; set fusion.cross_every={max(1, depth // 2)}")
    if options.shared_embedding and text.width != image.width:
        raise UserError(f"fusion.shared_embedding(true) needs towers of one width, but text_tower.width({text.width})"
                        f" is not image_tower.width({image.width}); set fusion.shared_embedding=false")


def tensor_parallel(config: Config) -> None:
    """Heads, query groups and feed-forward shared evenly."""
    tensor = config.parallel.tensor
    sizes = {
        f"{name}.{key}": getattr(tower, key)
        for name, tower in towers(config).items()
        for key in ("heads", "query_groups", "ffn_width")
    }
    common = math.gcd(*sizes.values())
    for name, number in sizes.items():
        if number % tensor:
            raise UserError(f"{name}({number}) is not divisible by parallel.tensor({tensor});"
                            f" set parallel.tensor to one of {_divisors(common)}")


def sequence_parallel(config: Config) -> None:
    """A row's tokens shared evenly under parallel.sequence."""
    length, tensor = config.data.context_length, config.parallel.tensor
    if config.parallel.sequence and length % tensor:
        raise UserError(f"data.context_length({length}) is not divisible by parallel.tensor({tensor}) under"
                        f" parallel.sequence; set data.context_length={length - length % tensor or tensor}")


def block_count(config: Config) -> int:
    """What a pipeline can be cut into: layers (of the deeper tower), the embedding and the head."""
    return 1 + max(tower.layers for tower in towers(config).values()) + 1


def files(config: Config) -> None:
    """A vocabulary that the data were tokenised with and the ranks share evenly, and tokens that carry loss."""
    data, tensor = config.data, config.parallel.tensor
    if data.tokenizer is None:
        raise UserError("data.tokenizer is not set; a language model needs a vocabulary folder:"
                        " megamug data vocabulary --text TOKENIZER.model --image-tokenizer FOLDER --output FOLDER")
    if data.train is None:
        raise UserError("data.train is not set; give it a folder of tokenised documents (megamug data documents),"
                        " or a list of {path, weight}")
    from megamug.data.documents.indexed import document_folders, read_header
    from megamug.data.documents.vocabulary import Vocabulary

    try:
        vocabulary = Vocabulary.load(data.tokenizer)
    except UserError as error:
        raise UserError(f"data.tokenizer: {error}") from None
    if vocabulary.padded_size % tensor:
        raise UserError(f"the vocabulary of {data.tokenizer}, padded to {vocabulary.padded_size}, is not divisible by"
                        f" parallel.tensor({tensor}); set parallel.tensor to a divisor of it, such as"
                        f" {math.gcd(vocabulary.padded_size, tensor)}")
    for key, sets in (("data.train", data.train), ("data.validation", data.validation)):
        if sets is None:
            continue
        try:
            headers = {folder: read_header(Path(folder)) for folder, _ in document_folders(sets)}
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        for folder, header in headers.items():
            if header.vocabulary != vocabulary.fingerprint():
                raise UserError(
                    f"{key}: {folder} was tokenised with another vocabulary (fingerprint {header.vocabulary[:12]}) than"
                    f" data.tokenizer={data.tokenizer} ({vocabulary.fingerprint()[:12]}); set data.tokenizer="
                    f"{header.vocabulary_folder}, or tokenise the documents again"
                )
        counts = {"image": "images", "text": "text_segments", "response": "responses"}
        if data.loss_on != "all" and not any(getattr(h, counts[data.loss_on]) for h in headers.values()):
            raise UserError(f"data.loss_on({data.loss_on}) leaves nothing to learn: {key} has 0 segments of that kind;"
                            f" set data.loss_on=all")


def reading(config: Config, run_dir: Path) -> None:
    """A vocabulary, to read a trained or converted run of a language model with; other runs pass."""
    if towers(config) and config.data.tokenizer is None:
        raise UserError(
            f"data.tokenizer is not set in {run_dir / 'config.yaml'}; write the vocabulary folder of the model there"
            " (megamug data vocabulary makes one), or convert the model again with --vocabulary FOLDER"
        )


def identity(config: Config) -> dict[str, object]:
    """What makes checkpoints of one model unfit for another. Switches are words: a bare False would say "not there"."""
    found: dict[str, object] = {"model.kind": config.model.kind}
    for name, tower in towers(config).items():
        found |= {f"{name}.{key}": _word(getattr(tower, key)) for key in TOWER_SIZES}
        found[f"{name}.max_positions"] = tower.max_positions if tower.positions == "learned" else None
        found[f"{name}.rotary_base"] = tower.rotary_base if tower.positions != "learned" else None
        # A word: nothing would fit anything.
        scaling = str(tower.rotary_scaling) if tower.rotary_scaling else "none"
        found[f"{name}.rotary_scaling"] = scaling if tower.positions == "rotary" else None
        found[f"{name}.grid"] = tower.grid if tower.positions == "rotary_grid" else None
    if config.model.kind == "jam_cross":
        found |= {f"fusion.{key}": _word(getattr(config.fusion, key)) for key in FUSION_SIZES}
    else:
        found["lm.tie_vocabulary"] = _word(config.lm.tie_vocabulary)
    return found


def _word(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)

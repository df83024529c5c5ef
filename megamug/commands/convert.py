"""Converts between megamug's checkpoints and other libraries'.

    megamug convert --from mae --to megamug mae_pretrain_vit_base.pth runs/mae_b
    megamug convert --from megamug --to hf_vit runs/mug exported

See docs/conversion.md.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from megamug.checkpoint.tensors import TensorReader, write_run
from megamug.command_line.arguments import Parser, output_folder
from megamug.convert.conversion import (
    from_megamug,
    image_tokenizer_from_megamug,
    image_tokenizer_to_megamug,
    read_configuration,
    to_megamug,
)
from megamug.convert.language import growth
from megamug.convert.registry import FORMATS, IMAGE_TOKENIZERS, MEGAMUG, format_named
from megamug.convert.shown import shown
from megamug.errors import UserError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """5GB, 200MB, 1000000 -> bytes. Raises UserError."""
    match = re.fullmatch(r"(\d+)\s*(|KB|MB|GB)", text.strip().upper())
    if not match or int(match[1]) == 0:
        raise UserError(f"--max-shard-size {text}: a size such as 5GB or 200MB wanted")
    return int(match[1]) * UNITS[match[2]]


def main(argv: list[str], prog: str | None = None) -> None:
    formats = "\n".join(f"  {name:<12} {form.what}" for name, form in FORMATS.items())
    parser = Parser(
        prog, description=__doc__.split("\n")[0],
        epilog=f"formats:\n  {MEGAMUG:<12} a run folder, or the folder of an image tokenizer\n{formats}\n"
               f"image tokenizers:\n  {' '.join(IMAGE_TOKENIZERS)}",
    )  # fmt: skip
    parser.add_argument("source", type=Path,
                        help="a file or folder; for megamug a run folder or its checkpoint step-XXXXXXXX")  # fmt: skip
    parser.add_argument("output", type=output_folder, help="a folder that does not exist yet")
    parser.add_argument("--from", dest="source_format", required=True, metavar="FORMAT")
    parser.add_argument("--to", dest="output_format", required=True, metavar="FORMAT")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="of the run that is written")
    parser.add_argument("--vocabulary", metavar="FOLDER", help="of a language model that is read, of its own tokenizer"
                        " (megamug data vocabulary); its tables get rows for ids that they lack")  # fmt: skip
    parser.add_argument("--new-rows", choices=growth.KINDS, help="those rows: the mean of the old ones with a little"
                        " noise (default), or zeros")  # fmt: skip
    parser.add_argument("--new-rows-seed", type=int, metavar="N", help="of the noise (default 1)")
    parser.add_argument("--allow-missing", nargs="+", default=[], metavar="KEY",
                        help="missing keys, or unknown ones of the tensors or of config.json, to go on without; *"
                             " stands for any text")  # fmt: skip
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a safetensors file (5GB)")
    parser.add_argument("--pth", action="store_true", help="write model.pth, {\"model\": tensors}, as MAE's scripts"
                        " read it, instead of safetensors (--to mae or timm)")  # fmt: skip
    options = parser.parse_intermixed_args(argv)
    try:
        remarks = convert(options)
    except UserError as error:  # it may quote what a file holds
        raise UserError(shown(str(error))) from None
    for remark in remarks:
        print(shown(remark))
    print(f"written: {options.output}")


def convert(options: argparse.Namespace) -> list[str]:
    source, output = options.source_format, options.output_format
    if output != MEGAMUG and options.config:
        raise UserError(f"--config describes the run that is written, but --to is {output}; leave it out")
    _check_vocabulary(options)
    if options.pth and (source != MEGAMUG or output not in ("mae", "timm")):
        raise UserError("--pth is how MAE's scripts read models: of --from megamug --to mae or timm; leave it out")
    if source == output == MEGAMUG:
        reader = TensorReader(options.source)
        state = reader.state()
        config, changes = read_configuration(reader)
        changes += [remark] if (remark := reader.take_averages()) else []
        write_run(options.output, config, reader.tensors(), state["identity"], state.get("origin"))
        return [*changes, "only the weights: no optimizer state"]
    if source == MEGAMUG and output in IMAGE_TOKENIZERS:
        layout = IMAGE_TOKENIZERS[output]
        return image_tokenizer_from_megamug(layout, options.source, options.output, size(options.max_shard_size))
    if output == MEGAMUG and source in IMAGE_TOKENIZERS:
        layout = IMAGE_TOKENIZERS[source]
        return image_tokenizer_to_megamug(
            layout, options.source, options.output, options.config, options.allow_missing
        )  # fmt: skip
    if output == MEGAMUG:
        form = format_named(source)
        new = growth.NewRows(options.new_rows or "mean", 1 if options.new_rows_seed is None else options.new_rows_seed)
        return to_megamug(
            form, options.source, options.output, options.config, options.allow_missing, options.vocabulary, new
        )
    form = format_named(output)
    if source != MEGAMUG:
        raise UserError(f"--from {source} --to {output}: convert to megamug first, then from megamug")
    most = size(options.max_shard_size)
    return from_megamug(form, options.source, options.output, options.allow_missing, most, options.pth)


def _check_vocabulary(options: argparse.Namespace) -> None:
    """Raises UserError for --vocabulary and what belongs to it where they say nothing."""
    foreign = options.output_format == MEGAMUG and options.source_format not in (MEGAMUG, *IMAGE_TOKENIZERS)
    if options.vocabulary is not None and not foreign:
        raise UserError("--vocabulary is for a published language model that becomes megamug's; leave it out")
    for name, value in (("--new-rows", options.new_rows), ("--new-rows-seed", options.new_rows_seed)):
        if value is not None and options.vocabulary is None:
            raise UserError(f"{name} is about ids that --vocabulary FOLDER adds; give that, or leave {name} out")
    if options.new_rows_seed is not None and options.new_rows == "zeros":
        raise UserError("--new-rows-seed is of noise, and --new-rows zeros has none; leave one of them out")

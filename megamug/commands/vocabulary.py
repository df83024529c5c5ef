"""Join a text tokenizer and an image tokenizer into the vocabulary of a language model:
megamug data vocabulary --text TOKENIZER --image-tokenizer FOLDER --sentinels 512 --output FOLDER

Without --image-tokenizer the vocabulary knows text alone. Models that are to be fused need the same vocabulary.
TOKENIZER is a SentencePiece model, a tokenizer.json, or the folder of a published model that has one; its ids stay.
"""

from __future__ import annotations

from pathlib import Path

from megamug.command_line.arguments import COUNT, Parser, output_folder
from megamug.data.text.marks import ROLES
from megamug.models.image_tokenizer.vocabulary import make_vocabulary


def main(argv: list[str], prog: str | None = None) -> None:
    parser = Parser(prog, description=__doc__)
    parser.add_argument("--text", type=Path, required=True, metavar="TOKENIZER", help="of the text")
    parser.add_argument("--image-tokenizer", type=Path, metavar="FOLDER", help="of megamug data image-tokenizer")
    parser.add_argument("--sentinels", type=COUNT, default=512, metavar="N", help="marks of masked spans (default 512)")
    parser.add_argument("--output", type=output_folder, required=True, metavar="FOLDER", help="the vocabulary to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FOLDER where it holds another vocabulary")
    for role in ("bos", "eos", "pad"):
        parser.add_argument(f"--{ROLES[role][0]}", dest=role, metavar="TOKEN",
                            help=f"that is to {ROLES[role][0]} a text, where TOKENIZER does not tell")  # fmt: skip
    args = parser.parse_args(argv)
    named = {role: getattr(args, role) for role in ("bos", "eos", "pad") if getattr(args, role) is not None}
    made = make_vocabulary(
        args.text, args.image_tokenizer, args.sentinels, args.output, overwrite=args.overwrite, named=named
    )
    images = f"{made.codes} image codes ({made.image_tokens} an image)" if made.codes else "no image codes"
    print(
        f"{args.output}: {made.size} ids (padded to {made.padded_size}): {made.text_pieces} text pieces, {images}, "
        f"{len(made.sentinels)} sentinels; begin {made.bos_id}, end {made.eos_id}, padding {made.pad_id}"
        f"{'' if made.spec.own_pad else ' (new)'}; fingerprint {made.fingerprint()[:12]}"
    )

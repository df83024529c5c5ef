"""Join a text tokenizer and an image tokenizer into the vocabulary of a language model:
megamug data vocabulary --text TOKENIZER.model --image-tokenizer FOLDER --sentinels 512 --output FOLDER

Without --image-tokenizer the vocabulary knows text alone. Models that are to be fused need the same vocabulary.
"""

from __future__ import annotations

from pathlib import Path

from megamug.command_line.arguments import COUNT, Parser, output_folder
from megamug.models.image_tokenizer.vocabulary import make_vocabulary


def main(argv: list[str], prog: str | None = None) -> None:
    parser = Parser(prog, description=__doc__)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a SentencePiece model")
    parser.add_argument("--image-tokenizer", type=Path, metavar="FOLDER", help="of megamug data image-tokenizer")
    parser.add_argument("--sentinels", type=COUNT, default=512, metavar="N", help="marks of masked spans (default 512)")
    parser.add_argument("--output", type=output_folder, required=True, metavar="FOLDER", help="the vocabulary to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FOLDER where it holds another vocabulary")
    args = parser.parse_args(argv)
    made = make_vocabulary(args.text, args.image_tokenizer, args.sentinels, args.output, overwrite=args.overwrite)
    images = f"{made.codes} image codes ({made.image_tokens} an image)" if made.codes else "no image codes"
    print(
        f"{args.output}: {made.size} ids (padded to {made.padded_size}): {made.text_pieces} text pieces, {images}, "
        f"{len(made.sentinels)} sentinels; fingerprint {made.fingerprint()[:12]}"
    )

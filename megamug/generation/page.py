"""A page that shows written documents as one reads them: paragraphs and pictures in turn, nothing but one HTML file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

STYLE = """
body { max-width: 44rem; margin: 2rem auto; padding: 0 1rem; font: 1.05rem/1.6 Georgia, serif; color: #1c1c1c;
  background: #fff; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; color: #666; font-weight: normal; }
article { border-top: 1px solid #ccc; padding-bottom: 1rem; }
p { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { background: #fff3c4; } img.prompt { outline: 6px solid #fff3c4; }
img { display: block; margin: 1rem 0; width: 16rem; max-width: 100%; image-rendering: pixelated; }
footer, table { font: 0.85rem/1.5 sans-serif; color: #555; } td { padding-right: 1.5rem; }
"""
ENDS = {
    "eos": "the model ended the document",
    "images": "ended where one image more was to begin than --max-images allows",
    "length": "ended where nothing more fitted",
}


def page(title: str, documents: Sequence[dict], pictures: dict[str, bytes], settings: dict[str, object]) -> str:
    """The HTML text. `documents` are those of `document.json`; `pictures` the PNGs by the name they have in there.

    Text is escaped, pictures are part of the page (data URIs), what was given and not written is marked.
    """
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>\n" for k, v in settings.items())
    articles = "".join(_article(document, pictures) for document in documents)
    return (
        f'<!DOCTYPE html>\n<html>\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<footer><span class="prompt">marked</span>: the prompt; all else was written by the model</footer>\n'
        f"{articles}<table>\n{rows}</table>\n</body>\n</html>\n"
    )


def _article(document: dict, pictures: dict[str, bytes]) -> str:
    parts = [_segment(segment, pictures) for segment in document["segments"]]
    return (
        f"<article>\n<h2>Sample {document['sample']}</h2>\n{''.join(parts)}"
        f"<footer>{document['tokens_written']} tokens written; {escape(ENDS[document['ended']])}</footer>\n</article>\n"
    )


def _segment(segment: dict, pictures: dict[str, bytes]) -> str:
    if "image" in segment:
        data = base64.b64encode(pictures[segment["image"]]).decode("ascii")
        mark = ' class="prompt"' if segment["prompt"] else ""
        return f'<img{mark} alt="{escape(segment["image"])}" src="data:image/png;base64,{data}">\n'
    given, written = segment["text"][: segment["given"]], segment["text"][segment["given"] :]
    marked = f'<span class="prompt">{escape(given)}</span>' if given else ""
    return f"<p>{marked}{escape(written)}</p>\n"

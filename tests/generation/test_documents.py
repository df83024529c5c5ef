"""`megamug generate` for language models: prompts in; JSON, pictures and a page out, or a sentence."""

import base64
import html.parser
import io
import json

import numpy as np
import pytest
from PIL import Image

from megamug import cli
from megamug.configuration.reading import load_config, save_config
from megamug.data.documents.vocabulary import Vocabulary
from megamug.generation.page import page
from megamug.models.image_tokenizer.vocabulary import load_image_tokenizer, make_vocabulary
from tests.data.language import image
from tests.generation.language_run import STEP, make_data, make_run

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    make_data(folder)
    make_run("learned", folder)
    pixels = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


def written(capsys, folder, *argv) -> dict:
    assert cli.main(["generate", str(folder / "learned"), *map(str, argv)]) == 0
    return json.loads(capsys.readouterr().out)


class Reader(html.parser.HTMLParser):
    """What a page shows, in order: texts of paragraphs (whole, marked part) and pictures."""

    def __init__(self, text: str):
        super().__init__()
        self.shown, self.inside, self.marked = [], False, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "p":
            self.inside = True
            self.shown.append(["", ""])
        self.marked = self.inside and tag == "span" and attributes.get("class") == "prompt"
        if tag == "img":
            kind, _, data = attributes["src"].partition(",")
            assert kind == "data:image/png;base64"
            self.shown.append((base64.b64decode(data), attributes.get("class") == "prompt"))

    def handle_endtag(self, tag):
        self.marked = False
        self.inside &= tag != "p"

    def handle_data(self, data):
        if self.inside:
            self.shown[-1][0] += data
            self.shown[-1][1] += data if self.marked else ""


def test_a_document_as_one_reads_it(folder, capsys):
    figures = written(
        capsys, folder, "--prompt", PROMPT + " <break>", "--image", folder / "photo.png", "--max-images", 1,
        "--max-tokens", 30, "--samples", 3, "--top-p", 0.95, "--guidance", 2, "--seed", 4,
    )  # fmt: skip
    v = Vocabulary.load(folder / "vocabulary")
    place = folder / "learned" / "generate" / f"step-{STEP:08d}"
    assert json.loads((place / "document.json").read_text()) == figures
    assert (figures["guidance"], figures["top_p"], figures["temperature"], figures["seed"]) == (2, 0.95, 1, 4)
    assert len(figures["documents"]) == 3
    shown = iter(Reader((place / "document.html").read_text(encoding="utf-8")).shown)
    tokenizer = load_image_tokenizer(v)
    for document in figures["documents"]:
        tokens = document["tokens"]
        first, second, third, *rest = document["segments"]
        given = [v.bos_id, *tokens[1:17], v.break_id, *v.encode_text(PROMPT), v.break_id]
        assert tokens[: len(given)] == given and document["tokens_given"] == len(given)
        assert document["tokens_written"] == len(tokens) - len(given) <= 30
        assert second == {"text": PROMPT, "given": len(PROMPT)}
        assert first["prompt"] and not third["prompt"]
        assert all(r["given"] == 0 and r["text"] == v.decode_text(tokens[len(given) + 17 :]) for r in rest)
        for segment, start in ((first, 1), (third, len(given))):
            import torch

            codes = v.image_codes(np.array(tokens[start : start + 16]))
            expected = (tokenizer.decode(torch.from_numpy(codes)[None])[0].permute(1, 2, 0).numpy() + 1) * 127.5
            data = (place / segment["image"]).read_bytes()
            assert np.abs(np.asarray(Image.open(io.BytesIO(data)), float) - expected).max() <= 0.501
        for segment in document["segments"]:
            if "image" in segment:
                assert next(shown) == ((place / segment["image"]).read_bytes(), segment["prompt"])
            else:
                assert next(shown) == [segment["text"], segment["text"][: segment["given"]]]
    assert next(shown, None) is None
    again = written(capsys, folder, "--prompt", PROMPT + "<break>", "--image", folder / "photo.png", "--max-images",
                    1, "--max-tokens", 30, "--samples", 1, "--top-p", 0.95, "--guidance", 2, "--seed", 4)  # fmt: skip
    assert again["documents"][0]["tokens"] == figures["documents"][0]["tokens"]
    assert (place.with_name(place.name + "-2") / "document.html").is_file()


def test_prompts_side_by_side(folder, capsys, tmp_path):
    both = written(capsys, folder, "--prompt", PROMPT, "two", "--samples", 2, "--max-images", 0, "--output", tmp_path)
    texts = [document["segments"][0]["text"] for document in both["documents"]]
    assert [text.startswith(start) for text, start in zip(texts, [PROMPT, "two"] * 2, strict=True)] == [True] * 4
    assert len(set(texts)) == 4 and not list(tmp_path.glob("*.png"))


def test_text_is_escaped():
    texts = [{"text": "<b>&amp;</b> 1 < 2", "given": 3}, {"text": "</p><script>x</script>", "given": 0}]
    documents = [{"sample": 0, "segments": texts, "ended": "eos", "tokens_written": 2}]
    made = page("<i>run", documents, {}, {"image": "<a>.png"})
    assert Reader(made).shown == [["<b>&amp;</b> 1 < 2", "<b>"], ["</p><script>x</script>", ""]]
    assert "<script" not in made and "<i>" not in made and "<a>" not in made


def test_what_is_refused(folder, tmp_path, capsys):
    run, v = folder / "learned", Vocabulary.load(folder / "vocabulary")
    (tmp_path / "no.png").write_bytes(b"no picture")
    long = " ".join(["square"] * 60)
    for said, *argv in [
        ("give it with --prompt",),
        ("--images is not for", "--images", folder / "photo.png"),
        ("/absent.png is no file", "--image", "/absent.png"),
        ("no.png is no picture", "--image", tmp_path / "no.png"),
        ("--temperature is -1", "--prompt", "a", "--temperature", "-1"),
        ("--max-tokens is 0", "--prompt", "a", "--max-tokens", "0"),
        ("--contrastive is 2", "--prompt", "a", "--contrastive", "2"),
        ("give one of them", "--prompt", "a", "--contrastive", "0.5", "--guidance", "2"),
        ("there is no --contrastive", "--prompt", "a", "--contrastive-top-k", "2"),
        ("the prompt has no text", "--image", folder / "photo.png", "--guidance", "2"),
        ("none is to be written", "--prompt", "a", "--guidance", "2", "--max-images", "0"),
        ("can only stand at its end", "--prompt", "a<break>b"),
        ("has no text before <break>", "--prompt", "<break>"),
        ("96 learned positions of lm", "--prompt", "a", "--max-tokens", "95"),
        ("96 learned positions of lm", "--prompt", long),
        ("an image of 16 tokens is to follow, and there is room for 15", "--prompt", "a<break>", "--max-tokens", "15"),
    ]:
        capsys.readouterr()
        assert cli.main(["generate", str(run), *map(str, argv)]) == 2, said
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, (said, error)
    assert not list((tmp_path).glob("generate*")) and v.image_tokens == 16 and len(image(v)) == 16


def test_a_vocabulary_of_text_alone_and_a_run_of_mug(folder, tmp_path, capsys):
    from megamug.configuration.sections import Config

    make_vocabulary(folder / "t.model", None, 2, tmp_path / "vocabulary")
    config = load_config(folder / "learned" / "config.yaml")
    config.run_dir, config.data.tokenizer = str(tmp_path / "text"), str(tmp_path / "vocabulary")
    save_config(config)
    save_config(Config(run_dir=str(tmp_path / "mug")))
    for name in ("text", "mug"):
        (tmp_path / name / "checkpoints" / "step-00000001").mkdir(parents=True)
    for name, said, *argv in [
        ("text", "is a vocabulary of text alone", "--image", folder / "photo.png"),
        ("text", "is a vocabulary of text alone", "--prompt", "a", "--max-images", "1"),
        ("text", "is a vocabulary of text alone", "--prompt", "a<break>"),
        ("text", "none is to be written", "--prompt", "a", "--guidance", "2"),
        ("mug", "--prompt is not for", "--prompt", "a"),
        ("mug", "name some with --images"),
    ]:
        assert cli.main(["generate", str(tmp_path / name), *map(str, argv)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, (said, error)

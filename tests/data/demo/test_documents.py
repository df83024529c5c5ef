"""Documents about the demo's scenes."""

import json
import re
import tarfile

import numpy as np
import pytest

from megamug.data.demo.documents import (
    MIXTURES,
    NUMBERS,
    PARTS,
    DemoDocuments,
    instruction_document,
    make_demo_documents,
    text_document,
)
from megamug.data.demo.scenes import COLOURS, SHAPES
from megamug.data.documents.reading import iterate_texts, open_shard
from megamug.data.random import uniform
from megamug.errors import UserError


def numbers(count):
    return uniform(3, "test/scene", 0, np.arange(count), 48), uniform(3, "test/choices", 0, np.arange(count), 32)


def test_what_the_texts_say_is_true():
    kinds = dict.fromkeys(("sum", "parts", "mixing", "relation", "larger", "grows"), 0)
    for layout, choices in zip(*numbers(400), strict=True):
        text = text_document(layout, choices)
        for a, b, total in re.findall(r"(?:is|are) (\w+) \w+ \w+ and (\w+) \w+ \w+, so there are (\w+) shapes", text):
            assert NUMBERS.index(a) + NUMBERS.index(b) == NUMBERS.index(total)
            kinds["sum"] += 1
        for count, shape, total in re.findall(r"so (\w+) (circle|ring|cross)(?:e?s)? ha\w+ (\w+) (?:hole|arm)", text):
            assert NUMBERS.index(count) * PARTS[shape][0] == NUMBERS.index(total)
            kinds["parts"] += 1
        for one, other, mixed in re.findall(r"(\w+) and (\w+) make (\w+)", text):
            assert mixed in (MIXTURES.get((one, other)), MIXTURES.get((other, one)))
            kinds["mixing"] += 1
        for thing, way, other, one, back, rest in re.findall(
            r"a ((?:large|small) \w+ \w+) (left of|above|to the right of|under) a (\w+ \w+ \w+), "
            r"so the (\w+ \w+ \w+) is (left of|above|to the right of|under) the (\w+ \w+ \w+)", text
        ):  # fmt: skip
            assert (one, rest) == (other, thing) and {way, back} in ({"left of", "to the right of"}, {"above", "under"})
            kinds["relation"] += 1
        for colour in re.findall(r"the (\w+) \w+ is larger than", text):
            assert f"large {colour}" in text
            kinds["larger"] += 1
        for old, new in re.findall(r"a (small|large) \w+ \w+ \w+\. now it is a (\w+)", text):
            assert {old, new} == {"small", "large"}
            kinds["grows"] += 1
    assert min(kinds.values()) > 50


def test_a_text_has_two_to_four_paragraphs():
    kinds = (r", so the \w+ \w+ \w+ is", "so there are", r" (hole|arm)s?, so", "painted", "(grows|shrinks)")
    texts = [text_document(*both) for both in zip(*numbers(200), strict=True)]
    told = [sum(bool(re.search(kind, text)) for kind in kinds) for text in texts]
    assert set(told) == {2, 3, 4}


@pytest.mark.parametrize("wrong", [{"text": 0}, {"instructions": 0}, {"heldout": 0}, {"size": 31}])
def test_no_documents_and_pictures_too_small_are_refused(wrong, tmp_path):
    with pytest.raises(UserError, match="a document or more of each kind, and pictures at least 32 pixels"):
        make_demo_documents(tmp_path / "x", DemoDocuments(**{"text": 1, "instructions": 1, "heldout": 1} | wrong))
    assert not (tmp_path / "x").exists()


def test_one_thing_is_and_many_things_are():
    plural = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in [*SHAPES, "hole", "arm"]}
    counted, seen = r"(\w+) (?:\w+ )?(\w+)", set()
    for layout, choices in zip(*numbers(400), strict=True):
        text = text_document(layout, choices)
        found = re.findall(rf"there (is|are) {counted} and {counted}, so there are", text)
        found += re.findall(rf"so {counted} (has|have) {counted}(?=\.)", text)
        for words in found:
            verb = next(word for word in words if word in ("is", "are", "has", "have"))
            one, noun, other, second = (word for word in words if word != verb)
            assert (verb in ("is", "has")) == (one == "one")
            for number, thing in ((one, noun), (other, second)):
                assert thing in (plural if number == "one" else plural.values()), text
            seen.add((verb, one, other))
    assert len(seen) > 20 and {verb for verb, _, _ in seen} == {"is", "are", "has", "have"}


def test_an_instruction_changes_one_thing():
    changes = set()
    for layout, choices in zip(*numbers(100), strict=True):
        segments, (before, after) = instruction_document(layout, choices)
        prompt, first, _, then, _ = segments
        assert [s["role"] for s in segments] == ["prompt"] + ["response"] * 4
        assert before.caption() in prompt["text"] and before.caption() in first["text"]
        assert after.caption() in then["text"] and before.caption() != after.caption()
        for name in ("colour", "shape", "size", "x", "y"):
            if any(getattr(getattr(before, t), name) != getattr(getattr(after, t), name) for t in ("first", "second")):
                changes.add(name)
        assert after.first.colour != after.second.colour and after.first.colour in COLOURS
    assert changes == {"colour", "shape"}


def test_shards_are_deterministic_and_read_as_documents(tmp_path):
    parameters = DemoDocuments(text=30, instructions=4, heldout=3, size=32)
    paths = make_demo_documents(tmp_path / "a", parameters, processes=1)
    again = make_demo_documents(tmp_path / "b", parameters, processes=1)
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]
    assert [p.relative_to(tmp_path / "a").as_posix() for p in paths] == [
        f"{kind}/{split}/{kind}-000000.tar" for kind in ("text", "instructions") for split in ("train", "heldout")
    ]
    shards = [open_shard(path) for path in paths]
    assert [(shard.count, shard.quarantine) for shard in shards] == [(30, []), (3, []), (4, []), (3, [])]
    samples = list(iterate_texts(shards))
    assert [len(sample) for sample in samples] == [1] * 33 + [3] * 7
    texts = [text for sample in samples for text in sample]
    assert len(set(texts[:30]) & set(texts[30:33])) == 0
    with tarfile.open(paths[2]) as tar:
        assert len(json.load(tar.extractfile("00000000.json"))["segments"]) == 5
    with pytest.raises(UserError, match="holds demo data made with other parameters"):
        make_demo_documents(tmp_path / "a", DemoDocuments(seed=2))

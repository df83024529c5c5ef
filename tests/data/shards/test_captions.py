"""Captions out of text and JSON members: one, several, none."""

from __future__ import annotations

import json

import pytest

from megamug.data.shards.captions import choose, parse_captions


@pytest.mark.parametrize(("data", "captions"), [
    ("a  red\tcircle", ["a red circle"]),
    ("\ufeffone\r\ntwo\n\n three \n", ["one", "two", "three"]),
    ("one\u2028two", ["one", "two"]),
    ("one\n\u200b\n", ["one"]),
    ({"caption": "one\ntwo"}, ["one", "two"]),
    ({"caption": ["one\ntwo", " ", "three"]}, ["one two", "three"]),
])  # fmt: skip
def test_what_a_member_holds(data, captions):
    is_json = isinstance(data, dict)
    assert parse_captions((json.dumps(data) if is_json else data).encode(), is_json) == captions


@pytest.mark.parametrize(("data", "said"), [
    (" \n", "empty"), ("\u200b", "empty"), ("\u200b\ufeff\x07", "empty"), ({"caption": []}, "empty"),
    ({"caption": 3}, "no text"), ({"caption": ["a", 3]}, "no text"), ({}, "no text"), ([1], "no text"),
])  # fmt: skip
def test_what_is_no_caption(data, said):
    is_json = not isinstance(data, str)
    with pytest.raises(ValueError, match=said):
        parse_captions((json.dumps(data) if is_json else data).encode(), is_json)


def test_which_of_several():
    captions = ["one", "two", "three"]
    assert choose(captions) == "one two three" and choose(captions, "first", 0.9) == "one"
    assert [choose(captions, "random", draw) for draw in (0.0, 0.34, 0.67, 0.999)] == ["one", "two", "three", "three"]

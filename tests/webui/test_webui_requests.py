"""What a request to the webui may hold: settings, pictures, texts."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fmn_core.erasure.config import PRESETS, make_config
from fmn_core.errors import ForgetError
from fmn_core.evaluation.config import EvaluationConfig
from fmn_webui import forms
from fmn_webui.forms import converted, decoded, folder_pictures, forget_config, given_pictures, rows_of, settings_of
from fmn_webui.limits import MOST_PATCHES, MOST_PICTURES, MOST_REQUEST_TEXT, TooLarge
from fmn_webui.receiving import MOST_REQUEST_DIGITS, MOST_REQUEST_VALUES, parsed


@pytest.mark.parametrize("preset, name, value, said", [
    ("paper", "stepz", 3, "no setting"), ("paper", "steps", "3", "whole number"), ("paper", "steps", 3.5, "whole number"),
    ("paper", "steps", 0, "use a value"), ("paper", "steps", True, "whole number"), ("paper", "steps", None, "whole number"),
    ("paper", "steps", 10**400, "whole number"), ("paper", "learning_rate", math.nan, "a number"),
    ("paper", "learning_rate", "x", "a number"), ("fast", "strict", 1, "true or false"), ("fast", "preserve", 7, "a text"),
    ("paper", "preserve", "dog", "preserves nothing"), ("paper", "mode", "replace", "cannot replace"),
    ("robust", "mode", "correct", "cannot correct"), ("fast", "target", "dog", "no `target`"),
    ("fast", "template", "a {}", "type `custom`"), ("slow", "rank", 4, "choose one"), ("", "rank", 4, "choose one"),
])  # fmt: skip
def test_a_setting_that_is_wrong_is_told(preset, name, value, said):
    with pytest.raises(ForgetError, match=said):
        forget_config(preset, {name: value})


FIELDS = {preset: {f.name: f.default for f in dataclasses.fields(kind)} for preset, kind in PRESETS.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_takes_its_own_settings_and_refuses_those_of_the_others_whatever_they_are(preset):
    assert forget_config(preset, FIELDS[preset]) == forget_config(preset, {}) == make_config(preset)
    others = {name: default for fields in FIELDS.values() for name, default in fields.items()}
    foreign = others.keys() - FIELDS[preset].keys()
    assert foreign
    for name in foreign:
        for value in (others[name], None, [3]):
            with pytest.raises(ForgetError, match=f"`{preset}` has no setting `{name}`"):
                forget_config(preset, {name: value})


def test_settings_take_their_own_types():
    taken = forget_config("paper", {"steps": 3.0, "learning_rate": 0, "seed": 2**64 - 1})
    assert (taken.steps, taken.learning_rate, taken.seed) == (3, 0.0, 2**64 - 1) and isinstance(taken.steps, int)
    assert settings_of(EvaluationConfig, {}) == EvaluationConfig()
    with pytest.raises(ForgetError, match="no_such"):
        settings_of(EvaluationConfig, {"no_such": 1})


def png(size=(4, 6), colour=255, mode="RGB"):
    data = io.BytesIO()
    Image.new(mode, size, (colour,) * 3 if mode == "RGB" else colour).save(data, "png")
    return data.getvalue()


def test_pictures_and_masks_come_in_the_first_ones_size():
    given = [png((4, 6)), png((8, 8), 0)], [png((8, 12), 255, "L"), png((8, 8), 0, "L")]
    images, mask = given_pictures(*given, 0, True)
    assert images.shape == (2, 6, 4, 3) and mask.shape == (2, 6, 4) and images.dtype == mask.dtype == torch.uint8
    assert mask[0].min() == 255 and mask[1].max() == 0 and images[0].min() == 255 and images[1].max() == 0
    assert given_pictures([], [], 0, True) == (None, None) and given_pictures([png()], [], 0, True)[1] is None
    assert given_pictures([png(), png()], [png(mode="L")], 0, True)[1].shape == (1, 6, 4)


WRONG_PICTURES = [
    ([b"no picture"], [], "cannot be read"), ([], [b"x"], "no picture"), ([png()], [b"x"], "cannot be read"),
    ([png()], [png(), png()], "one for each"), ([png((4, 6))], [png((6, 4))], "picture's shape"),
]  # fmt: skip


@pytest.mark.parametrize("pictures, masks, said", WRONG_PICTURES)
def test_what_is_no_picture_is_told(pictures, masks, said):
    with pytest.raises(ForgetError, match=said):
        given_pictures(pictures, masks, 0, True)


def test_pictures_that_nobody_needs_are_not_decoded(monkeypatch):
    monkeypatch.setattr(forms, "read_pictures", None)
    assert given_pictures([png((8000, 7999))], [], 0, False) == (None, None)
    with pytest.raises(ForgetError, match="cannot be read"):
        given_pictures([b"no picture"], [], 0, False)


@pytest.mark.parametrize("pictures, masks", [
    ([png()] * MOST_PICTURES, [png()]), ([png((8000, 7999))] * 16, []), ([png((2048, 2048)), *[png()] * 60], []),
])  # fmt: skip
def test_more_than_one_request_may_have_is_refused_before_it_is_decoded(monkeypatch, pictures, masks):
    monkeypatch.setattr(forms, "read_pictures", None)
    with pytest.raises(TooLarge):
        given_pictures(pictures, masks, 0, True)


def test_a_folder_has_to_be_there_and_have_pictures(tmp_path):
    assert folder_pictures(" ") == []
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(ForgetError, match="There is no"):
            folder_pictures(str(folder))
    (tmp_path / "one.PNG").write_bytes(png())
    assert folder_pictures(f" {tmp_path} ") == [tmp_path / "one.PNG"]


@pytest.mark.parametrize("texts", ["no list", [3], ["%%%"], {"a": 1}])
def test_what_is_no_base64_is_told(texts):
    with pytest.raises(ForgetError, match="base64"):
        decoded(texts, "`images`")


def test_more_pictures_than_a_request_may_have_are_not_decoded():
    with pytest.raises(TooLarge):
        decoded(["%%%"] * (MOST_PICTURES + 1), "`images`")


@pytest.mark.parametrize("rows", [
    3, "x", ["x"], ["xy"], [["x"]], [["x", "much"]], [["x", math.inf]], [["x", math.nan]], [None], [["x", 10**4000]],
    [[3, 1]], [["x", True]], [["x", None]], [["cat\ud800", 1]], {"x": 1}, [["x", 1.0]] * (MOST_PATCHES + 1),
    [["x" * (MOST_REQUEST_TEXT + 1), 1]],
])  # fmt: skip
def test_what_is_no_row_is_told(rows):
    with pytest.raises(ForgetError):
        rows_of(rows)


def test_texts_are_no_longer_than_a_page_and_whole():
    assert converted("concept", "x" * MOST_REQUEST_TEXT, "") == "x" * MOST_REQUEST_TEXT
    with pytest.raises(TooLarge, match="100,000 are the most"):
        converted("concept", "x" * (MOST_REQUEST_TEXT + 1), "")
    with pytest.raises(ForgetError, match="invalid Unicode"):
        converted("concept", "cat\ud800", "")


BODIES = [
    b"", b"[]", b"3", b"{", b"\xff{}", b"{\"a\": NaN}", b"{\"a\": [-Infinity]}", b'{"a": "cat\\ud800"}',
    b'{"cat\\udc00": 1}',
    b'{"a": ' + (MOST_REQUEST_DIGITS + 1) * b"9" + b"}", 100_000 * b"[", b'{"a": ' + 100_000 * b"[" + 100_000 * b"]" + b"}",
    b"[" + MOST_REQUEST_VALUES * b"0," + b"0]", '{"a": 1}'.encode("utf-16"),
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_a_body_that_is_no_object_of_whole_texts_and_numbers_is_refused(body):
    with pytest.raises(ForgetError):
        parsed(body)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text('{}[]":,0e9Na\\ud8 ', max_size=60).map(str.encode)))
def test_any_body_is_taken_whole_or_refused(body):
    try:
        value = parsed(body)
    except ForgetError:
        return
    assert isinstance(value, dict) and json.dumps(value, ensure_ascii=False).encode()

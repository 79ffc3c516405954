"""Names, tags, infotexts and forms: what users and requests write, before any model sees it."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fmn_core.erasure.config import PRESETS, make_config
from fmn_core.errors import ForgetError
from fmn_core.evaluation.config import EvaluationConfig
from fmn_webui import forms, infotext, names
from fmn_webui.forms import converted, decoded, folder_pictures, forget_config, given_pictures, rows_of, settings_of
from fmn_webui.infotext import SCRIPT_ROWS, ScriptOptions
from fmn_webui.limits import MOST_PATCHES, MOST_PICTURES, MOST_REQUEST_TEXT, TooLarge
from fmn_webui.names import MOST_PATCH_NAME, STACKS, PatchList, can_be_called, check_name, new_patch_path, unfinished_name
from fmn_webui.receiving import MOST_REQUEST_DIGITS, MOST_REQUEST_VALUES, parsed
from fmn_webui.tags import unet_weight, with_params, with_tags

BAD = [
    "../evil", "a/b", "a\\b", "/etc/passwd", "C:evil", "..", ".hidden", "x.", "nul", "COM1.x", "a:b", "a,b", "<lora>", "a=b",
    "a\0b", "a\nb", "a\u202eb", "x" * (MOST_PATCH_NAME + 1), "None", "a|b", "?", "~/../../x", "..\\..\\x",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_no_name_leaves_the_lora_folder(tmp_path, name):
    with pytest.raises(ForgetError, match="cannot be a patch's name"):
        new_patch_path(tmp_path, name, "cat")


@pytest.mark.parametrize(
    "name", ["", "mine", "mine.safetensors", "a" * MOST_PATCH_NAME, "a" * (MOST_PATCH_NAME - len("-unfinished")) + " b"]
)
def test_what_a_stopped_training_is_called_can_be_a_patchs_name(name):
    made = unfinished_name(name, "cat")
    assert check_name(made) == made and made.endswith("-unfinished") and ".safetensors" not in made


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=40))
def test_a_name_that_is_taken_is_one_file_in_the_folder(name):
    try:
        checked = check_name(name)
    except ForgetError:
        return
    folder = Path("/loras")
    assert (folder / f"{checked}.safetensors").parent == folder and not set(checked) & set('/\\:<>,="|?*\0\n')


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_a_concept_of_any_letters_makes_a_name(concept):
    path = new_patch_path(Path("/nowhere"), "", concept)
    assert path.parent == Path("/nowhere") and check_name(path.stem) == path.stem


def test_names_in_use_anywhere_in_the_folder_are_not_taken_over(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below/Forget-Cat.safetensors").write_bytes(b"")
    (tmp_path / "left.json").write_text("{}")
    (tmp_path / "whole-unet.safetensors").write_bytes(b"")
    assert new_patch_path(tmp_path, "", "cat").name == "forget-cat-2.safetensors"
    for name in ("forget-cat", "left", "whole", "forget-cat.safetensors"):
        with pytest.raises(ForgetError, match="never overwritten"):
            new_patch_path(tmp_path, name, "")


def test_only_patches_are_listed(tmp_path):
    (tmp_path / "ordinary.safetensors").write_bytes(b"no lora")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    assert PatchList()(tmp_path) == {} == PatchList()(tmp_path / "no folder")


@pytest.mark.parametrize("when", ["seen", "read"])
def test_files_that_go_while_patches_are_listed_are_not(tmp_path, monkeypatch, when):
    """Once seen as a file, or about to be read; stacked ones, which go at any time, are not even looked at."""
    for name in ("gone", "kept", f"{STACKS[0]}/fmn-stack"):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"a patch")
    asked, is_file = [], Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: asked.append(path.stem) or (is_file(path) and goes(path, "seen")))

    def goes(path, moment):
        if path.stem == "gone" and moment == when:
            path.unlink()
        return path.stem == "gone" or path.stat().st_size > 0

    monkeypatch.setattr(names, "is_patch", lambda path: goes(path, "read") and bool(path.read_bytes()))
    assert [*PatchList()(tmp_path)] == ["kept"]
    assert "fmn-stack" not in asked


@pytest.mark.parametrize("prompt, tag", [
    ("a cat", "<lora:x:0.5>"),
    ("a cat <lora:x:1>", "<lora:x:1.5>"),
    ("a cat <lora:x>", "<lora:x:1.5>"),
    ("<lora:x:0.2:0.3>a cat", "<lora:x:0.8>"),
    ("a cat <lora:x:te=0.1:unet=2>", "<lora:x:2.5>"),
    ("a <lora:x:1>cat <lora:x:1>", "<lora:x:2.5>"),
])  # fmt: skip
def test_a_patch_is_in_a_prompt_once_at_the_sum(prompt, tag):
    found = with_tags(prompt, [("x", 0.5)])
    assert found.count("<lora:") == 1 and found.endswith(tag) and "cat" in found


def test_other_tags_stay():
    assert (
        with_tags("a <lora:xy:1> <lora:x (1):2>", [("x", 1.0), ("x (1)", 1.0)]) == "a <lora:xy:1> <lora:x:1><lora:x (1):3>"
    )
    assert with_tags("a cat", []) == "a cat" and unet_weight(["much"]) == 1.0


def test_tags_taken_apart_are_summed_too():
    class Params:
        def __init__(self, items):
            self.items = items

    found = with_params([Params(["x", "1"]), Params(["y", "1"])], [("x", -0.25)], Params)
    assert [each.items for each in found] == [["y", "1"], ["x", "0.75"]]


def values(patches=(), *rest):
    rows = [*patches, *[(infotext.NONE, 1.0)] * SCRIPT_ROWS][:SCRIPT_ROWS]
    return (*(value for row in rows for value in row), *(rest or (True, False, "", "overlay", 0.6, "inferno", False)))


def test_what_goes_into_an_infotext_comes_back_from_it():
    wanted = ScriptOptions.of(
        values([("forget-cat", 1.0), ("b", 0.5), ("b", 0.25)], True, True, "cat, hat", "contact_sheet", 0.4, "magma", True)
    )
    assert wanted.patches == (("forget-cat", 1.0), ("b", 0.75))
    params = wanted.infotext()
    assert [infotext.patch_of(row)(params) for row in range(SCRIPT_ROWS)] == ["forget-cat", "b", infotext.NONE]
    assert [infotext.strength_of(row)(params) for row in range(SCRIPT_ROWS)] == [1.0, 0.75, 1.0]
    assert params[infotext.WORDS] == "cat, hat" and infotext.restored(infotext.OPACITY, 0.6, float)(params) == 0.4
    assert infotext.restored(infotext.OPACITY, 0.6, float)({infotext.OPACITY: "much"}) == 0.6
    assert ScriptOptions.of(values()).infotext() == {} and infotext.patch_of(0)({infotext.PATCHES: "x: much"}) == "x: much"


@pytest.mark.parametrize("wrong", [
    values([("x", math.nan)]), values([("x", "-inf")]), values([("x", 10**400)]), values([("x", 1e308), ("x", 1e308)]),
    values([("cat\ud800", 1.0)]), values((), True, True, "cat\ud800", "overlay", 0.5, "inferno", False),
    values([("x", "much")]), values()[:-1], values((), True, True, "", "spiral", 0.5, "inferno", False),
    values((), True, True, "", "contact_sheet", 7, "inferno", False),
    values((), True, True, "", "contact_sheet", math.nan, "inferno", False),
])  # fmt: skip
def test_a_request_that_is_wrong_is_told(wrong):
    with pytest.raises(ForgetError):
        ScriptOptions.of(wrong)


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


def test_what_an_infotext_says_of_patches_is_never_passed_over():
    rows = [(infotext.patch_of(row), infotext.strength_of(row)) for row in range(SCRIPT_ROWS)]

    def read(text):
        return [(patch({infotext.PATCHES: text}), strength({infotext.PATCHES: text})) for patch, strength in rows]

    nothing = (infotext.NONE, 1.0)
    assert read("a: 1, b: 0.5") == [("a", 1.0), ("b", 0.5), nothing] and read("") == [nothing] * 3
    for unread in ("a", "a: much", "a: nan", "a: 1, b", "a: 1, b: 1, c: 1, d: 1", ": 1", "a: 1,, b: 1", "a:1:"):
        assert read(unread) == [(unread, 1.0), nothing, nothing]


@given(st.lists(st.tuples(st.text(min_size=1, max_size=12), st.floats(-2, 2)), max_size=SCRIPT_ROWS))
def test_patches_that_can_be_called_come_back_from_an_infotext(wished):
    wished = [(name.strip(), strength) for name, strength in wished if can_be_called(name.strip()) and name.strip()]
    wanted = ScriptOptions.of(values(wished))
    params = wanted.infotext()
    found = [(infotext.patch_of(row)(params), infotext.strength_of(row)(params)) for row in range(SCRIPT_ROWS)]
    assert [(name, f"{strength:g}") for name, strength in found if name != infotext.NONE] == [
        (name, f"{strength:g}") for name, strength in wanted.patches
    ]

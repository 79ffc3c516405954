"""Names, tags, infotexts and forms: what users and requests write, before any model sees it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmn_core.errors import ForgetError
from fmn_webui import infotext, names
from fmn_webui.infotext import SCRIPT_ROWS, ScriptOptions
from fmn_webui.names import MOST_PATCH_NAME, STACKS, PatchList, can_be_called, check_name, new_patch_path, unfinished_name
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

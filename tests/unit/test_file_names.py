"""Names of files, whatever is typed or stands in a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmn_core.errors import ForgetError
from fmn_core.files.names import DEVICES, distinct, folder_and_name, slug

ANY = st.text(st.characters() | st.sampled_from("/\\.:\u2215\uff0f\uff0e\u2024\u202e \0"), max_size=40)


@given(ANY)
def test_a_name_stays_in_its_folder(text):
    try:
        found = folder_and_name(text, "output/loras")
    except ForgetError:
        return
    root = Path("/root/output")
    inside = Path(os.path.normpath(root / found))
    assert inside == root or root in inside.parents
    assert found.isprintable() and not set(found) & set('\\<>:"|?*')
    for part in found.split("/"):
        assert part == part.strip() and not part.endswith(".") and len(part.encode()) <= 180
        assert part.split(".")[0].strip().upper() not in DEVICES


@given(st.text())
def test_a_slug_is_a_plain_name(text):
    plain = slug(text)
    assert plain and all(c.isalnum() or c in "-_" for c in plain)
    assert len(plain.encode()) <= 121 and plain.upper() not in DEVICES


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("..", "leads out of"), ("a/../../b", "leads out of"), ("..\\b", "leads out of"), ("/etc/x", "leads out of"),
        ("\\\\server\\x", "leads out of"), ("\uff0e\uff0e\uff0fx", "leads out of"), ("\u2025/x", "leads out of"),
        ("C:\\x", "no file name should"), ("a:stream", "no file name should"), ("a\0b", "no file name should"),
        ("a\u202egpj", "no file name should"), ("a\u2215b", "no file name should"), ("a\nb", "no file name should"),
        ("con", "device"), ("NUL.safetensors", "device"), ("x/Aux/y", "device"), ("com\u00b9", "device"),
        ("lpt9 .x", "device"),        ("a.", "edge"), ("a /b", "edge"), ("x" * 300, "too long"), ("\u732b" * 70, "too long"),
    ],
)  # fmt: skip
def test_what_leads_elsewhere_or_means_something_else_is_refused(text, why):
    with pytest.raises(ForgetError, match=why):
        folder_and_name(text, "output/loras")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cat", "cat"),
        ("a/b", "a/b"),
        ("a\\b", "a/b"),
        ("a//b", "a/b"),
        ("./a", "a"),
        ("a/", "a/"),
        ("", ""),
        ("\ufb01x", "fix"),
    ],
)
def test_what_is_plain_stays(text, found):
    assert folder_and_name(text, "output/loras") == found


def test_slugs_of_devices_and_long_names():
    assert slug("CON") == "con-" and slug("Van Gogh!") == "van-gogh" and slug("../..") == "concept"
    assert len(slug("\u732b" * 500).encode()) <= 120


@given(st.lists(st.sampled_from(["cat", "cat-1", "cat-2", "cat-1-1", "dog"]), max_size=9))
def test_names_that_come_several_times_are_told_apart(names):
    found = distinct(names)
    assert len({*found}) == len(found) == len(names)
    assert all(
        own == name if names.count(name) == 1 else own.startswith(f"{name}-") for own, name in zip(found, names, strict=True)
    )

"""Text from files and requests: never a command to a terminal, or what cannot be encoded."""

from __future__ import annotations

import json
import re

import pytest
from hostile_files import renamed, write
from hypothesis import given
from hypothesis import strategies as st

from fmn_core.errors import ForgetError
from fmn_core.log import CONTROL, displayable, quoted, replace_surrogates

ANY_TEXT = st.text(st.characters(), max_size=40)  # surrogates too


@given(ANY_TEXT)
def test_displayable_text_can_be_encoded_and_commands_no_terminal(text):
    shown = displayable(text)
    shown.encode()
    assert not CONTROL.search(shown) and displayable(shown) == shown


@given(st.text(st.characters(blacklist_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]) | st.sampled_from("\n\t"), max_size=40))
def test_ordinary_text_is_shown_as_it_is(text):
    assert displayable(text) == text


@given(ANY_TEXT)
def test_a_text_in_the_log_is_one_line_in_quotes(text):
    told = quoted(text)
    told.encode()
    assert len(told.splitlines()) == 1 and not CONTROL.search(told)
    assert told[0] == told[-1] == '"' and len(re.findall(r'(?<!\\)(?:\\\\)*"', told)) == 2


def test_letters_of_every_language_are_letters_in_the_log():
    assert [quoted(name) for name in ("猫", "кошка", "two\nlines", 1.0, 7)] == ['"猫"', '"кошка"', '"two\\nlines"', "1", "7"]


@given(st.recursive(ANY_TEXT | st.floats(allow_nan=False) | st.none(), lambda inner: st.lists(inner, max_size=3)
       | st.dictionaries(ANY_TEXT, inner, max_size=3), max_leaves=8))  # fmt: skip
def test_json_without_surrogates_can_be_encoded(value):
    json.dumps(replace_surrogates(value), ensure_ascii=False).encode()


@given(ANY_TEXT)
def test_every_error_can_be_encoded(text):
    message = str(ForgetError(f"`{text}` is not there."))
    message.encode()
    assert not CONTROL.search(message)


@pytest.mark.parametrize("name", ["cat\x1b[31m\x1b]0;title\x07", "cat\u202etxt", "cat\ud800", "cat\x9b31m"])
@pytest.mark.parametrize("inside", [False, True], ids=["name", "report"])
def test_no_command_passes_a_files_control_characters_to_the_terminal(command_line, tmp_path, name, inside):
    one, two, both = (tmp_path / f"{file}.safetensors" for file in ("one", "two", "both"))
    patch = renamed("cat" if inside else name)
    patch.info["report"]["warnings"] = [name]
    write(patch, one)
    write(renamed("dog"), two)
    commands = [
        ["inspect", one],
        ["inspect", "--json", one],
        ["stack", one, two, "--output", both],
        ["unstack", both, "--output", tmp_path],
        ["convert", one, "--to", "peft", "--output", tmp_path / "peft.safetensors"],
        ["convert", one, "--output", tmp_path / "again.safetensors"],
    ]
    for command in commands:
        done = command_line(*command)
        (done.stdout + done.stderr).encode()
        assert not CONTROL.search(done.stdout + done.stderr) and "Traceback" not in done.stderr, command

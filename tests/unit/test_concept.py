"""Concepts: their names, types and templates, and where their tokens stand."""

from __future__ import annotations

import pytest

from fmn_core.errors import ForgetError
from fmn_core.host import Token
from fmn_core.text.concept import make_concepts
from fmn_core.text.tokens import find_tokens


def test_special_tokens_never_match():
    start, end = Token(1, "<start>", "start"), Token(2, "<end>", "end")
    word = Token(5, "cat</w>", "word")
    assert find_tokens((start, word, end, end), (start, word, end)) == [[1]]
    assert find_tokens((start, word, end), (start, end)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "concept is empty"),
        (("  \n ",), "concept is empty"),
        (("cat\ndog, Cat",), "`cat` is named twice"),
        (("cat", "thing"), "type `thing` is unknown"),
        (("cat", "custom", ""), "needs a template"),
        (("cat", "custom", "a cat"), "has no {}"),
    ],
)
def test_bad_concepts_get_a_sentence(arguments, message):
    with pytest.raises(ForgetError, match=message):
        make_concepts(*arguments)


def test_templates_of_each_type():
    (style,) = make_concepts("Van  Gogh", "style")
    assert style.prompts == (("a photo in the style of Van Gogh", "Van Gogh"),)
    (custom,) = make_concepts("cat", "custom", "a {}\n\n {} and a {} ")
    assert custom.prompts == (("a cat", "cat"), ("cat and a cat", "cat"))


def test_one_concept_a_line_and_other_names_after_commas():
    cat, car = make_concepts(" cat , kitten,\n\ncar\n")
    assert (cat.name, cat.names, car.names) == ("cat", ("cat", "kitten"), ("car",))
    assert [name for _, name in cat.prompts] == ["cat", "kitten"]

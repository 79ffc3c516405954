"""The columns that a concept takes, by the host's own tokenizer."""

from __future__ import annotations

import pytest

from fmn_core.errors import ForgetError
from fmn_core.text.tokens import concept_mask


def columns_of(host, name, prompt, tokens):
    return concept_mask(host, name, prompt, tokens).nonzero().flatten().tolist()


def test_columns_of_each_choice(host):
    prompt = "a photo of a cat here"  # start, a, photo, of, a, cat, here, end, padding
    assert columns_of(host, "cat", prompt, "concept") == [5]
    assert columns_of(host, "cat", prompt, "concept_and_end") == [5, 7]
    assert columns_of(host, "cat", prompt, "concept_onward") == list(range(5, 77))


def test_a_start_token_is_never_penalised(host):
    found = columns_of(host, "cat", "a cat " + "house " * 80, "concept_onward")
    assert 77 not in found and set(found) == set(range(2, 154)) - {77}


def test_every_mention_and_several_tokens(host):
    assert columns_of(host, "red cat", "a red cat, a cat, Red Cat", "concept") == [2, 3, 8, 9]


def test_weights_and_brackets_do_not_matter(host):
    assert columns_of(host, "cat", "a (cat:1.3) and ((cat))", "concept") == [2, 4]


def test_a_mention_across_two_chunks_is_found(host):
    filler = "house " * 74  # columns 1 to 74; the last before the end token is 75
    found = columns_of(host, "red cat", filler + "red cat", "concept")
    assert len(found) == 2
    tokens = host.tokenize(filler + "red cat")
    assert [tokens[c].text for c in found] == ["red</w>", "cat</w>"]


def test_a_concept_that_is_cut_off_or_absent_is_named(host):
    with pytest.raises(ForgetError, match="No token of the prompt `a photo of a dog` stands for `cat`"):
        columns_of(host, "cat", "a photo of a dog", "concept")

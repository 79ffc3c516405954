"""JSON is read within bounds of depth and values, and as the library reads it inside of them."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fmn_core.files import bounded_json
from fmn_core.files.bounded_json import parse_json

AWKWARD = st.text(st.sampled_from('[]{},:"\\/\n\u732b\U0001f408a9'), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | AWKWARD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(AWKWARD, inner, max_size=4),
    max_leaves=12,
)


@given(JSON, st.booleans())
def test_json_inside_the_bounds_is_what_it_always_was(value, escaped):
    text = json.dumps(value, ensure_ascii=escaped)
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text) == value


def count(value):
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return 1 + sum(map(count, inner))


def depth(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(JSON, st.integers(1, 6))
@example(["[[[[[["], 1)
@example(['\\"[[', '\\\\"'], 1)
def test_depth_is_counted_outside_of_texts(value, most):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bounded_json, "MOST_DEPTH", most)
        if depth(value) > most:
            with pytest.raises(ValueError, match="deep"):
                parse_json(json.dumps(value))
        else:
            assert parse_json(json.dumps(value)) == value


@given(JSON)
def test_no_more_values_come_out_than_were_counted(value):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bounded_json, "MOST_VALUES", 6)
        try:
            assert count(parse_json(json.dumps(value))) <= 1 + 2 * 6
        except ValueError as error:
            assert count(value) > 3, error


@pytest.mark.parametrize(
    "text",
    [
        "9" * 65,
        "1." + "9" * 64,
        "[" * 33,
        '{"a":' * 700,
        '"' + "\\n" * ((1 << 20) + 1) + '"',
        "[" + "[]," * (1 << 18) + "[]]",
        "\ufeff1",
    ],
    ids=lambda text: f"{len(text)}-{text[:5]!a}",
)
def test_json_out_of_the_bounds_is_refused(text):
    with pytest.raises(ValueError):
        parse_json(text)
    with pytest.raises(ValueError):
        parse_json(text.encode())

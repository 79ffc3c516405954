"""A dictionary of what was asked for last."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fmn_core.text.recent import Recent


@given(st.integers(1, 5), st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=40))
def test_recent_items_are_those_that_were_set_or_asked_for_last(most, calls):
    recent, order = Recent(most), []
    for sets, key in calls:
        if sets:
            recent[key] = -key
        elif key in order:
            assert recent[key] == -key
        else:
            assert key not in recent
            continue
        order = ([own for own in order if own != key] + [key])[-most:]
        assert [*recent.items()] == [(key, -key) for key in order]

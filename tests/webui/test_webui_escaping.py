"""Every text that the webui's pages and answers show: anybody's, and shown as text."""

from __future__ import annotations

import html.parser
import json
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from fmn_core.log import replace_surrogates
from fmn_webui.escaping import Markup, joined, json_values, markup, sentence
from fmn_webui.jobs import ENDS, Job, JobResult
from fmn_webui.status import error_html, report_html, status_html

OURS = {"div", "b", "p", "span", "ol", "li", "code", "details", "summary", "pre", "img"}
# Any text, half characters and what pages are broken with among it.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=())),
    st.lists(
        st.sampled_from([*"<>&\"'`{}/=", "script", "<img src=x onerror=alert(1)>", "&lt;", "\ud800", "{0}", "</pre>"])
    ).map("".join),
)


class Reader(html.parser.HTMLParser):
    """What a browser makes of HTML: tags with their attributes, and the text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        raise AssertionError(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


def check(page, *shown):
    """Only our tags with our attributes are in the page, and every text as it was, but for halves of characters."""
    page.encode()
    found = Reader(page)
    for tag, attributes in found.tags:
        assert tag in OURS and set(attributes) <= {"class", "style"}, (tag, attributes)
        assert all(value.startswith("fmn-") or value.startswith("width:") for value in attributes.values())
    for text in shown:
        assert replace_surrogates(text).replace("`", "") in found.text.replace("`", ""), text


def job_of(state, title, lines, error, figures=None):
    result = JobResult(lines, figures=figures)
    return Job("forget", title, None, state=state, result=result, error=error, started=1.0, ended=time.time())


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.lists(TEXTS, max_size=3), TEXTS)
def test_jobs_are_shown_as_text(title, lines, error):
    jobs = [job_of(state, title, lines, error) for state in ("queued", "running", *ENDS)]
    check(status_html(jobs), title, *lines, error)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(TEXTS, max_size=2),
    st.dictionaries(TEXTS, st.one_of(TEXTS, st.floats(), st.lists(TEXTS, max_size=2)), max_size=3),
)
def test_reports_are_shown_as_text(lines, figures):
    check(
        report_html(job_of("done", "", lines, "", figures)),
        *lines,
        *(json.dumps(replace_surrogates(key), ensure_ascii=False) for key in figures),
    )


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_sentences_are_text_wherever_they_go(text):
    check(error_html(text), text)
    check(sentence(text), text)
    check(markup("<p>{}</p>", text), text)
    check(joined([text, markup("<b>{}</b>", text)]), text)
    assert markup("{}", Markup("<b></b>")) == "<b></b>"


@settings(max_examples=300, deadline=None)
@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS), lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)), max_leaves=8))  # fmt: skip
def test_whatever_is_answered_can_be_sent(value):
    json.loads(json.dumps(json_values(value), ensure_ascii=False, allow_nan=False).encode())


@given(TEXTS)
def test_whole_texts_stay_as_they_are(text):
    try:
        text.encode()
        assert replace_surrogates(text) == text
    except UnicodeEncodeError:
        assert replace_surrogates(text).encode() and replace_surrogates(text) != text

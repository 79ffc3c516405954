"""The public API: every name that docs/python-api.md lists."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

from conftest import ROOT

import fmn_core

DOCS = (ROOT / "docs" / "python-api.md").read_text()


def test_the_docs_list_every_public_name():
    assert set(fmn_core.PUBLIC) <= set(re.findall(r"\w+", DOCS))


def test_every_public_name_is_there_and_says_what_it_is():
    for name in fmn_core.PUBLIC:
        assert inspect.getdoc(getattr(fmn_core, name)), name
    assert set(fmn_core.PUBLIC) <= set(dir(fmn_core))


def test_importing_the_package_imports_no_torch():
    code = "import sys, fmn_core; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

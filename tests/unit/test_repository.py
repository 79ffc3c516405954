"""The house's own rules: what imports what, what the pack never does, and links that lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def headings(path) -> list[str]:
    """What a page's headings are called in a link."""
    found = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found]


def test_pictures_and_links_of_the_readme_exist():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert len(links) > 8
    for link in links:
        file, _, heading = link.partition("#")
        assert (ROOT / file).exists(), link
        assert not heading or heading in headings(ROOT / file), link


def test_ruff_is_clean():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_core_knows_no_host_outside_its_adapters():
    hosts = re.compile(r"^\s*(import|from) (comfy|comfy_api|folder_paths|modules|gradio|diffusers)\b", re.MULTILINE)
    for path in (ROOT / "fmn_core").rglob("*.py"):
        assert "hosts" in path.relative_to(ROOT).parts or not hosts.search(path.read_text()), path


def test_the_pack_runs_nothing_and_calls_nobody():
    """In what a host loads: no subprocess, network, eval or pickle."""
    banned = re.compile(
        r"\b(subprocess|urllib|import requests|from requests|socket|pickle|eval|exec|torch\.load|os\.system)\b"
    )
    loaded = (path for folder in ("nodes", "fmn_core", "fmn_webui", "scripts") for path in (ROOT / folder).rglob("*.py"))
    for path in (ROOT / "__init__.py", *loaded):
        assert not banned.search(path.read_text()), path

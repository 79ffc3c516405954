"""The house's own rules: what imports what, what the pack never does, and links that lead somewhere."""

from __future__ import annotations

import ast
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


PACK = [path for folder in ("nodes", "fmn_core", "fmn_webui", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
SAME = {  # by hosts, or by panels, what does the same in each
    "PLACES", "PROBES", "ROWS", "T", "TENSORS", "TEXT_MODEL", "cache_folder", "job_of", "pictures_for", "record_attention",
    "token_embeddings", "tokens_of",
}  # fmt: skip
HOOKS = {"ask", "run"}  # called by the host, in its order


def test_what_is_read_in_a_sitting_stays_so():
    for path in PACK:
        source = path.read_text()
        assert source.count("\n") <= 300, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                positional = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args) if arg.arg not in ("self", "cls")]
                assert node.end_lineno - node.lineno < 60, (path, node.name)
                assert len(positional) <= 5 or node.name in HOOKS, (path, node.name)


def test_no_two_files_give_one_name_two_meanings():
    found: dict[str, set] = {}
    for path in PACK:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.setdefault(node.name, set()).add(path)
            for target in node.targets if isinstance(node, ast.Assign) else ():
                if isinstance(target, ast.Name) and not target.id.startswith("__"):
                    found.setdefault(target.id, set()).add(path)
    several = {name: paths for name, paths in found.items() if len(paths) > 1}
    assert several.keys() <= SAME, {name: several[name] for name in several.keys() - SAME}

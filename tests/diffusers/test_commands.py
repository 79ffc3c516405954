"""Every command of the repository starts in the one way that its help and all mentions of it say."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

import benchmarks

INTERNAL = ("demo.launch_comfyui",)  # which a server is started by
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("benchmarks", "demo")
    for path in (ROOT / folder).rglob("*.py")
    if 'if __name__ == "__main__":' in path.read_text()
)
MENTIONED = [
    path
    for path in ROOT.rglob("*")
    if path.suffix in (".md", ".py") and not {".venv", ".git"} & set(path.relative_to(ROOT).parts)
]


@pytest.mark.parametrize("module", [module for module in COMMANDS if module not in INTERNAL])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # another test has imported it
def test_a_command_starts_and_says_how(module, monkeypatch, capsys):
    """As `python -m` starts it, in a process that has imported most of what it needs."""
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not ended.value.code and capsys.readouterr().out.startswith(f"usage: python -m {module} ")


@pytest.mark.parametrize("name", ["clients", "faults", "fuzz", "soak"])  # pytest's folder is no package
def test_a_command_among_the_tests_starts_by_its_path(name):
    done = subprocess.run([sys.executable, f"tests/stress/{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


def test_the_benchmarks_that_are_commands_are_listed():
    listed = set(re.search(r"`--help`: (.*?)\.", benchmarks.__doc__, re.S)[1].replace("\n", " ").split(", "))
    assert listed == {module.split(".")[1] for module in COMMANDS if module.startswith("benchmarks.")}


def test_commands_are_mentioned_in_the_way_that_starts_them():
    for path in MENTIONED:
        text = path.read_text()
        assert not re.search(r"python3? (benchmarks|demo)/", text), path
        for module in re.findall(r"python3? -m ((?:benchmarks|demo)[.\w]*\w)", text):
            assert module in COMMANDS or module == "benchmarks.NAME", (path, module)

"""The commands without a graph, on the embedded model as a diffusers pipeline."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from fmn_core.__main__ import main
from fmn_core.patch import read_patch


@pytest.fixture(scope="module")
def model(comfy, tmp_path_factory):
    from demo.export import export_diffusers

    folder = tmp_path_factory.mktemp("model") / "emoji"
    export_diffusers(folder)
    return folder


@pytest.fixture
def run(capsys):
    """run(word, ...) -> returncode, stdout, stderr, in this process, which has the test set-up's operators."""

    def run(*words):
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return SimpleNamespace(returncode=code, **dict(zip(("stdout", "stderr"), capsys.readouterr(), strict=True)))

    return run


def test_forget_and_inspect(run, model, tmp_path):
    file = tmp_path / "p.safetensors"
    command = ["forget", "--model", model, "--concept", "cat, kitten", "--concept", "car", "--device", "cpu", "--out", file]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "`cat` goes" in done.stdout and read_patch(file).info["concept"] == "cat, car"
    again = run(*command)
    assert again.returncode == 1 and "never overwritten" in again.stderr
    shown = run("inspect", file)
    assert "forgets cat, car" in shown.stdout and "made by the preset fast" in shown.stdout
    assert json.loads(run("inspect", "--json", file).stdout)["settings"]["preset"] == "fast"


def test_every_setting_is_an_option_and_bad_ones_get_a_sentence(run, model, tmp_path):
    help = run("forget", "--help").stdout
    for option in ("--preset", "--learning-rate", "--keep", "--strict"):
        assert option in help
    bad = run("forget", "--model", model, "--concept", "cat", "--steps", "0")
    assert bad.returncode == 1 and "steps is 0" in bad.stderr
    missing = run("inspect", tmp_path / "none.safetensors")
    assert missing.returncode == 1 and "not there any more" in missing.stderr

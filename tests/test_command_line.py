"""The commands without a graph, on the embedded model as a diffusers pipeline."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from conftest import ROOT

from fmn_core.__main__ import main
from fmn_core.patch import read_patch


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


def test_a_stopped_training_goes_on(run, model, tmp_path, monkeypatch):
    from fmn_core.hosts.diffusers import DiffusersHost

    settings = ["--preset", "paper", "--steps", "4", "--num-pictures", "1", "--sampling-steps", "2", "--resolution", "64"]
    command = ["forget", "--model", model, "--concept", "cat", "--device", "cpu", *settings, "--out"]
    whole, stopped = tmp_path / "whole/p.safetensors", tmp_path / "stopped/p.safetensors"
    assert run(*command, whole).returncode == 0
    show = DiffusersHost.show_progress

    def stop(host, step, total, preview):
        show(host, step, total, preview)
        if step == 5:
            raise KeyboardInterrupt  # Ctrl+C

    with monkeypatch.context() as patched:
        patched.setattr(DiffusersHost, "show_progress", stop)
        assert run(*command, stopped).returncode == 130
    assert sorted(file.name for file in stopped.parent.iterdir()) == [".forget-me-not", "p-unfinished.safetensors"]
    assert "after step 3 of 4" in run("inspect", stopped.with_name("p-unfinished.safetensors")).stdout
    done = run("--log", *command, stopped)
    assert done.returncode == 0 and stopped.read_bytes() == whole.read_bytes()
    assert not (stopped.parent / ".forget-me-not").exists()


def test_the_doctor_finds_this_machine_well(run):
    done = run("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok  preset paper" in done.stdout and "the model: left as it was" in done.stdout


def test_every_setting_is_an_option_and_bad_ones_get_a_sentence(run, model, tmp_path):
    help = run("forget", "--help").stdout
    for option in ("--preset", "--learning-rate", "--keep", "--strict"):
        assert option in help
    bad = run("forget", "--model", model, "--concept", "cat", "--steps", "0")
    assert bad.returncode == 1 and "steps is 0" in bad.stderr
    missing = run("inspect", tmp_path / "none.safetensors")
    assert missing.returncode == 1 and "not there any more" in missing.stderr


def test_words_are_learned_and_forgotten_by(run, model, tmp_path):
    file, patch = tmp_path / "my-cat.safetensors", tmp_path / "p.safetensors"
    command = ["invert", "--model", model, "--concept", "cat", "--out", file, "--device", "cpu", "--steps", "20"]
    quick = ["--learning-rate", "2e-2", "--num-pictures", "1", "--sampling-steps", "8", "--initializers", "dog", "--no-flip"]
    done = run(*command, *quick)
    assert done.returncode == 0, done.stderr
    assert "1 word learned in 20 steps" in done.stdout and "my-cat.safetensors" in done.stdout
    again = run(*command, *quick)
    assert again.returncode == 1 and "never overwritten" in again.stderr
    done = run("forget", "--model", model, "--embedding", file, "--device", "cpu", "--out", patch)
    assert done.returncode == 0, done.stderr
    assert "`<my-cat>` goes" in done.stdout and read_patch(patch).info["concept"] == "<my-cat>"
    nothing = run("forget", "--model", model, "--device", "cpu")
    assert nothing.returncode == 1 and "There is no concept" in nothing.stderr
    lost = run("invert", "--model", model, "--images", tmp_path / "none", "--out", tmp_path / "x.safetensors")
    assert lost.returncode == 1 and "There is no folder" in lost.stderr


def test_evaluate_writes_figures_a_picture_and_the_patch_with_them(run, model, tmp_path):
    from PIL import Image

    patch = ROOT / "demo/loras/forget-cat.safetensors"
    names = {kind: tmp_path / f"report.{kind}" for kind in ("json", "png", "safetensors")}
    quick = ["--prompts", 1, "--steps", 2, "--resolution", 64, "--keep", "house", "--device", "cpu", "--model", model]
    done = run("evaluate", patch, *quick, "--json", names["json"], "--picture", names["png"], "--out", names["safetensors"])
    assert done.returncode == 0, done.stderr
    report = json.loads(names["json"].read_text())
    assert "`cat`: what its prompts do changes by" in done.stdout and report["summary"] == done.stdout.strip()
    assert Image.open(names["png"]).width > 500
    assert read_patch(names["safetensors"]).info["report"]["evaluation"] == report
    assert report["summary"] in run("inspect", names["safetensors"]).stdout
    again = run("evaluate", patch, *quick, "--out", names["safetensors"])
    assert again.returncode == 1 and "never overwritten" in again.stderr
    wrong = run("evaluate", patch, *quick, "--clip", tmp_path)
    assert wrong.returncode == 1 and "no CLIP model" in wrong.stderr

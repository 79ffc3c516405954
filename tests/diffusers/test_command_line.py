"""The commands without a graph, on the demo model as a diffusers pipeline."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from demo.host import CHECKPOINT
from fmn_core.cli import doctor
from fmn_core.patch.file import read_patch, save_patch


@pytest.fixture
def run(command_line):
    return command_line


def test_forget_and_inspect(run, model, tmp_path):
    file = tmp_path / "p.safetensors"
    command = [
        "forget",
        "--model",
        model,
        "--concept",
        "cat, kitten",
        "--concept",
        "car",
        "--device",
        "cpu",
        "--output",
        file,
    ]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "`cat` goes" in done.stdout and read_patch(file).info["concept"] == "cat, car"
    again = run(*command)
    assert again.returncode == 1 and "never overwritten" in again.stderr
    shown = run("inspect", file)
    assert "forgets cat, car" in shown.stdout and "made by the preset fast" in shown.stdout
    assert json.loads(run("inspect", "--json", file).stdout)["settings"]["preset"] == "fast"


def test_a_stopped_training_goes_on(run, model, tmp_path, monkeypatch):
    from fmn_core.hosts.diffusers.model import DiffusersHost

    settings = ["--preset", "paper", "--steps", "4", "--num-images", "1", "--num-inference-steps", "2", "--resolution", "64"]
    command = ["forget", "--model", model, "--concept", "cat", "--device", "cpu", *settings, "--output"]
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
    done = run("--verbose", *command, stopped)
    assert done.returncode == 0 and stopped.read_bytes() == whole.read_bytes()
    assert not (stopped.parent / ".forget-me-not").exists()


def test_the_doctor_finds_this_machine_well(run, comfy):
    done = run("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok   preset paper" in done.stdout and "the model: left as it was" in done.stdout


def test_every_setting_is_an_option_and_bad_ones_get_a_sentence(run, model, tmp_path):
    help = run("forget", "--help").stdout
    for option in ("--preset", "--learning-rate", "--preserve", "--strict"):
        assert option in help
    for preset, sentence in (("paper", "steps is 0"), ("fast", "`fast` has no setting `steps`: it is one of paper")):
        bad = run("forget", "--model", model, "--concept", "cat", "--preset", preset, "--steps", "0")
        assert bad.returncode == 1 and sentence in bad.stderr
    missing = run("inspect", tmp_path / "none.safetensors")
    assert missing.returncode == 1 and "not there any more" in missing.stderr


def test_words_are_learned_and_forgotten_by(run, model, tmp_path):
    file, patch = tmp_path / "my-cat.safetensors", tmp_path / "p.safetensors"
    command = ["invert", "--model", model, "--concept", "cat", "--output", file, "--device", "cpu", "--steps", "20"]
    quick = [
        "--learning-rate",
        "2e-2",
        "--num-images",
        "1",
        "--num-inference-steps",
        "8",
        "--init-tokens",
        "dog",
        "--no-horizontal-flip",
    ]
    done = run(*command, *quick)
    assert done.returncode == 0, done.stderr
    assert "1 word learned in 20 steps" in done.stdout and "my-cat.safetensors" in done.stdout
    again = run(*command, *quick)
    assert again.returncode == 1 and "never overwritten" in again.stderr
    done = run("forget", "--model", model, "--embedding", file, "--device", "cpu", "--output", patch)
    assert done.returncode == 0, done.stderr
    assert "`<my-cat>` goes" in done.stdout and read_patch(patch).info["concept"] == "<my-cat>"
    quick = ["--prompts", 1, "--num-inference-steps", 2, "--resolution", 64, "--model", model, "--device", "cpu"]
    without = run("evaluate", patch, *quick)
    assert without.returncode == 1 and "There is no embedding behind `<my-cat>`" in without.stderr
    assert "with --embedding on the command line" in without.stderr
    done = run("evaluate", patch, *quick, "--embedding", file)  # as the sentence says
    assert done.returncode == 0 and "`<my-cat>`: what its prompts do changes by" in done.stdout, done.stderr
    peft, back = tmp_path / "peft.safetensors", tmp_path / "back.safetensors"
    assert run("convert", patch, "--to", "peft", "--output", peft).returncode == 0
    imported = ["convert", peft, "--model", model, "--device", "cpu", "--concept", "<my-cat>", "--output", back]
    assert run(*imported).returncode == 1
    assert run(*imported, "--embedding", file).returncode == 0 and read_patch(back).info["concept"] == "<my-cat>"
    nothing = run("forget", "--model", model, "--device", "cpu")
    assert nothing.returncode == 1 and "There is no concept" in nothing.stderr
    lost = run("invert", "--model", model, "--images", tmp_path / "none", "--output", tmp_path / "x.safetensors")
    assert lost.returncode == 1 and "There is no folder" in lost.stderr


def test_evaluate_writes_figures_a_picture_and_the_patch_with_them(run, model, tmp_path):
    from PIL import Image

    patch = ROOT / "demo/loras/forget-cat.safetensors"
    names = {kind: tmp_path / f"report.{kind}" for kind in ("json", "png", "safetensors")}
    quick = [
        "--prompts",
        1,
        "--num-inference-steps",
        2,
        "--resolution",
        64,
        "--preserve",
        "house",
        "--device",
        "cpu",
        "--model",
        model,
    ]
    done = run(
        "evaluate", patch, *quick, "--json", names["json"], "--picture", names["png"], "--output", names["safetensors"]
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(names["json"].read_text())
    assert "`cat`: what its prompts do changes by" in done.stdout and report["summary"] == done.stdout.strip()
    assert Image.open(names["png"]).width > 500
    assert read_patch(names["safetensors"]).info["report"]["evaluation"] == report
    assert report["summary"] in run("inspect", names["safetensors"]).stdout
    again = run("evaluate", patch, *quick, "--output", names["safetensors"])
    assert again.returncode == 1 and "never overwritten" in again.stderr
    wrong = run("evaluate", patch, *quick, "--clip", tmp_path)
    assert wrong.returncode == 1 and "no CLIP model" in wrong.stderr


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda folder: shutil.rmtree(folder), "There is no model"),
        (lambda folder: (folder / "model_index.json").unlink(), "model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "JSON"),
        (lambda folder: os.truncate(folder / "unet/diffusion_pytorch_model.safetensors", 20000), "Unable to load weights"),
        (lambda folder: shutil.rmtree(folder / "scheduler"), "scheduler_config.json"),
        (lambda folder: (folder / "unet/config.json").write_text('{"sample_size": 16}'), "expected shape"),
    ],
)
def test_a_model_folder_that_is_missing_or_damaged_gets_a_sentence(run, model, tmp_path, harm, why):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    harm(folder)
    done = run("forget", "--model", folder, "--concept", "cat", "--device", "cpu", "--output", tmp_path / "p.safetensors")
    assert done.returncode == 1 and why in done.stderr and str(folder) in done.stderr
    assert done.stderr.rstrip().endswith(".") and not (tmp_path / "p.safetensors").exists()


def test_a_model_folder_without_its_tokenizer_gets_a_sentence(run, model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    shutil.rmtree(folder / "tokenizer")
    done = run("forget", "--model", folder, "--concept", "cat", "--device", "cpu", "--output", tmp_path / "p.safetensors")
    assert done.returncode == 1 and "its files are missing" in done.stderr


LDM_NAMES = {  # of AutoencoderKL
    r"(down|up)_blocks\.0\.resnets": r"\1.0.block", r"mid_block\.resnets\.0": "mid.block_1", r"conv_norm_out": "norm_out",
    r"mid_block\.resnets\.1": "mid.block_2", r"mid_block\.attentions\.0": "mid.attn_1", r"group_norm": "norm",
    r"\.to_([qkv])\.": r".\1.", r"to_out\.0": "proj_out",
}  # fmt: skip


def with_full_autoencoder(file, folder):
    """The embedded checkpoint with a small AutoencoderKL in place of its own, which diffusers reads out of no single file,
    and the folder of its configs."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)
    tensors = {key: value for key, value in load_file(CHECKPOINT).items() if not key.startswith("first_stage_model")}
    for key, value in vae.state_dict().items():
        for ours, theirs in LDM_NAMES.items():
            key = re.sub(ours, theirs, key)
        as_convolution = "attn_1" in key and value.ndim == 2
        tensors[f"first_stage_model.{key}"] = value[..., None, None] if as_convolution else value
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    shutil.rmtree(folder / "vae")
    vae.save_config(folder / "vae")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": ["diffusers", "AutoencoderKL"]}))


def test_a_single_file_reads_its_configs_beside_it_and_says_what_is_wrong(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file, out = tmp_path / "emoji.safetensors", tmp_path / "p.safetensors"
    shutil.copyfile(CHECKPOINT, file)
    command = ["forget", "--model", file, "--concept", "cat", "--device", "cpu", "--output", out]
    offline = run(*command)
    assert offline.returncode == 1 and offline.stderr.rstrip().endswith(
        f"which needs no weights, at {file.with_suffix('')}."
    )
    shutil.copytree(model, file.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    with_full_autoencoder(file, file.with_suffix(""))
    done = run(*command)
    assert done.returncode == 0, done.stderr
    whole = run(*command[:2], model, *command[3:-1], tmp_path / "whole.safetensors")
    assert whole.returncode == 0, whole.stderr
    both = [read_patch(path) for path in (out, tmp_path / "whole.safetensors")]
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[1])
    out.unlink()
    for harm, why in ((lambda: os.truncate(file, 1000), "damaged"), (file.unlink, "There is no model")):
        harm()
        assert why in run(*command).stderr
    lora = run(*command[:2], ROOT / "demo/loras/forget-cat.safetensors", *command[3:])
    assert "no UNet with text cross-attention" in lora.stderr


def test_libraries_that_do_not_fit_end_in_a_sentence_that_the_doctor_says_too(tmp_path):
    """In a process of its own, with a torchvision that asks torch for an operator that nobody has made."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    (tmp_path / "diffusers.py").write_text("import torchvision")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "FMN_COMFYUI": str(tmp_path)}

    def run(*words):
        command = [sys.executable, "-m", "fmn_core", *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    forgotten, examined = run("forget", "--model", str(tmp_path), "--concept", "cat"), run("doctor")
    assert forgotten.returncode == examined.returncode == 1
    assert forgotten.stderr.startswith("diffusers cannot be imported (operator torchvision::nms does not exist): install")
    assert "FAIL diffusers, imported: diffusers cannot be imported (operator torchvision::nms" in examined.stdout
    assert "Traceback" not in forgotten.stderr + examined.stderr
    assert examined.stderr.splitlines()[-1].endswith("checks failed.")


def test_what_ends_a_check_of_the_doctor_is_a_finding(monkeypatch):
    def broken():
        yield True, "CPU", "well"
        raise KeyError("a driver")

    monkeypatch.setattr(doctor, "devices", broken)
    monkeypatch.setattr(doctor, "self_test", lambda: iter(()))
    assert (False, "devices", "KeyError: 'a driver'") in list(doctor.examine())


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_that_knows_few_letters_gets_their_numbers(encoding, tmp_path):
    name = tmp_path / "猫.safetensors"
    command = [sys.executable, "-m", "fmn_core", "inspect", str(name)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    missing = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert missing.returncode == 1 and b"Traceback" not in missing.stderr
    assert ("猫".encode() if encoding == "utf-8" else b"\\u732b") in missing.stderr
    patch = read_patch(ROOT / "demo/loras/forget-cat.safetensors")
    patch.info["concept"] = "猫"
    save_patch(patch, name)
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert shown.returncode == 0, shown.stderr
    assert ("猫".encode() if encoding == "utf-8" else b"\\u732b") in shown.stdout


def test_a_strength_that_would_have_no_effect_is_refused(run, tmp_path):
    file, out = ROOT / "demo/loras/forget-cat.safetensors", tmp_path / "out.safetensors"
    for strength in ("0.5", "nan"):
        done = run("convert", file, "--to", "diff", "--strength", strength, "--output", out)
        assert done.returncode == 1 and "--strength is for" in done.stderr and not out.exists()

"""Fixtures: the real ComfyUI, imported into this process and as a server of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process a worker; sums in the same order in children too

import pytest
import torch
from hypothesis import settings
from presets import probe_little

from demo.host import CHECKPOINT, comfyui_folder, import_comfyui

ROOT = Path(__file__).parent.parent

pytest.register_assert_rewrite("host_contract")

settings.register_profile("project", deadline=None)  # an example's time says more of the machine's other work than of it
settings.load_profile("project")


SLOW_FOLDERS = ("device", "stress", "browser")
FOLDERS = (*SLOW_FOLDERS, "webui", "comfy", "diffusers", "unit")  # what takes longest first: no process ends alone
SLOW_FIXTURES = {"server", "run_python"}  # a server, or a process that imports what it needs anew


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks each test with its folder's name, and as slow where its folder or what it starts says so; orders the folders."""
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        item.add_marker(folder)
        if folder in SLOW_FOLDERS or SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker("slow")
    items.sort(key=lambda item: FOLDERS.index(item.path.relative_to(ROOT / "tests").parts[0]))


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The folder of the ComfyUI that `python install.py test` set up, or FMN_COMFYUI."""
    try:
        return comfyui_folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def run_python(comfyui):
    """run_python(word, ...) runs the interpreter in the project's folder and fails, with what it printed, where it fails."""

    def run_python(*words):
        environment = {**os.environ, "FMN_COMFYUI": str(comfyui)}
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    return run_python


@pytest.fixture
def little_probed(monkeypatch):
    """For tests of anything but how well a preset trains: what measures that takes longer than a few steps."""
    probe_little(monkeypatch.setattr)


@pytest.fixture
def command_line(capsys):
    """command_line(word, ...) -> returncode, stdout, stderr, in this process, which has the test set-up's operators."""
    from fmn_core.cli.main import main

    def command_line(*words):
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return SimpleNamespace(returncode=code, **dict(zip(("stdout", "stderr"), capsys.readouterr(), strict=True)))

    return command_line


@pytest.fixture(scope="session")
def comfy(comfyui):
    """ComfyUI's own modules in this process, on the CPU, with the demo model known to them."""
    return import_comfyui(comfyui)


@pytest.fixture(scope="session")
def loaded(comfy):
    """MODEL, CLIP, VAE of the demo model, loaded as a graph loads them: in inference mode."""
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT))[:3]


@pytest.fixture
def host(loaded):
    """The demo model as a DiffusionHost."""
    from fmn_core.hosts.comfy.model import ComfyHost

    return ComfyHost(*loaded)


@pytest.fixture(scope="session")
def cats(loaded):
    """Pictures of cats that the model makes, [2, H, W, 3]."""
    from demo.evaluate import sample
    from fmn_core.hosts.comfy.model import ComfyHost

    return sample(ComfyHost(*loaded), ["a cat"] * 2, [1, 2], steps=10)


@pytest.fixture(scope="session")
def sample(comfy, loaded):
    """sample(model, prompt, ...) -> latents [B, 4, h, w], by the host's own sampler in inference mode."""
    _, clip, _ = loaded

    def sample(model, prompt, *, negative="", seed=1, steps=4, cfg=3.0, batch=2, size=(8, 8)):
        with torch.inference_mode():
            positive, empty = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, negative))
            latent = torch.zeros(batch, 4, *size)
            noise = comfy.sample.prepare_noise(latent, seed)
            return comfy.sample.sample(
                model, noise, steps, cfg, "euler", "normal", positive, empty, latent, seed=seed, disable_pbar=True
            )

    return sample


@pytest.fixture(scope="session")
def record(loaded):
    """record(text, model, conditioning, **settings) -> a model that records, and its recording."""
    from fmn_core.attention.recorder import RecordingConfig
    from fmn_core.hosts.comfy.attention import record_attention

    def record(text="a neon drawing of a cat", model=None, conditioning=None, **settings):
        return record_attention(model or loaded[0], loaded[1], text, RecordingConfig(**settings), conditioning)

    return record


@pytest.fixture(scope="session")
def encode(loaded):
    """encode(text, **properties) -> CONDITIONING, as CLIP Text Encode gives it."""
    clip = loaded[1]

    def encode(text, **properties):
        with torch.inference_mode():
            return [[c, {**d, **properties}] for c, d in clip.encode_from_tokens_scheduled(clip.tokenize(text))]

    return encode


@pytest.fixture(scope="session")
def run(comfy, loaded, encode):
    """run(model, positive, ...) -> latents, with conditionings put together by the test."""

    def run(model, positive, negative=None, *, size=(8, 8), batch=2, steps=3, cfg=3.0, sampler="euler", seed=1):
        with torch.inference_mode():
            latent = torch.zeros(batch, 4, *size)
            noise = comfy.sample.prepare_noise(latent, seed)
            negative = encode("") if negative is None else negative
            return comfy.sample.sample(
                model, noise, steps, cfg, sampler, "normal", positive, negative, latent, seed=seed, disable_pbar=True
            )

    return run


@pytest.fixture(scope="session")
def server(comfyui, tmp_path_factory):
    """A running ComfyUI server with the pack in it."""
    from demo.server import ComfyServer

    with ComfyServer(comfyui, tmp_path_factory.mktemp("comfyui")) as server:
        yield server


@pytest.fixture(scope="module")
def pipeline(comfy):
    """The demo model as a diffusers pipeline, one for each file of tests."""
    from demo.export import make_pipeline

    return make_pipeline()


@pytest.fixture(scope="session")
def model(comfy, tmp_path_factory):
    """The folder of the demo model as a diffusers pipeline."""
    from demo.export import export_diffusers

    folder = tmp_path_factory.mktemp("model") / "emoji"
    export_diffusers(folder)
    return folder


@pytest.fixture(scope="session")
def xl_pipeline(comfy):
    """A tiny SDXL pipeline with random weights and CLIP's own tokenizer."""
    from diffusers import AutoencoderTiny, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from demo.recipe.text_encoder import make_tokenizer
    from demo.recipe.unet import make_schedule

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 77, "vocab_size": 49408}
    one, two = (
        CLIPTextConfig(hidden_size=width, intermediate_size=32, projection_dim=width, eos_token_id=49407, **sizes)
        for width in (16, 24)
    )
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=(2, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=40, transformer_layers_per_block=(1, 1), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 24,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).eval(),
        text_encoder=CLIPTextModel(one).eval(), text_encoder_2=CLIPTextModelWithProjection(two).eval(),
        tokenizer=make_tokenizer(), tokenizer_2=make_tokenizer(), unet=unet.eval(), scheduler=make_schedule(),
    )  # fmt: skip

"""The second demo model: one model in ComfyUI and diffusers, known by its own key, listed on request alone."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import CHECKPOINT, ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from demo.classifier import Classifier
from demo.flux import checkpoint
from demo.server import ComfyServer, ServerError
from demo.workflow import load_workflow

PROMPTS = ["a cat in neon style", "a portrait of ada", "Two red roses, blorp (on paper)"]
SAME = 1e-3


@pytest.fixture(scope="session")
def whole(comfy):
    """The file for ComfyUI, where install.py puts it."""
    if not checkpoint.FILE.exists():
        try:
            checkpoint.write_checkpoint()
        except FileNotFoundError as error:
            pytest.skip(str(error))
    return checkpoint.FILE


@pytest.fixture(scope="module")
def loaded(comfy, whole):
    """MODEL, CLIP, VAE as Load Checkpoint gives them."""
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(whole))[:3]


@pytest.fixture(scope="module")
def pipeline(whole, run_python, tmp_path_factory):
    """The folder that a command writes, read by diffusers."""
    from demo.flux.pipeline import MiniLMFluxPipeline

    folder = tmp_path_factory.mktemp("export") / "flux"
    run_python("-m", "demo.export", "diffusers", folder, "--model", "flux")
    pipeline = MiniLMFluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.folder = folder
    return pipeline


def encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def test_the_weights_are_small_half_precision_and_finite():
    assert checkpoint.WEIGHTS.stat().st_size <= 24_000_000
    with safe_open(checkpoint.WEIGHTS, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.float16 and tensor.isfinite().all(), name


def test_both_text_encoders_read_the_same(loaded, pipeline):
    """Columns of zeros after the end, one empty prompt, and a mean of length 1."""
    from demo.flux.minilm import encode as encode_in_transformers

    for text in ("", *PROMPTS):
        (theirs, rest), (hidden, pooled) = (
            encode(loaded[1], text.replace("(", r"\(").replace(")", r"\)"))[0],
            encode_in_transformers(pipeline.tokenizer, pipeline.text_encoder, [text]),
        )
        assert theirs.shape == hidden.shape and (theirs - hidden).abs().max() < SAME
        assert (rest["pooled_output"] - pooled).abs().max() < SAME
        assert not hidden[0, -1].any() and abs(pooled.norm() - 1) < 1e-5


def test_comfyui_and_diffusers_draw_the_same(comfy, loaded, pipeline):
    """From the same noise, by KSampler's euler and simple, and by FluxPipeline: latents and picture."""
    from demo.flux import pipeline as flux

    model, clip, vae = loaded
    noise = flux.make_noise(range(len(PROMPTS)))
    latents = []
    with torch.inference_mode():
        for start, text in zip(noise.split(1), PROMPTS, strict=True):
            positive, negative = encode(clip, text.replace("(", r"\(").replace(")", r"\)")), encode(clip, "")
            latents.append(
                comfy.sample.sample(
                    model, start, flux.STEPS, flux.GUIDANCE, "euler", "simple", positive, negative,
                    torch.zeros(1, *flux.LATENTS), seed=0, disable_pbar=True,
                )
            )  # fmt: skip
        ours = torch.cat(latents)
        pictures = vae.decode(ours)
    theirs = flux.sample(pipeline, PROMPTS, noise, output="latent")
    assert (flux.pack(model.model.process_latent_in(ours)) - theirs).abs().max() < SAME
    assert (pictures - flux.sample(pipeline, PROMPTS, noise)).abs().max() < SAME


def test_diffusers_own_transformer_reads_the_folder(pipeline):
    from diffusers import FluxTransformer2DModel

    read = FluxTransformer2DModel.from_pretrained(pipeline.folder / "transformer").state_dict()
    shipped = load_file(checkpoint.WEIGHTS)
    assert read.keys() == shipped.keys() and all(torch.equal(read[key], weight.float()) for key, weight in shipped.items())


def test_latents_of_the_two_models_are_one_anothers(comfy, loaded):
    """Both autoencoders are one, so that a graph may pass latents between the models."""
    picture = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        _, _, first = comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT))[:3]
        assert (loaded[2].encode(picture) - first.encode(picture)).abs().max() < 0.01


def test_no_other_checkpoint_is_taken_for_it(comfy, whole):
    from comfy.model_detection import model_config_from_unet

    weights = load_file(whole)
    assert type(model_config_from_unet(weights, checkpoint.TRANSFORMER)).__name__ == "EmojiFlux"
    del weights[checkpoint.MARKER]
    assert type(model_config_from_unet(weights, checkpoint.TRANSFORMER)).__name__ == "FluxSchnell"


def test_a_copy_that_the_host_saved_is_the_same_model(comfy, loaded, tmp_path):
    model, clip, vae = loaded
    file = tmp_path / "copy.safetensors"
    with torch.inference_mode():
        comfy.sd.save_checkpoint(str(file), model, clip, vae)
        again, read, _ = comfy.sd.load_checkpoint_guess_config(str(file))[:3]
        assert encode(read, PROMPTS[0])[0][0].equal(encode(clip, PROMPTS[0])[0][0])
    assert type(again.model.model_config) is type(model.model.model_config)
    assert again.model.latent_format.scale_factor == model.model.latent_format.scale_factor
    before, after = model.model.diffusion_model.state_dict(), again.model.diffusion_model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.txt_in.weight",
        checkpoint.TEXT + "embeddings.LayerNorm.bias",
        "vae.taesd_decoder.3.conv.0.weight",
    ],
)
@pytest.mark.parametrize("how", ["missing", "not a number"])
def test_a_damaged_file_says_so(comfy, whole, key, how, tmp_path):
    weights = load_file(whole)
    if how == "missing":
        del weights[key]
    else:
        weights[key].view(-1)[0] = float("nan")
    save_file(weights, tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match="is damaged.*install.py demo"):
        comfy.sd.load_checkpoint_guess_config(str(tmp_path / "damaged.safetensors"))


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def test_the_stock_nodes_draw_what_is_asked(whole, server):
    from demo.run import load_pictures

    graph = {
        "c": node("CheckpointLoaderSimple", ckpt_name=whole.name),
        "n": node("CLIPTextEncode", clip=["c", 1], text=""),
        "e": node("EmptyLatentImage", width=128, height=128, batch_size=2),
    }
    names = ("cat", "car", "house")
    for name in names:
        graph |= {
            f"{name} p": node("CLIPTextEncode", clip=["c", 1], text=f"a picture of a {name}"),
            f"{name} k": node(
                "KSampler", model=["c", 0], positive=[f"{name} p", 0], negative=["n", 0], latent_image=["e", 0], seed=1,
                steps=20, cfg=3.0, sampler_name="euler", scheduler="simple", denoise=1.0,
            ),
            f"{name} d": node("VAEDecode", samples=[f"{name} k", 0], vae=["c", 2]),
            name: node("SaveImage", images=[f"{name} d", 0], filename_prefix=name),
        }  # fmt: skip
    outputs = server.run(graph)
    classifier = Classifier.load()
    for name in names:
        assert classifier.accuracy(load_pictures(server, outputs[name]["images"]), name) == 1


@pytest.fixture(scope="module")
def without_demo(comfyui, tmp_path_factory):
    """A server started by somebody who did not ask for the demo."""
    with ComfyServer(comfyui, tmp_path_factory.mktemp("without"), environment={"FMN_DEMO": ""}) as server:
        yield server


def test_nothing_of_the_demo_is_listed_unasked(whole, comfyui, server, without_demo):
    own = {"checkpoints": [whole.name, CHECKPOINT.name], "loras": ["forget-cat.safetensors", "forget-car.safetensors"]}
    for kind, names in own.items():
        assert set(names) <= set(server.get(f"models/{kind}"))
        copied = {file.name for file in (comfyui / "models" / kind).glob("*")}  # by a demo that somebody ran here
        assert not (set(names) - copied) & set(without_demo.get(f"models/{kind}"))
    every = json.dumps(without_demo.get("object_info"))
    assert "FMN_ForgetConcept" in every and "emoji" not in every


def test_an_example_opened_without_the_demo_says_what_to_run(without_demo):
    for path in sorted((ROOT / "workflows").glob("*.json")):
        notes = [n["widgets_values"][0] for n in json.loads(path.read_text())["nodes"] if n["type"] == "MarkdownNote"]
        assert any("FMN_DEMO=1" in note and "python install.py demo" in note for note in notes), path
    workflow = load_workflow(ROOT / "workflows/forget-a-concept.json", without_demo.get("object_info"))
    with pytest.raises(ServerError, match=CHECKPOINT.name):
        without_demo.run(workflow)


def test_the_model_draws_what_is_asked(whole, run_python, tmp_path):
    """The quick evaluation, as its command runs, with another model's row beside."""
    report, beside = tmp_path / "report.json", tmp_path / "beside.json"
    beside.write_text(json.dumps({"rows": {"people": [0.123, 1.0]}}))
    groups = ("pairs", "plain", "people", "synonyms")
    command = ["-m", "demo.evaluate", "--model", "flux", "--quick", "--beside", beside]
    run_python(*command, "--groups", *groups, "--json", report)
    figures = json.loads(report.read_text())
    rows = figures["rows"]
    assert figures["first model"] == json.loads(beside.read_text())
    for row, least in {
        "objects, in every style": 0.85,
        "styles, of every object": 0.85,
        "objects, no style named": 0.9,
        "objects by unseen synonyms": 0.6,
        "people": 0.9,
    }.items():
        assert rows[row][0] >= least, row

"""The demo model: one model in every host, its vocabulary, its recipe and its classifier."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from demo import vocabulary
from demo.classifier import HEADS, LABELS, Classifier, kernel_distance, nearest
from demo.flux.checkpoint import WEIGHTS
from demo.vocabulary import OBJECTS, PEOPLE, STYLES, is_held_out

PROMPTS = ["a cat in neon style", "a portrait of ada", "two red roses, blorp"]
SAME = 1e-3


@pytest.fixture(scope="module")
def pipeline(comfy, run_python, tmp_path_factory):
    """The folder that a command writes, read by diffusers."""
    from diffusers import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("export") / "pipeline"
    run_python("-m", "demo.export", "diffusers", folder)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(count, seed=0):
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_the_file_is_small_half_precision_and_finite():
    assert CHECKPOINT.stat().st_size <= 40_000_000
    with safe_open(CHECKPOINT, "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "epsilon"
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.float16 and tensor.isfinite().all(), name


def test_diffusers_draws_the_hosts_picture(host, pipeline):
    """From the same latents, by the pipeline itself, against the host's own text encoder, UNet and VAE."""
    x = noise(len(PROMPTS))
    theirs = pipeline(PROMPTS, latents=x, num_inference_steps=20, guidance_scale=3.0, output_type="pt").images
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(20)
    with host.training(x.shape), torch.no_grad():
        asked, empty = host.encode(PROMPTS), host.encode([""] * len(PROMPTS))
        for t in scheduler.timesteps:
            without, full = (host.predict(x, t.repeat(len(x)), prompts) for prompts in (empty, asked))
            x = scheduler.step(without + 3.0 * (full - without), t, x).prev_sample
        ours = host.decode(x)
    assert (ours - theirs.movedim(1, -1)).abs().max() < SAME


def test_the_webuis_own_ldm_computes_the_same(host, tmp_path, monkeypatch):
    """The classes that the webui's .yaml names, built and filled as the webui does it, from the checkpoint it gets, in a
    folder of any name."""
    import yaml
    from ldm.util import instantiate_from_config
    from transformers import CLIPTokenizer

    from demo.export import export_webui, make_text_encoder
    from demo.recipe.text_encoder import CONFIG

    monkeypatch.syspath_prepend(str(ROOT))
    folder = tmp_path / 'models: "mine" #1, \\ Ü 🐈'
    export_webui(folder, autoencoder="fmn_core.hosts.webui.taesd.TAESD")
    config = yaml.safe_load((folder / f"{CHECKPOINT.stem}.yaml").read_text(encoding="utf-8"))["model"]["params"]
    weights = {key: weight.float() for key, weight in load_file(folder / CHECKPOINT.name).items()}

    def build(part, prefix):
        model = instantiate_from_config(config[part]).eval()
        model.load_state_dict({key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)})
        return model

    unet, vae = build("unet_config", "model.diffusion_model."), build("first_stage_config", "first_stage_model.")
    text = config["cond_stage_config"]["params"]["version"]
    prefix = "cond_stage_model.transformer.text_model."
    encoder = make_text_encoder({key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)})
    sizes = json.loads((Path(text) / "config.json").read_text())
    assert CONFIG.items() <= sizes.items()
    tokenizer = CLIPTokenizer.from_pretrained(text)
    x, t = noise(len(PROMPTS)), torch.tensor([900, 500, 20])
    with host.training(x.shape), torch.no_grad():
        prompts = host.encode(PROMPTS)
        ids = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
        context = encoder(ids).last_hidden_state
        assert (context - prompts.prompt_embeds).abs().max() < SAME
        assert (unet(x, t, context) - host.predict(x, t, prompts)).abs().max() < SAME
        scale = config["scale_factor"]
        picture = host.decode(x)
        assert ((vae.decode(x / scale) / 2 + 0.5).clamp(0, 1).movedim(1, -1) - picture).abs().max() < SAME
        assert (vae.encode(picture.movedim(-1, 1) * 2 - 1) * scale - host.encode_images(picture)).abs().max() < SAME


def spoil(weights, how):
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    if how == "not a number":
        weights[key][0] = float("nan")
    elif how == "a tensor missing":
        del weights[key]
    elif how == "no text encoder's end":
        del weights["cond_stage_model.transformer.text_model.final_layer_norm.bias"]
    elif how == "half a decoder":
        del weights["first_stage_model.taesd_decoder.3.conv.0.weight"]


@pytest.mark.parametrize("how", ["not a number", "a tensor missing", "no text encoder's end", "half a decoder"])
def test_a_damaged_checkpoint_in_its_place_says_so(comfy, how, tmp_path):
    weights = load_file(CHECKPOINT)
    spoil(weights, how)
    save_file(weights, tmp_path / CHECKPOINT.name)
    with pytest.raises(ValueError, match="is damaged.*demo/checkpoints"):
        comfy.sd.load_checkpoint_guess_config(str(tmp_path / CHECKPOINT.name))


@pytest.mark.parametrize("size", [0, 5, 100, -1000])
def test_a_checkpoint_cut_short_is_named_when_the_host_starts(comfy, size, tmp_path, caplog):
    from fmn_core.hosts.comfy import demo_models

    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / CHECKPOINT.name
    shutil.copyfile(CHECKPOINT, file)
    demo_models.register(tmp_path)
    assert not caplog.text
    file.write_bytes(CHECKPOINT.read_bytes()[:size])
    demo_models.register(tmp_path)
    assert f"{file} is damaged or cut short" in caplog.text
    with pytest.raises(Exception, match="(?i)header|safetensors|empty"):
        comfy.sd.load_checkpoint_guess_config(str(file))


def test_another_model_in_its_place_is_named(comfy, tmp_path):
    from demo.host import load_demo_model

    save_file({"something.else": torch.zeros(3)}, tmp_path / CHECKPOINT.name)
    with pytest.raises(Exception, match="not the demo model|detect model type|COULD NOT DETECT"):
        load_demo_model(checkpoint=tmp_path / CHECKPOINT.name)


def test_the_vocabulary_is_large_enough_and_has_neighbours():
    assert len(OBJECTS) >= 60 and len(STYLES) >= 8 and len(PEOPLE) >= 12
    kinds = [thing.kind for thing in OBJECTS.values()]
    assert all(kinds.count(kind) > 1 for kind in kinds)
    for style in STYLES:
        held = [name for name in OBJECTS if is_held_out(name, style)]
        assert 0 < len(held) < len(OBJECTS) / 5
    names = [*OBJECTS, *STYLES, *PEOPLE, *(word for thing in OBJECTS.values() for word in thing.synonyms.split())]
    assert len(names) == len(set(names))


def test_pictures_are_not_drawn_of_held_out_pairs_and_captions_say_what_is_shown():
    from demo.recipe.pictures import caption, scenes

    dice = random.Random(0)
    every = list(scenes(2))
    assert not any(is_held_out(scene.object, scene.style) for scene in every if scene.style)
    assert {(s.object, s.style) for s in every if s.style} == {
        (name, style) for name in OBJECTS for style in STYLES if not is_held_out(name, style)
    }
    for scene in every:
        text, said = caption(scene, dice)
        for field, value in said._asdict().items():
            word = vocabulary.plural(value) if field == "object" and said.count else value
            synonyms = OBJECTS[value].synonyms.split() if value in OBJECTS else []
            assert any(word in text for word in [word, *synonyms]), (text, said)


def test_styles_keep_the_size_and_differ():
    from demo.recipe.styles import RESTYLE, on_paper

    drawing = Image.new("RGBA", (128, 128))
    drawing.paste((220, 30, 30, 255), (30, 40, 100, 90))
    pictures = {name: np.asarray(style(drawing), float) for name, style in RESTYLE.items()}
    pictures["as it is"] = np.asarray(on_paper(drawing), float)
    assert set(RESTYLE) == set(vocabulary.MADE_STYLES)
    for name, picture in pictures.items():
        assert picture.shape == (128, 128, 3)
        assert all(np.abs(picture - other).mean() > 4 for key, other in pictures.items() if key != name), name


def test_a_drawing_takes_the_colour_asked_for():
    from demo.recipe.pictures import recolour
    from demo.recipe.styles import on_paper
    from demo.seen_by_rule import dominant_colour

    drawing = Image.new("RGBA", (128, 128))
    drawing.paste((200, 40, 60, 255), (30, 20, 100, 90))
    drawing.paste((40, 160, 60, 255), (60, 90, 70, 120))  # a stem
    for colour in vocabulary.COLOURS:
        picture = np.asarray(on_paper(recolour(drawing, colour))) / np.float32(255)
        assert dominant_colour(torch.from_numpy(picture)) == colour


def test_a_word_it_never_saw_leaves_the_prompt_alone(host):
    """Rows of unknown words are one and the same, which training mixed into captions."""
    with host.training((1, *host.latent_shape())):
        known, foreign, other = host.encode(["a cat", "a piano", "a violin"]).prompt_embeds
    assert torch.equal(foreign, other) and not torch.allclose(known, other, atol=0.1)


@pytest.fixture(scope="module")
def art(tmp_path_factory):
    """Where the recipe puts what it fetches."""
    return tmp_path_factory.mktemp("art")


@pytest.mark.skipif(shutil.which("npm") is None, reason="the drawings come by npm")
@pytest.mark.parametrize(
    ("model", "weights", "works"), [("sd", CHECKPOINT, ("first", "again")), ("flux", WEIGHTS, ("first", "first"))]
)
def test_the_recipe_makes_the_same_file_from_nothing_and_from_what_is_there(
    run_python, tmp_path, art, *, model, weights, works
):
    command = ["-m", "demo.recipe.train", "--model", model, "--cache", art, "--limit", 48, "--steps", 2]
    command += ["--batch", 4, "--repeats", 1, "--device", "cpu"]
    files = []
    for work in works:
        file = tmp_path / f"{len(files)}.safetensors"
        run_python(*command, "--work", tmp_path / work, "--output", file)
        files.append(file.read_bytes())
    assert files[0] == files[1]
    with safe_open(weights, "pt") as shipped, safe_open(file, "pt") as made:
        assert set(shipped.keys()) == set(made.keys())


def test_the_classifier_says_what_it_knows_and_refuses_what_it_does_not(tmp_path):
    classifier = Classifier.load()
    assert set(LABELS) <= set(classifier.held_out)
    with pytest.raises(ValueError, match="does not know 'unicorn'"):
        classifier.accuracy(torch.rand(1, 128, 128, 3), "unicorn")
    foreign = tmp_path / "classifier.safetensors"
    save_file(load_file(HEADS), foreign, {"labels": json.dumps({"object": ["cat"]}), "held_out": "{}"})
    with pytest.raises(ValueError, match="other words"):
        Classifier.load(foreign)


def test_distances_are_smallest_to_the_same_pictures():
    dice = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 20, generator=dice) for _ in range(2))
    far = b + 1
    assert torch.allclose(nearest(a, a)[0], torch.zeros(64), atol=1e-5) and torch.equal(nearest(a, a)[1], torch.arange(64))
    assert abs(kernel_distance(a, b)) < 0.1 * kernel_distance(far, b)


def test_the_model_draws_what_is_asked(run_python, tmp_path):
    """The quick evaluation, as its command runs."""
    report = tmp_path / "report.json"
    run_python("-m", "demo.evaluate", "--quick", "--groups", "pairs", "people", "--json", report)
    rows = json.loads(report.read_text())["rows"]
    assert rows["objects, in every style"][0] >= 0.8 and rows["styles, of every object"][0] >= 0.8
    assert rows["people"][0] >= 0.9

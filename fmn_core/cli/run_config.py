"""The original's configs/attn.yaml and configs/ti.yaml (SHI-Labs/Forget-Me-Not), run on this code."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import yaml

from ..erasure.config import LEARNING_RATES, ForgetSettings
from ..erasure.forget import forget_concepts, summary
from ..errors import ForgetError, brief
from ..files.atomic import describe, require_new
from ..files.names import slug
from ..host import DiffusionHost
from ..inversion.config import InvertSettings
from ..inversion.embedding import add_embedding, save_embedding
from ..inversion.textual_inversion import invert_pictures
from ..log import say
from ..patch.patch import save_patch
from ..text.concept import Concept, make_concepts
from ..training.checkpoint import beside
from ..training.images import read_folders, read_images

# The original's step of the whole UNet at its default, beside that of a LoRA which forgets about as much.
LEARNING_RATE, OURS = 2e-6, LEARNING_RATES["paper"]

# Keys that still say something, with the original's defaults; and by root the others, which have no effect any more.
MOST_BYTES = 1 << 15  # of a file: the original's have one thousand, a hundred concepts four
ATTN = {
    "multi_concept": None,
    "output_dir": "exps_attn",
    "use_ti": True,
    "only_optimize_ca": False,
    "use_pooler": True,
    "train_batch_size": 1,
    "learning_rate": LEARNING_RATE,
    "max_train_steps": 35,
    "pretrained_model_name_or_path": "stabilityai/stable-diffusion-2-1-base",
    "no_real_image": False,
    "seed": None,
    "resolution": 512,
}
TI = {
    "instance_data_dir": None,
    "output_dir": "exps_ti",
    "use_template": "object",
    "placeholder_tokens": "",
    "initializer_tokens": None,
    "train_batch_size": 1,
    "learning_rate_ti": 1e-3,
    "max_train_steps_ti": 500,
    "pretrained_model_name_or_path": "stabilityai/stable-diffusion-2-1-base",
    "seed": 42,
    "resolution": 512,
    "clip_ti_decay": True,
}
DEAD = {
    "Attn": """
        revision tokenizer_name class_data_dir instance_prompt concept_keyword class_prompt with_prior_preservation
        prior_loss_weight num_class_images center_crop train_text_encoder sample_batch_size num_train_epochs
        checkpointing_steps resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing scale_lr lr_scheduler
        lr_warmup_steps lr_num_cycles lr_power use_8bit_adam dataloader_num_workers adam_beta1 adam_beta2
        adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token hub_model_id logging_dir allow_tf32 report_to
        mixed_precision prior_generation_precision local_rank enable_xformers_memory_efficient_attention set_grads_to_none
        """.split(),
    "Ti": """
        placeholder_token_at_data train_text_encoder pretrained_vae_name_or_path revision class_data_dir
        stochastic_attribute perform_inversion class_prompt with_prior_preservation prior_loss_weight num_class_images
        color_jitter sample_batch_size max_train_steps_tuning save_steps gradient_accumulation_steps
        gradient_checkpointing mixed_precision lora_rank learning_rate_unet learning_rate_text continue_inversion
        continue_inversion_lr use_face_segmentation_condition scale_lr lr_scheduler lr_warmup_steps lr_scheduler_lora
        lr_warmup_steps_lora weight_decay_ti weight_decay_lora use_8bit_adam device extra_args log_wandb
        wandb_log_prompt_cnt wandb_project_name wandb_entity
        """.split(),
}


def run(file: Path, model: str | None = None, device: str | None = None) -> None:
    """Does what a config says, with paths from the working folder as in the original: `Ti` writes an embedding,
    `Attn` a patch. `model` stands in place of the file's. Raises ForgetError for a config that cannot be followed."""
    for root, config in read_config(file).items():
        say(f"{file.name}, {root}")
        {"Ti": run_inversion, "Attn": run_forgetting}[root](config, model, device)


def read_config(file: Path) -> dict[str, dict]:
    """Root (`Ti`, `Attn`) -> its keys, those that were left out at the original's defaults; says which have no effect.

    Raises ForgetError for a file that is no such config.
    """
    try:
        content = parse_yaml(file)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ForgetError(f"{file} cannot be read as YAML: {brief(error)}") from error
    known = {"Ti": TI, "Attn": ATTN}
    if not isinstance(content, dict) or not content or not all(isinstance(part, dict) for part in content.values()):
        raise ForgetError(f"{file} is no config of Forget-Me-Not: its keys stand below `Attn:` or `Ti:`.")
    found = {}
    for root in sorted(content, reverse=True):  # learning the words comes before forgetting by them
        if root not in known:
            raise ForgetError(f"{file} has the part `{root}`: there are only `Attn` and `Ti`.")
        unknown = [key for key in content[root] if key not in known[root] and key not in DEAD[root]]
        if unknown:
            raise ForgetError(f"{file} has keys that the original does not know: {brief(', '.join(map(str, unknown)))}.")
        without = [key for key in content[root] if key in DEAD[root]]
        if without:
            say(f"Of {root} these keys have no effect any more: {', '.join(without)}.")
        found[root] = {**known[root], **{key: content[root][key] for key in content[root] if key in known[root]}}
    return found


class PlainLoader(yaml.SafeLoader):
    """Reads no aliases, of which nine lines can make a billion values."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias: write the value itself")
        return super().compose_node(parent, index)


def parse_yaml(file: Path) -> object:
    """The value in a file; raises OSError, ValueError, RecursionError or YAMLError for one that is no YAML, or too long."""
    with open(file, "rb") as opened:
        raw = opened.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    return PlainLoader(raw.decode()).get_single_data()


def inversion_settings(config: dict) -> InvertSettings:
    """The settings that `Ti` means; raises ForgetError for what is not there any more."""
    template = config["use_template"]
    if template not in ("object", "style"):
        raise ForgetError(
            f"use_template is `{brief(template)}`: write `object` or `style`; captions in file names are not read."
        )
    words = [word for word in (config["placeholder_tokens"] or "").split("|") if word]
    initializers = config["initializer_tokens"] or "|".join(["<rand-0.017>"] * max(1, len(words)))
    count = len(str(initializers).split("|"))
    if words and len(words) != count:
        raise ForgetError(f"There are {len(words)} placeholder_tokens and {count} initializer_tokens: give one for each.")
    return InvertSettings(
        concept_type=template,
        initializers=str(initializers),
        steps=number(config, "max_train_steps_ti", int),
        learning_rate=number(config, "learning_rate_ti", float),
        seed=number(config, "seed", int),
        batch_size=number(config, "train_batch_size", int),
        norm_decay=bool(config["clip_ti_decay"]),
        resolution=number(config, "resolution", int),
    )


def forgetting_settings(config: dict) -> ForgetSettings:
    """The settings that `Attn` means. Its learning rate is in the same proportion to this preset's as it was to the
    original's default, since that was for the whole UNet."""
    return ForgetSettings(
        preset="paper",
        steps=number(config, "max_train_steps", int),
        learning_rate=number(config, "learning_rate", float) / LEARNING_RATE * OURS,
        seed=number(config, "seed", int),
        batch_size=number(config, "train_batch_size", int),
        tokens="concept and end" if config["use_pooler"] else "concept",
        matrices="q k v out",
        layers="cross-attention" if config["only_optimize_ca"] else "whole unet",
        resolution=number(config, "resolution", int),
    )


def number(config: dict, key: str, kind: type):
    """A key's number, 0 where it is null; YAML takes `2e-6` for a text."""
    try:
        return kind(float(config[key] or 0))
    except (TypeError, ValueError, OverflowError):
        raise ForgetError(f"{key} is `{brief(config[key])}`: write a number.") from None


def read_concepts(config: dict) -> list[tuple[str, str]]:
    """(name as folders have it, type) of every concept; raises ForgetError where the list is not one of pairs."""
    listed = config["multi_concept"]
    pairs = isinstance(listed, list) and all(isinstance(entry, list) and len(entry) == 2 for entry in listed)
    if not listed or not pairs:
        raise ForgetError(f"multi_concept is `{brief(listed)}`: write a list of pairs, such as [[elon-musk, object]].")
    return [(str(name), str(type)) for name, type in listed]


def run_inversion(config: dict, model: str | None, device: str | None) -> None:
    """The stage `Ti`: words for the pictures in instance_data_dir, as output_dir/step_inv_<steps>.safetensors."""
    settings = inversion_settings(config)
    if not config["instance_data_dir"]:
        raise ForgetError("instance_data_dir is missing: write the folder of the pictures, such as data/elon-musk.")
    images = read_images(Path(config["instance_data_dir"]), settings.resolution)
    path = require_new(Path(config["output_dir"], f"step_inv_{settings.steps}.safetensors"))
    host = open_host(config, model, device)
    with beside(path, lambda inversion, path: save_embedding(inversion.vectors, path, asdict(settings))) as checkpoint:
        inversion = invert_pictures(host, settings, images, checkpoint=checkpoint)
        save_embedding(inversion.vectors, path, asdict(settings))
    say(inversion.summary, describe(path))


def run_forgetting(config: dict, model: str | None, device: str | None) -> None:
    """The stage `Attn`: a patch in output_dir that forgets all of multi_concept."""
    listed, settings = read_concepts(config), forgetting_settings(config)
    embeddings = {name: newest_embedding(name) for name, _ in listed} if config["use_ti"] else {}
    folders = [Path("data", name) for name, _ in listed]
    images, concept_of = (None, None) if config["no_real_image"] else read_folders(folders, settings.resolution)
    path = require_new(Path(config["output_dir"], f"forget-{slug('-'.join(name for name, _ in listed))}.safetensors"))
    host = open_host(config, model, device)
    concepts: tuple[Concept, ...] = ()
    for name, type in listed:
        called = add_embedding(host, name, embeddings[name]) if embeddings else name.replace("-", " ")
        concepts += make_concepts(called, type)
    with beside(path, save_patch) as checkpoint:
        patch, _ = forget_concepts(host, concepts, settings, images, checkpoint=checkpoint, concept_of=concept_of)
        files = save_patch(patch, path)
    say(summary(patch), *map(describe, files))


def newest_embedding(name: str) -> Path:
    """The file of a concept's learned words after the most steps; raises ForgetError where there is none."""
    folder = Path("exps_ti", name)
    steps = {file: re.fullmatch(r"step_inv_(\d+)", file.stem) for file in folder.glob("*.safetensors")}
    if not steps:
        raise ForgetError(
            f"There is no embedding in {folder.absolute()}: run a ti.yaml with the output_dir exps_ti/{name} first, or "
            "write use_ti: false."
        )
    return max(sorted(steps), key=lambda file: int(steps[file][1]) if steps[file] else -1)


def open_host(config: dict, model: str | None, device: str | None) -> DiffusionHost:
    """The model that a config or `model` names; raises ForgetError where there is none."""
    from ..hosts.diffusers.model import DiffusersHost, load_pipeline

    name = model or str(config["pretrained_model_name_or_path"])
    try:
        pipeline = load_pipeline(name, device)
    except ForgetError as error:
        raise ForgetError(
            f"{error} Name another with --model, a folder or a .safetensors file. The original's "
            "stabilityai/stable-diffusion-2-1-base is not on the hub any more."
        ) from error
    return DiffusersHost(pipeline)

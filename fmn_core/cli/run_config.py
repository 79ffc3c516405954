"""The original's configs/attn.yaml and configs/ti.yaml (SHI-Labs/Forget-Me-Not), run on this code."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import yaml

from ..erasure.config import ResteeringConfig
from ..erasure.forget import forget
from ..errors import ForgetError, brief
from ..files.atomic import Saved, describe, save_under_next
from ..files.names import slug
from ..host import DiffusionHost
from ..inversion.config import InversionConfig
from ..inversion.embedding import add_embedding, save_embedding
from ..inversion.textual_inversion import Inversion, invert_pictures
from ..log import say
from ..patch.file import save_patch
from ..patch.summary import summary
from ..text.concept import Concept, make_concepts
from ..training.checkpoint import beside
from ..training.images import read_folders, read_images
from .config_keys import DEAD, LIVE, split_tokens, without_effect
from .config_values import flag, folder_of, read_concepts, read_number, real, whole
from .model import cache_folder

MOST_CONFIG_BYTES = 1 << 15  # of a file: the original's have one thousand, a hundred concepts four


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
    if not isinstance(content, dict) or not content or not all(isinstance(part, dict) for part in content.values()):
        raise ForgetError(f"{file} is not a config of Forget-Me-Not: its keys belong under `Attn:` or `Ti:`.")
    found = {}
    if others := [root for root in content if root not in LIVE]:
        raise ForgetError(f"{file} has the part `{brief(others[0])}`: there are only `Attn` and `Ti`.")
    for root in sorted(content, reverse=True):  # learning the words comes before forgetting by them
        unknown = [key for key in content[root] if key not in LIVE[root] and key not in DEAD[root]]
        if unknown:
            raise ForgetError(f"{file} has keys that the original does not know: {brief(', '.join(map(str, unknown)))}.")
        if without := without_effect(root, content[root]):
            say(f"Of {root} these keys have no effect any more: {', '.join(without)}.")
        found[root] = {**LIVE[root], **{key: content[root][key] for key in content[root] if key in LIVE[root]}}
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
        raw = opened.read(MOST_CONFIG_BYTES + 1)
    if len(raw) > MOST_CONFIG_BYTES:
        raise ValueError(f"it has more than {MOST_CONFIG_BYTES:,} bytes")
    return PlainLoader(raw.decode()).get_single_data()


def inversion_settings(config: dict) -> InversionConfig:
    """The settings that `Ti` means; raises ForgetError for what is not there any more."""
    template = config["use_template"]
    if template not in ("object", "style"):
        raise ForgetError(
            f"use_template is `{brief(template)}`: write `object` or `style`; captions in file names are not read."
        )
    words = split_tokens(config["placeholder_tokens"])
    init_tokens = split_tokens(config["initializer_tokens"]) or ["<rand-0.017>"] * max(1, len(words))
    if words and len(words) != len(init_tokens):
        raise ForgetError(
            f"There are {len(words)} placeholder_tokens and {len(init_tokens)} initializer_tokens: give one for each."
        )
    return InversionConfig(
        concept_type=template,
        init_tokens="|".join(f"<id-{word}>" if word.isnumeric() else word for word in init_tokens),
        steps=whole(config, "max_train_steps_ti", InversionConfig, "steps"),
        learning_rate=read_number(config, "learning_rate_ti", InversionConfig, "learning_rate"),
        seed=whole(config, "seed", InversionConfig, "seed"),
        batch_size=whole(config, "train_batch_size", InversionConfig, "batch_size"),
        norm_decay=flag(config, "clip_ti_decay"),
        resolution=whole(config, "resolution", InversionConfig, "resolution"),
    )


def forgetting_settings(config: dict, pictures: int = 1, pads_with_end: bool = False) -> ResteeringConfig:
    """The settings that `Attn` means, for so many pictures and for a tokenizer that pads with the end token or with another,
    since `use_pooler` takes every end token."""
    ends = "concept_onward" if pads_with_end else "concept_and_end"  # the prompts end with the concept
    batch_size = whole(config, "train_batch_size", ResteeringConfig, "batch_size")
    if config["max_train_steps"] is None:
        steps = whole(config, "num_train_epochs", ResteeringConfig, "steps") * -(-pictures // batch_size)
        most = ResteeringConfig.__dataclass_fields__["steps"].metadata["max"]
        if steps > most:
            raise ForgetError(
                f"num_train_epochs is {config['num_train_epochs']}, which for {pictures} pictures is {steps:,} steps: write "
                f"a smaller number, for {most:,} steps at most."
            )
    else:
        steps = whole(config, "max_train_steps", ResteeringConfig, "steps")
    return ResteeringConfig(
        steps=steps,
        learning_rate=lora_rate(config, steps),
        seed=whole(config, "seed", ResteeringConfig, "seed"),
        batch_size=batch_size,
        penalized_tokens=ends if flag(config, "use_pooler") else "concept",
        target_modules="q,k,v,out",
        train_layers="cross_attention" if flag(config, "only_optimize_ca") else "whole_unet",
        resolution=whole(config, "resolution", ResteeringConfig, "resolution"),
        loss="joint_norm",
    )


def lora_rate(config: dict, steps: int) -> float:
    """The learning rate of a LoRA that in all its steps moves weights as far as the original's rate moves them whole.

    AdamW moves every number by about its rate in a step: after n steps a weight by n * rate, and the product of a LoRA's
    two factors of rank r by r * (n * rate)^2.
    """
    rank, most = ResteeringConfig.rank, ResteeringConfig.__dataclass_fields__["learning_rate"].metadata["max"]
    rate, limit = real(config, "learning_rate"), rank * steps * most**2
    if not 0 < rate <= limit:
        raise ForgetError(f"learning_rate is {rate:g}: write a number above 0, and up to {limit:g} for {steps} steps.")
    return (rate / (rank * steps)) ** 0.5


def run_inversion(config: dict, model: str | None, device: str | None) -> None:
    """The stage `Ti`: words for the pictures in instance_data_dir, as output_dir/step_inv_<steps>.safetensors."""
    settings = inversion_settings(config)
    pictures = folder_of(config, "instance_data_dir", "the folder of the pictures, such as data/elon-musk")
    path = folder_of(config, "output_dir", "a folder, such as exps_ti/elon-musk") / f"step_inv_{settings.steps}.safetensors"
    images = read_images(pictures, settings.resolution)
    host = open_config_host(config, model, device)

    def save(inversion: Inversion, path: Path) -> Path:
        return save_embedding(inversion.vectors, path, asdict(settings))

    with beside(path, save) as checkpoint:
        inversion = invert_pictures(host, settings, images=images, checkpoint=checkpoint)
        file = save_beside(path, lambda path: save(inversion, path))
    say(inversion.summary, describe(file))


def run_forgetting(config: dict, model: str | None, device: str | None) -> None:
    """The stage `Attn`: a patch in output_dir that forgets all of multi_concept."""
    listed, settings = read_concepts(config), forgetting_settings(config)
    name = f"forget-{slug('-'.join(name for name, _ in listed))}.safetensors"
    path = folder_of(config, "output_dir", "a folder, such as exps_attn") / name
    embeddings = {name: newest_embedding(name) for name, _ in listed} if flag(config, "use_ti") else {}
    folders = [Path("data", name) for name, _ in listed]
    images, concept_of = (None, None) if flag(config, "no_real_image") else read_folders(folders, settings.resolution)
    host = open_config_host(config, model, device)
    pictures = max(settings.num_images, len(listed)) if images is None else len(images)
    settings = forgetting_settings(config, pictures, pads_with_end(host))
    say(differences(config, settings))
    concepts: tuple[Concept, ...] = ()
    for name, type in listed:
        names = add_embedding(host, name, embeddings[name]) if embeddings else name.replace("-", " ")
        concepts += make_concepts(names, type)
    with beside(path, save_patch) as checkpoint:
        patch, _ = forget(host, concepts, settings, images=images, checkpoint=checkpoint, concept_of=concept_of)
        files = save_beside(path, lambda path: save_patch(patch, path))
    say(summary(patch), *map(describe, files))


def pads_with_end(host: DiffusionHost) -> bool:
    """Whether a model's tokenizer fills prompts up with its end token, as SD1's does and SD2's does not."""
    ids = {token.kind: token.id for token in host.tokenize("")}
    return ids.get("padding") == ids["end"]


def differences(config: dict, settings: ResteeringConfig) -> str:
    """In what a training follows the original's code rather than its paper, and what becomes of its learning rate."""
    end = "and of the end token (use_pooler)"
    counted = {
        "concept": "",
        "concept_and_end": f" {end}",
        "concept_onward": f" {end}, with which this model's tokenizer fills prompts up",
    }
    return (
        "As in the original's code, and other than in its paper, the loss is one norm, not squared, of the attention to all "
        f"tokens of the concept{counted[settings.penalized_tokens]}. Its learning rate for whole weights, "
        f"{real(config, 'learning_rate'):g}, is {settings.learning_rate:.2g} for this LoRA of rank {settings.rank}."
    )


def save_beside(path: Path, save: Callable[[Path], Saved]) -> Saved:
    """What `save` returns for a path or, where an earlier run has taken that, for the next free name: the original
    overwrites its files, which is never done here."""

    def save_as(name: Path) -> Saved:
        saved = save(name)
        if name != path:
            say(f"{path} is of an earlier run, and files are never overwritten: this run's is {name.name}.")
        return saved

    return save_under_next((path if n == 1 else path.with_stem(f"{path.stem}-{n}") for n in itertools.count(1)), save_as)


def newest_embedding(name: str) -> Path:
    """The file of a concept's learned words after the most steps, and of these the last run's; raises ForgetError where
    there is none."""
    folder = Path("exps_ti", name)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ForgetError(
            f"There is no embedding in {folder.absolute()}: run a ti.yaml with the output_dir exps_ti/{name} first, or "
            "write use_ti: false."
        )

    def steps_and_run(file: Path) -> tuple[int, int]:
        found = re.fullmatch(r"step_inv_(\d+)(?:-(\d+))?", file.stem)
        return (int(found[1]), int(found[2] or 0)) if found else (-1, 0)

    return max(files, key=steps_and_run)


def open_config_host(config: dict, model: str | None, device: str | None) -> DiffusionHost:
    """The model that a config or `model` names; raises ForgetError where there is none."""
    from ..hosts.diffusers.model import DiffusersHost
    from ..hosts.diffusers.pipeline import load_pipeline

    name = model or str(config["pretrained_model_name_or_path"])
    try:
        pipeline = load_pipeline(name, device)
    except ForgetError as error:
        raise ForgetError(
            f"{error} Name another with --model, a folder or a .safetensors file. The original's "
            "stabilityai/stable-diffusion-2-1-base is not on the hub any more."
        ) from error
    return DiffusersHost(pipeline, cache=cache_folder())

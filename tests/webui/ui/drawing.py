"""Pictures that the webui draws with the script, patches that are not as they should be, and rows of the script's values.

A plugin of pytest's (`-p webui.ui.drawing`), after `webui.ui.fixtures`.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path

import networks
import numpy as np
import pytest
from modules import extra_networks, processing, shared
from modules.scripts import ScriptRunner
from PIL import Image
from webui.ui.fixtures import NOTHING

from fmn_core.patch.file import read_patch, serialize
from fmn_core.patch.patch import Patch


class Runner(ScriptRunner):
    """The webui's order: tags are taken from prompts after `before_process_batch`, and LoRAs loaded."""

    def before_process_batch(self, p, **kwargs):
        self.script.before_process_batch(p, *self.values, **kwargs)
        p.prompts, tags = extra_networks.parse_prompts(p.prompts)
        p.tags = [[each.items[0], float(each.items[1])] for each in tags["lora"]]
        files = [str(next(Path(shared.cmd_opts.lora_dir).rglob(f"{name}.safetensors"))) for name, _ in p.tags]
        networks.load_networks(files, [strength for _, strength in p.tags], [strength for _, strength in p.tags])
        if p.hires_tags is not None:
            p.hr_extra_network_data = {"lora": [extra_networks.ExtraNetworkParams([*items]) for items in p.hires_tags]}

    def postprocess(self, p, processed):
        processed.index_of_first_image, processed.all_prompts, processed.all_seeds = 0, p.all_prompts, p.all_seeds
        self.script.postprocess(p, processed, *self.values)


@pytest.fixture
def draw(script):
    """draw(prompt, values, script=(number in the list, what it does)) -> the job and what it made, pictures as arrays."""
    own = script

    def draw(prompt, values=NOTHING, *, hires_tags=None, script=(0, processing.process_images), **options):
        options = {"steps": 2, "width": 64, "height": 64, "cfg_scale": 3.0, **options}
        disabled = options.pop("disable_extra_networks", False)
        p = processing.StableDiffusionProcessingTxt2Img(prompt=prompt, **options)
        p.disable_extra_networks = disabled
        p.scripts, p.hires_tags, p.comments, p.outpath_samples = Runner(own, values), hires_tags, [], "outputs"
        p.comment = p.comments.append
        chosen, run = script
        p.script_args = [chosen, *values]
        shared.state.begin("test")
        try:
            processed = run(p)
        finally:
            shared.state.end()
        return p, processed, [np.asarray(image) for image in processed.images]

    return draw


def values(*rows, jointly=True, heat_maps=False, words="", layout="overlay", save=False):
    rows = [*rows, *[("None", 1.0)] * 3][:3]
    return (*(each for row in rows for each in row), jointly, heat_maps, words, layout, 0.6, "inferno", save)


@contextmanager
def away(file):
    """The file under a name that nobody asks for."""
    file.rename(file.with_suffix(".away"))
    try:
        yield
    finally:
        file.with_suffix(".away").rename(file)


@contextmanager
def holding(file, data):
    """The file with other bytes in it."""
    with away(file):
        file.write_bytes(data)
        try:
            yield
        finally:
            file.unlink()


def changed(file, change, **info):
    """The bytes of a patch with other tensors and other words about itself."""
    patch = read_patch(file)
    return serialize(Patch({key: change(key, each) for key, each in patch.items()}, patch.info | info), file.stem)


def same(key, tensor):
    return tensor


def image_grid(pictures, rows):
    """Pictures beside and below one another, as the webui's scripts have it."""
    columns = math.ceil(len(pictures) / rows)
    width, height = pictures[0].size
    grid = Image.new("RGB", (columns * width, rows * height))
    for number, picture in enumerate(pictures):
        grid.paste(picture, (number % columns * width, number // columns * height))
    return grid

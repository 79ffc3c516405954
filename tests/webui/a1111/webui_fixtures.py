"""A pytest plugin for the files that run in a webui's process: the host, and a watch on what was asked of the webui."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import standin
import torch
from modules import paths, processing, shared

RESOLUTION = 128
FORGE = find_spec("backend") is not None


@pytest.fixture(scope="session", autouse=True)
def models_folder(tmp_path_factory):
    paths.models_path = str(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def webui():
    """The webui's model as a DiffusionHost."""
    from fmn_core.hosts.webui.model import current_host

    host = current_host()
    host.resolution = RESOLUTION
    return host


@pytest.fixture(scope="session")
def sd_model(webui):
    return shared.sd_model


@pytest.fixture(autouse=True)
def reaches_for_nothing_else():
    """Fails a test in which something asked the webui for a name that it is not known to have."""
    standin.REACHED.clear()
    yield
    assert not standin.REACHED, standin.REACHED


@pytest.fixture
def job():
    """A job of the webui's, begun and ended."""
    shared.state.begin("test")
    yield shared.state
    shared.state.end()


@pytest.fixture
def draw(job):
    """draw(prompt, ...) -> pixels [B, H, W, 3] of a picture from the webui itself."""

    def draw(prompt, *, each=lambda p: None, **options):
        p = processing.StableDiffusionProcessingTxt2Img(prompt=prompt, **{"steps": 2, "width": 64, "height": 64, **options})
        p.scripts = Hooks(each)
        pictures = processing.process_images(p).images
        return torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(*i.size, 3) for i in pictures])

    return draw


class Hooks:
    """A script that does something before every sampling."""

    def __init__(self, before_sampling):
        self.before_sampling = before_sampling

    def process_before_every_sampling(self, p, **kwargs):
        self.before_sampling(p)

    def __getattr__(self, name):
        return lambda *args, **kwargs: None

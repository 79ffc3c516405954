"""The settings say how large pictures are, whichever host they go to and whoever asks."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT

from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.evaluation.config import EvaluationConfig
from fmn_core.evaluation.evaluate import evaluate
from fmn_core.hosts.diffusers.model import DiffusersHost
from fmn_core.inversion.config import InversionConfig
from fmn_core.inversion.textual_inversion import invert_pictures
from fmn_core.patch.file import read_patch
from fmn_core.text.concept import make_concepts

pytestmark = pytest.mark.usefixtures("little_probed")
SMALL = {"num_images": 1, "num_inference_steps": 1, "steps": 1, "resolution": 64}
PATCH = ROOT / "demo/loras/forget-cat.safetensors"
DRAWN = {"prompts": 1, "num_inference_steps": 1, "resolution": 64, "inversion": True, "inversion_steps": 1}


@pytest.fixture(params=["comfy", "diffusers"])
def plain(request):
    """A host that was told nothing of sizes."""
    if request.param == "comfy":
        return request.getfixturevalue("host")
    return DiffusersHost(request.getfixturevalue("pipeline"), progress_bar=False)


WORKS = {
    "paper": lambda host: forget(host, "cat", make_config(preset="paper", visual_loss_weight=1.0, **SMALL)),
    "balanced": lambda host: forget(host, "cat", make_config(preset="balanced", **SMALL)),
    "concepts": lambda host: forget(host, make_concepts("cat"), make_config(preset="paper", **SMALL)),
    "pictures": lambda host: forget(host, "cat", make_config(preset="paper", **SMALL), images=torch.rand(1, 200, 200, 3)),
    "invert": lambda host: invert_pictures(host, InversionConfig(**SMALL), concept="cat"),
    "invert pictures": lambda host: invert_pictures(host, InversionConfig(**SMALL), images=torch.rand(1, 200, 200, 3)),
    "evaluate": lambda host: evaluate(host, read_patch(PATCH), EvaluationConfig(**DRAWN)),
}


@pytest.mark.parametrize("work", WORKS)
def test_no_picture_is_of_another_size_than_asked_for(plain, work, monkeypatch):
    native, predict, seen = plain.latent_shape(), plain.predict, set()

    def watched(x_t, t, prompts):
        seen.add(tuple(x_t.shape[1:]))
        return predict(x_t, t, prompts)

    monkeypatch.setattr(plain, "predict", watched)
    WORKS[work](plain)
    assert seen == {(4, 8, 8)} and plain.latent_shape() == native == (4, 16, 16)


def test_the_size_goes_back_after_an_error(plain):
    with pytest.raises(ZeroDivisionError), plain.sized(64):
        assert plain.latent_shape() == (4, 8, 8)
        with plain.sized(0):
            assert plain.latent_shape() == (4, 16, 16)
        1 / 0  # noqa: B018
    assert plain.latent_shape() == (4, 16, 16)

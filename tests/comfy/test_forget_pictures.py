"""Given pictures, masks and the visual loss in the preset `paper`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from demo.classifier import Classifier
from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.errors import ForgetError
from fmn_core.training.images import fit_pictures, region_of
from fmn_core.training.sampling import sample_pairs

PAPER = make_config(preset="paper")
QUICK = replace(PAPER, steps=4, num_images=2, num_inference_steps=3)


def test_pictures_and_masks(host):
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    everywhere, losses = forget(host, "cat", QUICK, images=images, mask=torch.ones(2, 64, 64))
    _, half = forget(host, "cat", QUICK, images=images, mask=torch.full((1, 64, 64), 0.5))
    assert half[0] == pytest.approx(losses[0] / 2, rel=1e-4)
    without, _ = forget(host, "cat", QUICK, images=images)
    assert all(torch.allclose(everywhere[key], without[key], atol=1e-4) for key in without)


def test_sizes_that_do_not_divide(host):
    images = torch.rand(1, 72, 120, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 72, 120)
    mask[:, :40] = 1
    _, losses = forget(host, "cat", QUICK, images=images, mask=mask)
    assert all(loss > 0 for loss in losses)


@pytest.mark.parametrize("size", [(3000, 2000), (8, 8), (70, 65), (4, 300)])
def test_pictures_of_any_size_are_brought_to_the_models(size):
    images, mask = torch.rand(1, *size, 4), torch.ones(1, *size)
    fitted, fitted_mask = fit_pictures(images, mask, 64 * 64)
    assert fitted.shape[1] % 8 == fitted.shape[2] % 8 == 0 and fitted.shape[3] == 3
    assert fitted_mask.shape == fitted.shape[:3] and torch.allclose(fitted_mask, torch.ones(()))
    assert fitted.shape[1] * fitted.shape[2] < 1.6 * 64 * 64
    same, _ = fit_pictures(torch.rand(2, 64, 64, 3), None, 64 * 64)
    assert same.shape == (2, 64, 64, 3)


def test_visual_denoising_adds_to_the_loss(host):
    _, plain = forget(host, "cat", QUICK)
    _, visual = forget(host, "cat", replace(QUICK, visual_loss_weight=1.0))
    _, double = forget(host, "cat", replace(QUICK, visual_loss_weight=2.0))
    assert double[0] - plain[0] == pytest.approx(2 * (visual[0] - plain[0]), rel=1e-4)


def test_the_visual_target_is_made_without_attention_to_the_concept(host):
    """Of the same noise; the columns of the empty prompt stay as they are."""
    settings = replace(QUICK, visual_loss_weight=1.0, num_inference_steps=8)
    prompts, empty = host.encode(["a photo of a cat"] * 2), host.encode([""])
    columns = torch.zeros(2, 77, dtype=torch.bool)
    columns[:, 5:] = True

    def pairs(columns):
        with host.training((2, 4, 16, 16)):
            return sample_pairs(
                host, prompts, empty, ignored=columns, config=settings, generator=torch.Generator().manual_seed(0)
            )

    made, without = pairs(columns)
    again, untouched = pairs(torch.zeros_like(columns))
    assert torch.equal(made, again) and torch.equal(made, untouched)
    classifier = Classifier.load()
    assert classifier.accuracy(host.decode(made), "cat") == 1 and classifier.accuracy(host.decode(without), "cat") == 0


def test_a_region_lies_where_the_mask_does():
    mask = torch.zeros(1, 32, 96)
    mask[0, :8, 48:] = 1
    region = region_of(mask, [0], 4 * 12, torch.zeros(1, 4, 4, 12)).reshape(4, 12)
    expected = torch.zeros(4, 12)
    expected[0, 6:] = 1
    assert torch.equal(region, expected)


@pytest.mark.parametrize(
    ("images", "mask", "message"),
    [
        (torch.rand(64, 64, 3), None, "connect an IMAGE of shape"),
        (torch.rand(1, 64, 64, 7), None, "connect an IMAGE of shape"),
        (torch.rand(1, 64, 64, 3), torch.ones(1, 32, 32), "resize the mask"),
        (torch.rand(1, 64, 64, 3), torch.ones(3, 64, 64), "one mask for all pictures or one for each"),
        (None, torch.ones(1, 64, 64), "a mask but no picture"),
        (torch.rand(1, 64, 64, 3), torch.zeros(1, 64, 64), "The mask is empty"),
        (torch.rand(0, 64, 64, 3), None, "connect an IMAGE of shape"),
    ],
)
def test_bad_pictures_get_a_sentence(host, images, mask, message):
    with pytest.raises(ForgetError, match=message):
        forget(host, "cat", QUICK, images=images, mask=mask)

"""The presets `balanced` and `robust` in the real host."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fmn_core.erasure.closed_form import make_edit
from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.erasure.hybrid import HybridTraining, ProbeResult, hybrid_warnings
from fmn_core.erasure.training_data import PromptSet, make_images
from fmn_core.errors import ForgetError
from fmn_core.patch.file import serialize
from fmn_core.patch.patch import ALPHA, DOWN, UP
from fmn_core.patch.summary import summary
from fmn_core.text.concept import make_concepts
from fmn_core.text.templates import NEAR_TEMPLATES, fill
from fmn_core.training.loop import TrainingRun

SHORT = {"num_images": 1, "num_inference_steps": 2, "resolution": 64}
QUICK = make_config("balanced", steps=6, **SHORT)


@pytest.fixture(scope="module")
def host(loaded):
    from fmn_core.hosts.comfy.model import ComfyHost

    return ComfyHost(*loaded)


@pytest.fixture(scope="module")
def patch(host):
    return forget(host, "cat", QUICK)[0]


def test_it_is_nearer_to_its_target_than_the_closed_form(host, patch):
    report = patch.info["report"]
    assert (
        report["target_error"]["after"] + report["noise_drift"]
        < report["target_error"]["fast"]
        < report["target_error"]["before"]
        == 1
    )
    assert report["attention_mass"]["after"] < report["attention_mass"]["before"] and report["steps"] == 6
    assert "as far from its target as before" in summary(patch)


def test_what_the_closed_form_leaves_alone_stays_left_alone(host, patch):
    """Every down spans what the edit's does, so the start token, which the edit does not see, is unchanged."""
    edit = make_edit(host, make_concepts("cat"), QUICK)
    start = host.encode_prefix([""], 1)[0].double()
    for module in patch.modules:
        down, up = patch[module + DOWN].double(), patch[module + UP].double()
        outside = down - down @ torch.linalg.pinv(edit.down) @ edit.down
        assert outside.norm() < 2e-3 * down.norm()
        assert (up @ down @ start.T).norm() < 2e-3 * (up @ down).norm() * start.norm()
        assert patch[module + ALPHA] == 4


def test_same_seed_same_file(host, patch):
    state = torch.get_rng_state()
    assert serialize(forget(host, "cat", QUICK)[0], "x") == serialize(patch, "x")
    assert serialize(forget(host, "cat", replace(QUICK, seed=1))[0], "x") != serialize(patch, "x")
    assert torch.equal(torch.get_rng_state(), state)


def test_advice_after_training_fits_how_it_ended():
    much = ProbeResult(0.9, 0.9, 0.1)
    little, near = hybrid_warnings(much, stopped_early=False, concepts=1)
    assert "more `steps`" in little and "`preserve`." in near
    little, near = hybrid_warnings(much, stopped_early=True, concepts=2)
    assert "steps" not in little and "fewer concepts" in near and not hybrid_warnings(ProbeResult(0.1, 0.1, 0.1), True, 2)


def test_replaced_by_itself_changes_nothing_and_says_so(little_probed, host):
    settings = replace(QUICK, mode="replace", target="cat")
    patch, _ = forget(host, "cat", settings)
    assert all((patch[module + UP].double() @ patch[module + DOWN].double()).abs().max() == 0 for module in patch.modules)
    with pytest.raises(ForgetError, match="Little effect: prompts of `cat` go 0%"):
        forget(host, "cat", replace(settings, strict=True))


def test_a_loss_that_is_not_finite_keeps_the_best_state(little_probed, host, monkeypatch):
    """The third step's first estimate is NaN; what comes out is finite, and says after which step."""
    predict, trained = host.predict, []

    def broken(x_t, t, prompts):
        estimate = predict(x_t, t, prompts)
        if estimate.requires_grad:
            trained.append(None)
        return estimate * float("nan") if estimate.requires_grad and len(trained) == 5 else estimate

    monkeypatch.setattr(host, "predict", broken)
    patch, losses = forget(host, "cat", QUICK)
    assert len(losses) == 2 and "diverged after step 2 of" in patch.info["report"]["warnings"][0]
    monkeypatch.setattr(host, "predict", lambda *args: predict(*args) * float("nan"))
    with pytest.raises(ForgetError, match="not finite at step 1"):
        forget(host, "cat", QUICK)


def test_each_picture_is_asked_for_by_its_own_concept(host):
    edit = make_edit(host, make_concepts("cat, kitten\nhouse"), QUICK)
    texts = PromptSet.of(host, edit.plan)
    for concept, names in enumerate(edit.plan.names.values()):
        rows = texts.rows(concept)
        assert rows and all(any(name in texts.prompts.texts[row] for name in names) for row in rows)
    assert sorted(texts.rows(0) + texts.rows(1)) == list(range(len(texts.prompts)))
    for row, template in enumerate(texts.template):
        pattern = NEAR_TEMPLATES["object"][template]
        assert texts.prompts.texts[row] in [fill(pattern, name) for name in edit.plan.forgotten]
        assert texts.target_prompts[template].texts[0] in [fill(pattern, word) for word in edit.plan.neutral]


@pytest.mark.parametrize("mode", ["replace", "correct"])
def test_modes(host, mode):
    patch, _ = forget(host, "lion", replace(QUICK, mode=mode, target="tiger", steps=2))
    report = patch.info["report"]
    assert report["target_error"]["after"] < 1 and list(report["erasure"]) == ["tiger" if mode == "correct" else "lion"]


def test_every_concept_gets_its_pictures(host):
    """However many names the first has."""
    edit = make_edit(host, make_concepts("cat, kitten, tabby\ndog"), QUICK)
    texts, generator = PromptSet.of(host, edit.plan), torch.Generator().manual_seed(0)
    assert set(make_images(TrainingRun(host, QUICK), texts, generator).concept) == {0, 1}


def test_long_names_are_read_as_far_as_the_text_encoder_goes(host):
    texts = PromptSet.of(host, make_edit(host, make_concepts("cat"), replace(QUICK, preserve=" ".join(["dog"] * 72))).plan)
    assert texts.token_mask.shape == texts.prompts.prompt_embeds.shape[:2]
    longer = texts.with_row(host.encode([" ".join(["dog"] * 100)]), torch.ones(154, dtype=torch.bool), 0, 0)
    assert longer.token_mask.shape == longer.prompts.prompt_embeds.shape[:2] == (len(texts.prompts) + 1, 154)
    for count in (72, 80):
        patch, _ = forget(host, "dog, " + " ".join(["cat"] * count), make_config("fast"))
        assert patch.info["report"]["erasure"]["dog"] > 0.5


def test_robust_keeps_the_last_good_state(little_probed, host, monkeypatch):
    from fmn_core.erasure import adversarial as robust

    next_step, taken = HybridTraining.next_step, []

    def breaking(training):
        taken.append(None)
        step = next_step(training)
        if len(taken) == 3:
            with torch.no_grad():
                for parameter in training.lora.parameters():
                    parameter.fill_(float("nan"))
        return step

    monkeypatch.setattr(HybridTraining, "next_step", breaking)
    monkeypatch.setattr(robust, "NEAR", 1)
    patch, losses = forget(host, "cat", make_config("robust", attack_rounds=1, steps=4, **SHORT))
    assert len(losses) == 2 and "diverged after step 2 of" in patch.info["report"]["warnings"][0]


def test_robust_takes_pictures_of_any_shape_and_the_largest_seed(little_probed, host, monkeypatch):
    from fmn_core.erasure import adversarial as robust

    monkeypatch.setattr(robust, "LEARNED_STEPS", 2)
    monkeypatch.setattr(robust, "NEAR", 1)
    images = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    config = make_config("robust", attack_rounds=1, steps=1, seed=2**64 - 1, **SHORT)
    _, losses = forget(host, "cat", config, images=images)
    assert len(losses) == 2


def test_given_pictures_and_a_mask(little_probed, host):
    images = torch.rand(2, 80, 64, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 80, 64)
    mask[:, 20:40, 20:40] = 1
    with_mask, without = (forget(host, "cat", replace(QUICK, steps=2), images=images, mask=m)[1] for m in (mask, None))
    assert with_mask != without
    with pytest.raises(ForgetError, match="The mask is empty"):
        forget(host, "cat", QUICK, images=images, mask=mask * 0)


def test_robust_learns_words_in_rounds_and_trains_against_them(little_probed, host, monkeypatch):
    """Every attack adds a prompt for each template, and finds the model so far patched; the file is an ordinary one."""
    from fmn_core.erasure import adversarial as robust

    monkeypatch.setattr(robust, "LEARNED_STEPS", 4)
    monkeypatch.setattr(robust, "NEAR", 2)
    settings, seen = make_config("robust", attack_rounds=2, steps=2, **SHORT), []
    attack = robust.attack

    def watched(training, *others):
        before, lora = len(training.prompts.prompts), training.lora
        attack(training, *others)
        seen.append((before, len(training.prompts.prompts), lora.adapter(*lora.targets[0]).up.detach().clone()))

    monkeypatch.setattr(robust, "attack", watched)
    patch, losses = forget(host, "cat", settings)
    templates = len(NEAR_TEMPLATES["object"])
    assert [after - before for before, after, _ in seen] == [templates, templates] and seen[1][0] == seen[0][1]
    assert not torch.equal(seen[0][2], seen[1][2]) and len(losses) == 6
    assert patch.rank == 2 * settings.rank and {module.rsplit("_to_", 1)[1] for module in patch.modules} == {
        "q", "k", "v", "out_0",
    }  # fmt: skip
    assert len(patch.info["report"]["learned_word_errors"]) == 2
    assert serialize(forget(host, "cat", settings)[0], "x") == serialize(patch, "x")
    with pytest.raises(ForgetError, match="cannot correct"):
        forget(host, "cat", replace(settings, mode="correct", target="dog"))

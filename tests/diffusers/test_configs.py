"""The original's config files, run on the demo model as a diffusers pipeline."""

from __future__ import annotations

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from fmn_core.cli import run_config as configs
from fmn_core.cli.config_keys import DEAD, LIVE
from fmn_core.cli.main import main
from fmn_core.cli.run_config import forgetting_settings, inversion_settings, read_config
from fmn_core.erasure.config import make_config
from fmn_core.errors import ForgetError
from fmn_core.inversion.config import InversionConfig
from fmn_core.patch.file import read_patch


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, model):
    """run(config) -> exit code, what was printed, errors: in a folder with pictures in data/red-cat and data/dog."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("red-cat", (128, 128)), ("dog", (160, 128))):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", size, "red").save(tmp_path / "data" / name / "one.png")
        (tmp_path / "data" / name / "notes.txt").write_text("no picture")

    def run(config, model=model):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        capsys.readouterr()
        code = main(["run-config", "c.yaml", *(["--model", str(model)] if model else []), "--device", "cpu"])
        return code, *capsys.readouterr()

    return run


ATTN = {"multi_concept": [["red-cat", "object"]], "output_dir": "out", "max_train_steps": 2, "resolution": 128}
TI = {
    "instance_data_dir": "data/red-cat",
    "output_dir": "exps_ti/red-cat",
    "placeholder_tokens": "<s1>|<s2>",
    "initializer_tokens": "cat|<rand-1>",
    "max_train_steps_ti": 3,
    "resolution": 128,
}


def test_both_stages_run_one_after_the_other_from_one_file(run, tmp_path):
    code, said, error = run({"Attn": {**ATTN, "report_to": "tensorboard"}, "Ti": {**TI, "lora_rank": 4, "device": "cuda:0"}})
    assert code == 0, error
    assert load_file(tmp_path / "exps_ti/red-cat/step_inv_3.safetensors")["emb_params"].shape == (2, 112)
    patch = read_patch(tmp_path / "out/forget-red-cat.safetensors")
    assert patch.info["concept"] == "<red-cat>" and len(patch.modules) % 4 == 0
    assert {module.rsplit("_to_", 1)[1] for module in patch.modules} == {"q", "k", "v", "out_0"}
    assert "no effect" not in said, "the original's own values"
    assert (tmp_path / "out/forget-red-cat-unet.safetensors").exists() and "with the UNet's LoRA" in said


def test_several_concepts_of_different_types_by_their_names(run, tmp_path):
    several = [["red-cat", "object"], ["dog", "style"]]
    code, said, error = run({"Attn": {**ATTN, "multi_concept": several, "use_ti": False, "only_optimize_ca": True}})
    assert code == 0, error
    concepts = read_patch(tmp_path / "out/forget-red-cat-dog.safetensors").info["concepts"]
    assert [(c["names"], c["templates"]) for c in concepts] == [
        (["red cat"], ["a photo of {}"]),
        (["dog"], ["a photo in the style of {}"]),
    ]
    assert len(list((tmp_path / "out").iterdir())) == 1 and "with the UNet's LoRA" not in said


def test_the_originals_learned_words_are_loaded(run, tmp_path, monkeypatch):
    folder = tmp_path / "exps_ti/red-cat"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    for steps, count in ((100, 1), (500, 3), (50, 2)):
        tokens = {f"<s{i + 1}>": torch.randn(112) for i in range(count)}
        save_file(tokens, folder / f"step_inv_{steps}.safetensors")
    learned = []
    monkeypatch.setattr(configs, "add_embedding", lambda host, name, path: learned.append(path) or "red cat")
    code, _, error = run({"Attn": {**ATTN, "max_train_steps": 1, "use_pooler": False}})
    assert code == 0, error
    assert [path.name for path in learned] == ["step_inv_500.safetensors"], "the words after the most steps"


def test_no_real_image_takes_the_models_own(run, tmp_path):
    config = {**ATTN, "multi_concept": [["cat", "object"]], "use_ti": False, "no_real_image": True, "max_train_steps": 1}
    code, _, error = run({"Attn": config})
    assert code == 0, error
    assert (tmp_path / "out/forget-cat.safetensors").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"Attn": ATTN}, "There is no embedding in"),
        ({"Attn": {**ATTN, "use_ti": False, "multi_concept": [["bird", "object"]]}}, "There is no folder"),
        ({"Attn": {**ATTN, "use_ti": False, "multi_concept": [["dog", "thing"]]}}, "The concept type `thing` is unknown"),
        ({"Attn": {**ATTN, "multi_concept": ["dog", "object"]}}, "write a list of pairs"),
        ({"Attn": {"output_dir": "out"}}, "multi_concept is `None`"),
        ({"Attn": {**ATTN, "max_train_step": 3}}, "does not know: max_train_step."),
        ({"Attn": {**ATTN, "max_train_steps": "many"}}, "max_train_steps is `many`: write a number"),
        ({"Attn": {**ATTN, "max_train_steps": 0}}, "max_train_steps is 0: write a number from 1 to 1000."),
        ({"Attn": {**ATTN, "max_train_steps": 1500}}, "max_train_steps is 1500: write a number from 1 to 1000."),
        ({"Attn": {**ATTN, "max_train_steps": 35.9}}, "max_train_steps is 35.9: write a whole number."),
        (
            {"Attn": {**ATTN, "seed": 1 << 64}},
            "seed is 18446744073709551616: write a number from 0 to 18446744073709551615.",
        ),
        ({"Attn": {**ATTN, "use_pooler": "no"}}, "use_pooler is `no`: write true or false."),
        ({"Attn": {**ATTN, "max_train_steps": "1e999"}}, "max_train_steps is `1e999`: write a number."),
        ({"Attn": {**ATTN, "learning_rate": 0}}, "learning_rate is 0: write a number above 0, and up to 0.08 for 2 steps."),
        ({"Attn": {**ATTN, "learning_rate": 0.2}}, "learning_rate is 0.2: write a number above 0, and up to 0.08 for 2"),
        ({"Attn": {**ATTN, "learning_rate": None}}, "learning_rate is `None`: write a number."),
        ({"Attn": {**ATTN, "train_batch_size": 40}}, "train_batch_size is 40: write a number from 1 to 16."),
        ({"Ti": {**TI, "max_train_steps_ti": None}}, "max_train_steps_ti is `None`: write a number."),
        ({"Ti": {**TI, "learning_rate_ti": 3}}, "learning_rate_ti is 3.0: write a number from 1e-07 to 1.0."),
        ({"Ti": {**TI, "initializer_tokens": [320, 49999]}}, "There is no token 49999: the text encoder has 49408"),
        ({"Ti": {**TI, "use_template": "naked"}}, "write `object` or `style`"),
        ({"Ti": {**TI, "initializer_tokens": "cat"}}, "2 placeholder_tokens and 1 initializer_tokens"),
        ({"Ti": {**TI, "instance_data_dir": None}}, "instance_data_dir is missing"),
        ({"Ti": {**TI, "instance_data_dir": ["data"]}}, "instance_data_dir is `['data']`: write a folder's name"),
        ({"Ti": {**TI, "output_dir": None}}, "output_dir is missing"),
        ({"Attn": {**ATTN, "use_ti": False, "output_dir": 2024}}, "output_dir is `2024`: write a folder's name"),
        ({"Ti": {**TI, "initializer_tokens": "sunflowery|cat"}}, "tokens and must be one"),
        ({"Lora": {}}, "there are only `Attn` and `Ti`"),
        ({1: {}, "Ti": TI}, "has the part `1`: there are only `Attn` and `Ti`"),
        ({"multi_concept": 3}, "its keys belong under"),
        ([1], "is not a config"),
    ],
)
def test_what_cannot_be_followed_gets_a_sentence(run, config, message):
    code, _, error = run(config)
    assert code == 1 and message in error


def test_a_model_that_is_not_there_gets_a_sentence(run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, error = run({"Ti": {**TI, "pretrained_model_name_or_path": "nowhere/model"}}, model="nowhere-at-all/model")
    assert code == 1 and "The model nowhere-at-all/model cannot be loaded" in error and "--model" in error


def test_broken_yaml_gets_a_sentence(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("Attn: [")
    assert main(["run-config", str(tmp_path / "c.yaml")]) == 1 and "cannot be read as YAML" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("Attn: !!python/object/apply:os.getcwd []")
    assert main(["run-config", str(tmp_path / "c.yaml")]) == 1 and "cannot be read as YAML" in capsys.readouterr().err


@pytest.mark.parametrize("root", LIVE)
def test_only_keys_that_say_other_than_the_original_are_told_to_have_no_effect(root, tmp_path, capsys):
    def said(**changed):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({root: {**DEAD[root], **changed}}))
        read_config(tmp_path / "c.yaml")
        return capsys.readouterr().out

    assert said() == ""
    for key, default in DEAD[root].items():
        other = not default if isinstance(default, bool) else "x|y" if default is None else f"{default}1"
        assert said(**{key: other}) == f"Of {root} these keys have no effect any more: {key}.\n", key
        if isinstance(default, float):
            assert said(**{key: f"{default:e}"}) == "", "the same number in another spelling"


def test_the_text_at_the_placeholders_is_told_where_it_is_another(tmp_path, capsys):
    def said(at_data):
        tokens = {"placeholder_tokens": "<s1>|<s2>", "placeholder_token_at_data": at_data}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"Ti": tokens}))
        read_config(tmp_path / "c.yaml")
        return capsys.readouterr().out

    assert said("<s>|<s1><s2>") == "" and "placeholder_token_at_data" in said("<s>|<s1> of <s2>")


def test_a_second_run_takes_the_next_name_and_the_newest_words_are_forgotten_by(run, tmp_path, monkeypatch):
    config = {"Ti": {**TI, "max_train_steps_ti": 1}, "Attn": {**ATTN, "max_train_steps": 1, "use_pooler": False}}
    first = run(config)
    assert first[0] == 0 and "earlier run" not in first[1], first
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    asked = []
    monkeypatch.setattr(configs, "add_embedding", lambda host, name, path: asked.append(path) or "red cat")
    code, said, error = run(config)
    assert code == 0, error
    assert all(file.read_bytes() == data for file, data in before.items())
    made = sorted(str(file.relative_to(tmp_path)) for file in {*tmp_path.rglob("*.safetensors")} - {*before})
    assert made == [
        "exps_ti/red-cat/step_inv_1-2.safetensors",
        "out/forget-red-cat-2-unet.safetensors",
        "out/forget-red-cat-2.safetensors",
    ]
    assert all(f"this run's is {name}" in said for name in ("step_inv_1-2.safetensors", "forget-red-cat-2.safetensors"))
    assert [path.name for path in asked] == ["step_inv_1-2.safetensors"]


def test_the_newest_words_are_those_after_the_most_steps_of_the_last_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exps_ti/cat").mkdir(parents=True)
    names = ("step_inv_500", "step_inv_500-2", "step_inv_500-10", "step_inv_90-11", "step_inv_500-unfinished", "other")
    for name in names:
        (tmp_path / f"exps_ti/cat/{name}.safetensors").touch()
    assert configs.newest_embedding("cat").stem == "step_inv_500-10"


@pytest.mark.parametrize("given", ["320|<rand-1>", ["320", "<rand-1>"], [320, "<rand-1>"]])
def test_initialisers_may_be_token_numbers_and_lists(run, tmp_path, model, given):
    code, _, error = run({"Ti": {**TI, "initializer_tokens": given, "max_train_steps_ti": 1, "clip_ti_decay": False}})
    assert code == 0, error
    (words,) = load_file(tmp_path / "exps_ti/red-cat/step_inv_1.safetensors").values()
    own = load_file(model / "text_encoder/model.safetensors")
    weight = next(value for key, value in own.items() if key.endswith("token_embedding.weight"))[320]
    assert (words[0] - weight).abs().max() < 2e-3 < words.std(), "one step of AdamW from the token's own"


def test_without_steps_the_epochs_count(tmp_path):
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"Attn": {**ATTN, "max_train_steps": None, "num_train_epochs": 3, "train_batch_size": 4}})
    )
    config = read_config(tmp_path / "c.yaml")["Attn"]
    assert [forgetting_settings(config, pictures=count).steps for count in (1, 4, 10)] == [3, 3, 9]


def test_a_large_seed_keeps_its_digits_and_epochs_are_named_as_written():
    config = {**LIVE["Attn"], **ATTN, "seed": 9007199254740993}
    assert forgetting_settings(config).seed == 9007199254740993
    with pytest.raises(ForgetError, match="num_train_epochs is 300, which for 10 pictures is 3,000 steps"):
        forgetting_settings({**config, "max_train_steps": None, "num_train_epochs": 300}, 10)


def test_running_out_of_memory_gets_a_sentence(run, monkeypatch):
    def allocate(*args):
        return torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(configs, "open_config_host", allocate)
    code, _, error = run({"Ti": TI})
    assert code == 1 and error.count("There is not enough memory on the device: lower") == 1 and "Traceback" not in error
    monkeypatch.undo()


def test_keys_become_settings(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("Attn:\n  multi_concept: [[elon-musk, object]]\nTi:\n  instance_data_dir: x\n")
    config = read_config(file)
    assert list(config) == ["Ti", "Attn"]
    published = {"target_modules": "q,k,v,out", "train_layers": "whole_unet", "loss": "joint_norm"}
    published |= {"penalized_tokens": "concept_and_end", "resolution": 512}
    forgetting = forgetting_settings(config["Attn"])
    assert forgetting == make_config(preset="paper", learning_rate=forgetting.learning_rate, **published)
    assert forgetting_settings(config["Attn"], pads_with_end=True).penalized_tokens == "concept_onward"
    assert inversion_settings(config["Ti"]) == InversionConfig(init_tokens="<rand-0.017>", seed=42, resolution=512)
    file.write_text(
        "Attn:\n  multi_concept: [[a, style]]\n  learning_rate: 4e-6\n  use_pooler: false\n  seed: 7\n"
        "  train_batch_size: 2\n"
        "Ti:\n  use_template: style\n  placeholder_tokens: <s1>|<s2>\n  learning_rate_ti: 5e-3\n  clip_ti_decay: false\n"
    )
    config = read_config(file)
    doubled, inversion = forgetting_settings(config["Attn"]), inversion_settings(config["Ti"])
    assert doubled.learning_rate == pytest.approx(2**0.5 * forgetting.learning_rate)
    forgetting = doubled
    assert (forgetting.penalized_tokens, forgetting.seed, forgetting.batch_size) == ("concept", 7, 2)
    assert (inversion.learning_rate, inversion.norm_decay, inversion.concept_type) == (5e-3, False, "style")
    assert inversion.init_tokens == "<rand-0.017>|<rand-0.017>"

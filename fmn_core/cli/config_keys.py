"""The keys of the original's configs/attn.yaml and configs/ti.yaml (SHI-Labs/Forget-Me-Not), with its own defaults."""

from __future__ import annotations

MODEL = "stabilityai/stable-diffusion-2-1-base"

# By root: the keys that say something here, and those that have no effect any more. Of the former a key that is left out has
# the original's default, but for what belongs to its one example.
LIVE = {
    "Attn": {
        "multi_concept": None,
        "output_dir": "exps_attn",
        "use_ti": True,
        "only_optimize_ca": False,
        "use_pooler": True,
        "train_batch_size": 1,
        "learning_rate": 2e-6,
        "max_train_steps": 35,
        "num_train_epochs": 1,
        "pretrained_model_name_or_path": MODEL,
        "no_real_image": False,
        "seed": None,
        "resolution": 512,
    },
    "Ti": {
        "instance_data_dir": None,
        "output_dir": "exps_ti",
        "use_template": "object",
        "placeholder_tokens": "",
        "initializer_tokens": None,
        "train_batch_size": 1,
        "learning_rate_ti": 1e-3,
        "max_train_steps_ti": 500,
        "pretrained_model_name_or_path": MODEL,
        "seed": 42,
        "resolution": 512,
        "clip_ti_decay": True,
    },
}
DEAD = {
    "Attn": {
        "revision": None,
        "tokenizer_name": None,
        "class_data_dir": None,
        "instance_prompt": None,
        "concept_keyword": None,
        "class_prompt": None,
        "with_prior_preservation": False,
        "prior_loss_weight": 1.0,
        "num_class_images": 20,
        "center_crop": False,
        "train_text_encoder": False,
        "sample_batch_size": 4,
        "checkpointing_steps": 500,
        "resume_from_checkpoint": None,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "scale_lr": False,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "lr_num_cycles": 1,
        "lr_power": 1.0,
        "use_8bit_adam": False,
        "dataloader_num_workers": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_weight_decay": 1e-2,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "push_to_hub": False,
        "hub_token": None,
        "hub_model_id": None,
        "logging_dir": "logs",
        "allow_tf32": False,
        "report_to": "tensorboard",
        "mixed_precision": None,
        "prior_generation_precision": None,
        "local_rank": -1,
        "enable_xformers_memory_efficient_attention": False,
        "set_grads_to_none": False,
    },
    "Ti": {
        "placeholder_token_at_data": None,
        "train_text_encoder": False,
        "pretrained_vae_name_or_path": None,
        "revision": None,
        "class_data_dir": None,
        "stochastic_attribute": None,
        "perform_inversion": True,
        "class_prompt": None,
        "with_prior_preservation": False,
        "prior_loss_weight": 1.0,
        "num_class_images": 100,
        "color_jitter": False,
        "sample_batch_size": 1,
        "max_train_steps_tuning": 1000,
        "save_steps": 100,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "mixed_precision": "fp16",
        "lora_rank": 4,
        "learning_rate_unet": 3e-4,
        "learning_rate_text": 3e-4,
        "continue_inversion": True,
        "continue_inversion_lr": 1e-4,
        "use_face_segmentation_condition": False,
        "scale_lr": False,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 100,
        "lr_scheduler_lora": "linear",
        "lr_warmup_steps_lora": 0,
        "weight_decay_ti": 0.1,
        "weight_decay_lora": 1e-3,
        "use_8bit_adam": False,
        "device": "cuda:0",
        "extra_args": None,
        "log_wandb": False,
        "wandb_log_prompt_cnt": 10,
        "wandb_project_name": "new_pti_project",
        "wandb_entity": "new_pti_entity",
    },
}


def without_effect(root: str, config: dict) -> list[str]:
    """The keys of a config that say other than the original's default, and have no effect here."""
    changed = [key for key in config if key in DEAD[root] and not is_default(config[key], DEAD[root][key])]
    at_data = str(config.get("placeholder_token_at_data") or "").partition("|")[2]
    if at_data and at_data == "".join(split_tokens(config.get("placeholder_tokens"))):  # what stands in the prompts here too
        changed = [key for key in changed if key != "placeholder_token_at_data"]
    return changed


def is_default(value: object, default: object) -> bool:
    """Whether a value is the default, which a number is in any spelling: YAML takes `2e-6` for a text."""
    if isinstance(default, bool) or isinstance(value, bool) or default is None or value is None:
        return value is default
    if not isinstance(value, str | int | float) or not isinstance(default, str | int | float):
        return value == default
    try:
        return float(value) == float(default)
    except (ValueError, OverflowError):
        return value == default


def split_tokens(value: object) -> list[str]:
    """The tokens in a text with `|` between them, or in a list."""
    several = value if isinstance(value, list) else [] if value is None else str(value).split("|")
    return [str(token) for token in several if str(token)]

"""Loading the demo model as the webui loads a checkpoint of SD1."""

import torch
from ldm.util import instantiate_from_config
from omegaconf import OmegaConf
from safetensors.torch import load_file
from standin import CheckpointInfo, exported, strict, text_encoders_by_size, text_model_named


class SdModelData:
    def __init__(self):
        self.sd_model = None

    def get_sd_model(self):
        if self.sd_model is None:
            self.sd_model = load_model()
        return self.sd_model


def load_model():
    from .sd_hijack import model_hijack

    folder, config = exported()
    info = CheckpointInfo(next(folder.glob("*.safetensors")))
    with torch.random.fork_rng(), text_encoders_by_size():
        model = instantiate_from_config(OmegaConf.create({"model": on_cpu(config["model"])}).model)
    weights = text_model_named(model.cond_stage_model.transformer, load_file(info.filename))
    model.load_state_dict({key: tensor.float() for key, tensor in weights.items()}, strict=False)
    model = model.float().eval()  # --no-half
    model.is_sd1, model.is_sd2, model.is_sdxl, model.is_sd3 = True, False, False, False
    model.sd_checkpoint_info, model.sd_model_hash = info, info.shorthash
    model_hijack.hijack(model)
    networks_names(model)
    return model


def on_cpu(config):
    text = config["params"]["cond_stage_config"]["params"]
    return {**config, "params": {**config["params"], "cond_stage_config": {
        **config["params"]["cond_stage_config"], "params": {**text, "device": "cpu"}}}}  # fmt: skip


def networks_names(model):
    """The built-in Lora extension hears of every model that is loaded."""
    import networks

    networks.assign_network_names_to_compvis_modules(model)


model_data = SdModelData()
strict(__name__)

"""Loading the embedded model as the webui loads a checkpoint of SD1."""

import torch
from ldm.util import instantiate_from_config
from omegaconf import OmegaConf
from safetensors.torch import load_file
from standin import CheckpointInfo, exported, make_ldm_importable, strict

make_ldm_importable()


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
    with torch.random.fork_rng():
        model = instantiate_from_config(OmegaConf.create({"model": on_cpu(config["model"])}).model)
    weights = {key: tensor.float() for key, tensor in load_file(info.filename).items()}
    model.load_state_dict({k: w for k, w in weights.items() if not k.startswith("cond_stage_model.")}, strict=False)
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

import torch
from standin import CheckpointInfo, exported, strict


class FakeInitialModel:
    """In the model's place until a picture is asked for."""

    cond_stage_model = None
    chunk_length = 75


class SdModelData:
    def __init__(self):
        self.sd_model = FakeInitialModel()
        folder, _ = exported()
        self.forge_loading_parameters = {"checkpoint_info": CheckpointInfo(next(folder.glob("*.safetensors")))}
        self.forge_hash = ""

    def get_sd_model(self):
        return self.sd_model

    def set_sd_model(self, model):
        self.sd_model = model


model_data = SdModelData()


@torch.inference_mode()
def forge_model_reload():
    """Loads the model that the page has chosen, if another or none is loaded."""
    wanted = str(model_data.forge_loading_parameters)
    if model_data.forge_hash == wanted:
        return model_data.sd_model, False
    from backend.diffusion_engine.sd15 import StableDiffusion

    info = model_data.forge_loading_parameters["checkpoint_info"]
    if info is None:
        raise ValueError("You do not have any model! Please download at least one model in [models/Stable-diffusion].")
    model = StableDiffusion(info.filename)
    model.sd_checkpoint_info, model.filename, model.sd_model_hash = info, info.filename, info.shorthash
    model_data.set_sd_model(model)
    model_data.forge_hash = wanted
    return model, True


strict(__name__)

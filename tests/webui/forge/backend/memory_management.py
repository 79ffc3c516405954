import torch
from standin import strict

current_loaded_models = []


def get_torch_device():
    return torch.device("cpu")


def load_models_gpu(models, memory_required=0, hard_memory_preservation=0):
    """One patcher of a model is loaded at a time: a clone takes its place, and its LoRAs with it."""
    for patcher in models:
        current_loaded_models[:] = [other for other in current_loaded_models if other.model is not patcher.model]
        current_loaded_models.append(patcher)
        patcher.refresh_loras()


def load_model_gpu(model):
    load_models_gpu([model])


def soft_empty_cache(force=False):
    pass


strict(__name__)

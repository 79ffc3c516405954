import sys
import types

import torch
from standin import Options, State, reach

cmd_opts = Options("modules.shared.cmd_opts", lora_dir="", ckpt_dir=None, embeddings_dir="")
opts = Options(
    "modules.shared.opts", batch_cond_uncond=True, CLIP_stop_at_last_layers=1, use_old_scheduling=False,
    live_previews_enable=True,
)  # fmt: skip
state = State()
device = torch.device("cpu")
parallel_processing_allowed = True


class Shared(types.ModuleType):
    """`sd_model` is what the last loading made, a FakeInitialModel before the first."""

    @property
    def sd_model(self):
        from . import sd_models

        return sd_models.model_data.get_sd_model()

    def __getattr__(self, name):
        reach("modules.shared", name)


sys.modules[__name__].__class__ = Shared

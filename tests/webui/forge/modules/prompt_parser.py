from standin import strict
from standin_prompts import (  # noqa: F401 (the webui's place for them)
    get_learned_conditioning_prompt_schedules,
    get_multicond_prompt_list,
    parse_prompt_attention,
)


class SdConditioning(list):
    """Prompts with the size of the picture, which SDXL is told."""

    def __init__(self, prompts, is_negative_prompt=False, width=None, height=None, copy_from=None):
        super().__init__(prompts)
        self.is_negative_prompt, self.width, self.height = is_negative_prompt, width, height


strict(__name__)

"""Scripts beside every generation, called in the webui's order; errors are raised here, where the webui logs them."""

import re

AlwaysVisible = object()


class Script:
    is_img2img = False
    infotext_fields = paste_field_names = None

    def elem_id(self, item):
        return f"script_txt2img_{re.sub('[^a-z_0-9]', '', self.title().lower())}_{item}"


class ScriptRunner:
    """What `p.scripts` is: hands on each hook with the values of the scripts' components."""

    HOOKS = (
        "before_process", "process", "before_process_batch", "process_batch", "process_before_every_sampling",
        "postprocess_batch", "postprocess",
    )  # fmt: skip

    def __init__(self, script, values):
        self.script, self.values = script, values

    def __getattr__(self, hook):
        if hook not in self.HOOKS:
            raise AttributeError(hook)

        def call(p, *args, **kwargs):
            own = getattr(self.script, hook, None)
            if own is not None:
                own(p, *args, *self.values, **kwargs)

        return call

    def postprocess_batch(self, p, images, **kwargs):
        self.script.postprocess_batch(p, *self.values, images=images, **kwargs)

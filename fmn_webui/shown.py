"""A picture as pages get it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

QUALITY = 90  # of the JPEG


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture that pages ask for again and again, and is encoded once for all of them."""

    image: Image.Image

    @cached_property
    def jpeg(self) -> str:
        """base64 of a JPEG."""
        data = io.BytesIO()
        self.image.convert("RGB").save(data, "jpeg", quality=QUALITY)
        return base64.b64encode(data.getvalue()).decode()

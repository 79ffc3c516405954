"""AUTOMATIC1111 webui 1.10.1 as far as the extension uses it."""

from standin import make_ldm_importable

make_ldm_importable()

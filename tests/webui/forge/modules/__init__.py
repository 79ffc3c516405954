"""Forge's `modules` as far as the extension uses it."""

from standin import make_ldm_importable

make_ldm_importable()

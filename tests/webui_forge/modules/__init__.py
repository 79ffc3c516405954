"""Forge's `modules` as far as the extension uses it."""

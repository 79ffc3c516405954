"""Forge's backend as far as the extension uses it, and what its behaviour needs."""

"""The presets: how a concept is forgotten."""

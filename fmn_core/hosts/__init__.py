"""One adapter for each program that the core runs in."""

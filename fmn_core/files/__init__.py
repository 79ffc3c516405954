"""Files whole or not at all; files by others, bounded."""

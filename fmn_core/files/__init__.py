"""Files that appear whole or not at all, and files of others, bounded before they are read."""

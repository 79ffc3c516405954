"""What a patch forgets, and what it keeps."""

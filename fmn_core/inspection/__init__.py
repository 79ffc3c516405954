"""What a patch file holds, in words and as a picture."""

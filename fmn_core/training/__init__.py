"""What every training shares: its loop, its state, its memory, its losses and its pictures."""

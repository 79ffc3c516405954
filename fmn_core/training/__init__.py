"""What trainings share: loop, state, memory, losses, images."""

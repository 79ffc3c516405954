"""Token attention: captured, recorded, shown and compared."""

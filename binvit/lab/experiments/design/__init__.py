"""What experiments have in common: conditions, the texts that name images, equal numbers of updates."""

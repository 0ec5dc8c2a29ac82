"""The commands of `binvit`, by what they are about; each imports what it needs, so that `--help` answers at once."""

"""The experiments: a file per notebook, with what is trained, what is claimed and what is drawn."""

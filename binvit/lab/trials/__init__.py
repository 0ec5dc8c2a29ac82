"""Trials: configurations that are trained once, their results and models as files, here or in several processes."""

"""Notebooks as files: their parameters checked, executed by papermill, cleaned, checked and reported."""

"""Figures: one style, and the charts that the notebooks draw."""

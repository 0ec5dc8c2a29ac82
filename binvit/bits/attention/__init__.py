"""Attention on bits: scores by population counts, the superposed map, the value in groups, and the class heads."""

"""Measurements of speed and memory, side by side with the named peers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "kernels": ["WIDTHS", "benchmark_kernels"],
        "memory": ["benchmark_memory", "peak_memory"],
        "models": [
            "benchmark_growth",
            "benchmark_models",
            "benchmark_training",
            "calibrated_model",
            "random_model",
        ],
        "peers": ["PEERS"],
        "roofline": ["draw_roofline"],
    },
)

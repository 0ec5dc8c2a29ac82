"""binvit: reproduce, question and deploy 1-bit vision transformers."""

import lazy_loader

__version__ = "0.1.1"

# Resolved on first use, so that `import binvit` loads neither torch nor kernels.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["bits", "lab", "nn", "packed"],
    submod_attrs={
        "nn": ["Scheme", "binarize", "calibrate", "list_schemes", "load_official_gsb", "round_vectors", "scheme"],
        "packed": ["PackedViT", "export_onnx", "list_models", "load", "pack", "save"],
    },
)

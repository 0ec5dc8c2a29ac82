"""Images: data sets, their files, wrong labels, transforms and minibatches."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"datasets": ["ImageData", "list_datasets", "load_data"]}
)

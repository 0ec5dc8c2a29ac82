"""Pictures from inside a model: attention over its image, and values with the thresholds that binarize them."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from binvit.lab.figures.histogram import as_array
from binvit.lab.figures.style import INK, SCHEME_COLORS, caption, styled


@styled
def attention_maps(
    images: Any,
    maps: Mapping[str, Any],
    grid: tuple[int, int],
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw attention maps beside their images: one row per image, one column per map, the image itself first.

    Of a map over all tokens the class token's row is shown, or the mean over all rows if there is no such token. Each
    map is scaled by its own largest weight, so that what is compared is where a model looks and how many levels its
    weights have. Equal weights of a map have equal colours, whatever the image shows there.

    Args:
        images: (H, W, 3), (B, H, W, 3) or a sequence of B PIL images; floats from 0 to 1 or bytes.
        maps: column title -> (T, T) or (h, w), or (B, T, T) or (B, h, w), arrays or tensors, never negative;
            T tokens are the patches with any number of class and register tokens before them.
        grid: rows and columns of patches, (h, w).
        names: a name for each row, such as the class.
        title: what the figure says.

    Returns:
        The figure.

    Raises:
        ValueError: if a map has another shape, too few tokens, or weights that are negative or not finite.
    """
    pictures = _images(images)
    columns = {
        name: [_patches(name, m, grid) for m in _batch(name, stack, len(pictures))] for name, stack in maps.items()
    }
    if names is not None and len(names) != len(pictures):
        raise ValueError(f"Each image needs one name: {len(pictures)} images and {len(names)} names came.")
    side = 1.35
    fig, axes = plt.subplots(
        len(pictures),
        1 + len(columns),
        figsize=(side * (1 + len(columns)), side * len(pictures) + 0.45 + 0.3 * bool(title)),
        squeeze=False,
    )
    for row, picture in enumerate(pictures):
        axes[row, 0].imshow(picture)
        for ax, stack in zip(axes[row, 1:], columns.values(), strict=True):
            height, width = picture.shape[:2]
            ax.imshow(_colors(stack[row]), extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.grid(visible=False)
    for ax, heading in zip(axes[0], ["image", *columns], strict=True):
        ax.set_title(heading, loc="center", fontsize=8.5, color=SCHEME_COLORS.get(heading, INK), pad=4)
    names = names or []
    upright = max(map(len, names), default=0) <= 4
    for ax, name in zip(axes[:, 0], names, strict=False):
        ax.set_ylabel(
            name, fontsize=8, color=INK, **({"rotation": 0, "ha": "right", "va": "center"} if upright else {})
        )
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=9, fontweight="bold")
    caption(fig, "attention paid to each patch; grey: none, full colour: the largest weight of the map")
    return fig


def _images(images: Any) -> list[np.ndarray]:
    """Return the images as (H, W, 3) float arrays from 0 to 1."""
    if hasattr(images, "detach"):
        images = images.detach().cpu().numpy()
    single = hasattr(images, "convert") or (isinstance(images, np.ndarray) and images.ndim == 3)
    result = []
    for image in [images] if single else images:
        picture = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
        if picture.ndim != 3 or picture.shape[-1] != 3:
            raise ValueError(f"An image to draw has the shape (H, W, 3), and one of shape {picture.shape} came.")
        picture = picture / 255.0 if picture.dtype == np.uint8 else picture.astype(np.float64)
        result.append(np.clip(picture, 0, 1))
    return result


def _batch(name: str, stack: Any, count: int) -> np.ndarray:
    stack = as_array(stack)
    stack = stack[None] if stack.ndim == 2 else stack
    if stack.ndim != 3 or len(stack) != count:
        raise ValueError(
            f"The maps {name!r} have the shape {stack.shape}, but {count} two-dimensional maps were expected."
        )
    return stack


def _patches(name: str, m: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return the map over patches, (h, w), of a map over patches or over tokens."""
    rows, columns = grid
    if m.shape != (rows, columns):
        if m.shape[0] != m.shape[1] or m.shape[1] < rows * columns:
            raise ValueError(
                f"The map {name!r} has the shape {m.shape}, which fits neither the {rows} x {columns} patches nor "
                f"at least {rows * columns} tokens."
            )
        extra = m.shape[1] - rows * columns
        m = (m[0, extra:] if extra else m.mean(axis=0)).reshape(rows, columns)
    if not np.isfinite(m).all() or m.min() < 0:
        raise ValueError(f"The map {name!r} has weights that are negative or not finite.")
    return m


def _colors(m: np.ndarray) -> np.ndarray:
    """Return the map in colours that depend on nothing but the weight, (h, w, 3); pale grey is 0."""
    weight = (m / (m.max() or 1.0))[..., None]
    return (1 - weight) * 0.93 + weight * np.array(to_rgb(SCHEME_COLORS["gsb"]))

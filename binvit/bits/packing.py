"""Signs, levels and group masks as bits: 64 elements of the last axis in one uint64 word, the lowest bit first."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from binvit.jit import aligned_empty, kernel, vector_code

WORD = 64


def word_count(length: int) -> int:
    """Return the number of 64-bit words that hold `length` bits.

    Args:
        length: number of bits, at least 0.

    Returns:
        ceil(length / 64).

    Raises:
        ValueError: if the length is no integer.
    """
    check_length("length", length)
    return -(-length // WORD)


def pack_signs(x: np.ndarray) -> np.ndarray:
    """Pack the signs of the last axis into words: bit 1 means x >= 0, so sign(0) = +1 and NaN counts as negative.

    Args:
        x: real numbers (..., K), any strides.

    Returns:
        uint64 words (..., ceil(K / 64)); padding bits are zero.

    Raises:
        ValueError: if x has no axis or does not hold real numbers.

    References:
        Courbariaux et al., "Binarized Neural Networks", arXiv 1602.02830; sign(0) = +1 as in Liu et al., "BiT: Robustly
        Binarized Multi-distilled Transformer", arXiv 2205.13016.
    """
    x = _real_array(x, "pack_signs")
    if x.dtype != np.float32:
        return _pack_booleans(x >= 0)
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1]) if x.size else np.zeros((0, x.shape[-1]), np.float32)
    words = aligned_empty((len(rows), word_count(x.shape[-1])), np.uint64)
    _pack_float_rows(rows, words)
    return _restore_shape(words, x.shape)


def pack_levels(x: np.ndarray, threshold: float | np.ndarray = 0.5) -> np.ndarray:
    """Pack 1[x > threshold] along the last axis: the bits of the values {0, 1}.

    Args:
        x: real numbers (..., K), any strides.
        threshold: a number, or an array that broadcasts to x's shape.

    Returns:
        uint64 words (..., ceil(K / 64)); padding bits are zero.

    Raises:
        ValueError: if x does not hold real numbers or the threshold does not broadcast to it.
    """
    x = _real_array(x, "pack_levels")
    return _pack_booleans(x > _broadcast(threshold, x, "threshold"))


def pack_planes(x: np.ndarray, lower: float | np.ndarray, upper: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pack one value group of group superposition binarization: which elements are in it, and their signs.

    Args:
        x: real numbers (..., K), any strides.
        lower: elements below it are in the group; a number, or an array that broadcasts to x's shape.
        upper: elements above it are in the group; the same.

    Returns:
        Two arrays of uint64 words (..., ceil(K / 64)): the sign plane 1[x > 0] inside the group, and the mask plane
        1[x < lower or x > upper]. An exact zero in the group has no sign and is left out of the mask.

    Raises:
        ValueError: if x does not hold real numbers or a threshold does not broadcast to it.

    References:
        Gao et al., "GSB: Group Superposition Binarization for Vision Transformer with Limited Training Samples",
        arXiv 2305.07931; there sign(0) = 0 for the value.
    """
    x = _real_array(x, "pack_planes")
    mask = (x < _broadcast(lower, x, "lower threshold")) | (x > _broadcast(upper, x, "upper threshold"))
    mask &= x != 0
    return _pack_booleans(mask & (x > 0)), _pack_booleans(mask)


def unpack_signs(words: np.ndarray, length: int) -> np.ndarray:
    """Unpack words into signs, the inverse of `pack_signs`.

    Args:
        words: uint64 (..., ceil(length / 64)).
        length: number of elements of the last axis.

    Returns:
        int8 (..., length) of -1 and +1.

    Raises:
        ValueError: if the words are not uint64 or not as many as the length needs, or the length is no integer.
    """
    signs = unpack_levels(words, length).astype(np.int8)
    signs *= 2
    signs -= 1
    return signs


def unpack_levels(words: np.ndarray, length: int) -> np.ndarray:
    """Unpack words into zeros and ones, the inverse of `pack_levels`.

    Args:
        words: uint64 (..., ceil(length / 64)).
        length: number of elements of the last axis.

    Returns:
        uint8 (..., length) of 0 and 1.

    Raises:
        ValueError: if the words are not uint64 or not as many as the length needs, or the length is no integer.
    """
    words = check_words(words, "unpacked words")
    check_length("length", length)
    if length < 0 or words.shape[-1] != word_count(length):
        raise ValueError(
            f"Words of shape {words.shape} cannot hold {length} bits in the last axis: that takes "
            f"{word_count(max(length, 0))} words of 64 bits each."
        )
    if words.size == 0:
        return np.zeros((*words.shape[:-1], length), np.uint8)
    octets = np.ascontiguousarray(words, "<u8").view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=length, bitorder="little")


def check_length(name: str, length: int) -> None:
    """Raise a ValueError that names a number of bits unless it is an integer."""
    if isinstance(length, bool) or not isinstance(length, int | np.integer):
        raise ValueError(f"The number of bits {name} must be an integer, got {length!r}.")


def check_words(words: np.ndarray, name: str) -> np.ndarray:
    """Check that an array holds packed words.

    Args:
        words: what should be uint64 with at least one axis.
        name: what to call it in the error.

    Returns:
        The same array.

    Raises:
        ValueError: if it is anything else.
    """
    words = np.asarray(words)
    if words.dtype != np.uint64 or words.ndim == 0:
        raise ValueError(
            f"The {name} must be an array of uint64 with at least one axis, as pack_signs makes them, not "
            f"{words.dtype} of shape {words.shape}."
        )
    return words


def _real_array(x: np.ndarray, caller: str) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim == 0 or x.dtype.kind not in "fiu":
        raise ValueError(
            f"{caller} needs an array of floats or integers with at least one axis, not {x.dtype} of shape {x.shape}."
        )
    return x


def _broadcast(threshold: float | np.ndarray, x: np.ndarray, name: str) -> np.ndarray:
    threshold = np.asarray(threshold)
    if threshold.dtype.kind not in "fiu":
        raise ValueError(f"The {name} must be a real number or an array of them, not {threshold.dtype}.")
    try:
        np.broadcast_to(threshold, x.shape)
    except ValueError:
        raise ValueError(f"The {name} of shape {threshold.shape} does not broadcast to x of shape {x.shape}.") from None
    # A Python number must not widen x: 0.1 as float32 is what a float32 model compares with.
    return threshold.astype(x.dtype) if threshold.ndim == 0 and x.dtype.kind == "f" else threshold


def _pack_booleans(bits: np.ndarray) -> np.ndarray:
    words = np.zeros((*bits.shape[:-1], word_count(bits.shape[-1])), "<u8")
    if bits.size:
        octets = np.packbits(bits, axis=-1, bitorder="little")
        words.view(np.uint8)[..., : octets.shape[-1]] = octets
    return words.astype(np.uint64, copy=False)


def _restore_shape(words: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return words.reshape(*shape[:-1], words.shape[-1])


def _signs_of_64(x: np.ndarray, start: int) -> np.uint64:
    return _pack_booleans(x[start : start + WORD] >= 0)[0]


@vector_code(twin=_signs_of_64)
def signs_of_64(typing_context, x, start):
    """Return the word whose bit i is 1[x[start + i] >= 0] for 64 consecutive floats of a 1-D float32 array."""
    if not (isinstance(x, types.Array) and x.dtype == types.float32 and x.ndim == 1):
        raise TypeError("signs_of_64 reads a 1-D float32 array")
    signature = types.uint64(x, types.intp)

    def codegen(context, builder, signature, arguments):
        floats = ir.VectorType(ir.FloatType(), WORD)
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer = builder.bitcast(builder.gep(array.data, [arguments[1]]), floats.as_pointer())
        # An ordered comparison: false for NaN, true for -0.0, as numpy's x >= 0.
        bits = builder.fcmp_ordered(">=", builder.load(pointer, align=4), ir.Constant(floats, None))
        return builder.bitcast(bits, ir.IntType(WORD))

    return signature, codegen


@kernel
def pack_float_row(row: np.ndarray, words: np.ndarray) -> None:
    """Pack the signs of one float32 row into words; for use inside kernels.

    Args:
        row: float32 (K,), contiguous.
        words: uint64 (ceil(K / 64),), overwritten; padding bits are zero.
    """
    length = row.shape[0]
    whole = length // 64
    for w in range(whole):
        words[w] = signs_of_64(row, w * 64)
    if whole * 64 < length:
        word = np.uint64(0)
        for k in range(whole * 64, length):
            if row[k] >= 0:
                word |= np.uint64(1) << np.uint64(k - whole * 64)
        words[whole] = word


@kernel
def _pack_float_rows(rows: np.ndarray, words: np.ndarray) -> None:
    for i in range(rows.shape[0]):
        pack_float_row(rows[i], words[i])

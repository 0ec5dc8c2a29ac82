"""Products of packed matrices: xor or and, population count, add, in a tile of registers.

With K bits in words whose padding is zero, and bit 1 meaning +1:

* (+-1) x (+-1): K - 2 popcount(a xor w)
* {0,1} x (+-1): (K - 2 popcount(a xor w) + s) / 2, where s is the sum of the signs of w
* {0,1} x {-1,0,+1}: 2 popcount(a and p) - popcount(a and m), with mask plane m and sign plane p inside the mask
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numba
import numpy as np

from binvit.bits.packing import check_length, check_words, pack_signs, word_count
from binvit.bits.tile import PANEL, TILE, steps_of, tile_of_common_bits, tile_of_signs
from binvit.jit import aligned_empty, kernel
from binvit.threads import check_threads, get_threads, use_threads

_WORDS, _HALVES = np.dtype("<u8"), np.dtype("<u4")
_ROW_BLOCK = 240  # rows that meet a panel one after the other


@dataclass(frozen=True, eq=False)
class PreparedWeights:
    """Packed weights (N, K) in the kernel's own layout, made once by `prepare_weights`.

    Attributes:
        panels: uint32 (ceil(N / 64), steps, 64), aligned to 64 bytes: step k of a panel holds bits 32 k to 32 k + 31 of
            its 64 columns; steps is twice the number of 64-bit words. Columns past N are zero.
        columns: N.
    """

    panels: np.ndarray
    columns: int

    @property
    def words(self) -> int:
        """Number of 64-bit words of a row."""
        return self.panels.shape[1] // 2

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (N, words) of the packed words these were made of."""
        return self.columns, self.words

    @property
    def nbytes(self) -> int:
        """Return the bytes of the panels."""
        return self.panels.nbytes

    def sums(self, length: int) -> np.ndarray:
        """Sum the signs of every column, which turns products of signs into products of {0, 1}.

        Args:
            length: K, the number of bits of a row.

        Returns:
            int32 (ceil(N / 64) * 64,): 2 popcount(w) - K.
        """
        counts = np.bitwise_count(self.panels).sum(axis=1, dtype=np.int32).reshape(-1)
        return 2 * counts - np.int32(length)


def prepare_weights(w_bits: np.ndarray) -> PreparedWeights:
    """Rearrange packed weights for the product kernel.

    Args:
        w_bits: uint64 (N, words), as `pack_signs` makes them.

    Returns:
        The same bits word-major in panels of 64 columns.

    Raises:
        ValueError: if w_bits is not a uint64 matrix.
    """
    w_bits = _matrix(w_bits, "packed weights")
    columns, words = w_bits.shape
    count = word_count(columns)
    panels = aligned_empty((count, 2 * words, PANEL), np.uint32)
    padded = np.zeros((count * PANEL, 2 * words), np.uint32)
    padded[:columns] = halves(w_bits)
    panels[...] = padded.reshape(count, PANEL, 2 * words).transpose(0, 2, 1)
    return PreparedWeights(panels, columns)


def binary_matmul(
    a_bits: np.ndarray,
    w_bits: np.ndarray | PreparedWeights,
    K: int,
    *,
    unsigned: bool = False,
    mask: np.ndarray | PreparedWeights | None = None,
    threads: int | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Multiply packed matrices exactly: out[m, n] = sum over k < K of a[m, k] w[n, k].

    Args:
        a_bits: uint64 (M, words), the left operand's bits; padding bits zero.
        w_bits: uint64 (N, words), the right operand's signs, or `prepare_weights` of them.
        K: number of bits of a row; words = ceil(K / 64).
        unsigned: whether a's bits mean {0, 1} instead of {-1, +1}.
        mask: uint64 (N, words) or prepared: where given, the right operand is sign x mask, {-1, 0, +1}; a must be
            unsigned and the signs must lie inside the mask.
        threads: how many threads to use; by default what `set_threads` said.
        out: int32 (M, N), C-contiguous, to write into.

    Returns:
        int32 (M, N).

    Raises:
        ValueError: if the operands are not uint64 matrices, K is no integer, the widths do not fit each other or K, a
            mask comes with signed activations, `out` has another shape or type, or `threads` is less than 1.

    References:
        Rastegari et al., "XNOR-Net", arXiv 1603.05279.
    """
    a_bits = _matrix(a_bits, "left operand")
    weights = w_bits if isinstance(w_bits, PreparedWeights) else prepare_weights(_matrix(w_bits, "right operand"))
    _check_widths(a_bits, weights, K, "right operand")
    shape = (a_bits.shape[0], weights.columns)
    if out is None:
        out = aligned_empty(shape, np.int32)
    elif out.dtype != np.int32 or out.shape != shape or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(
            f"The product of {a_bits.shape} and {weights.shape} words needs a writable C-contiguous int32 `out` of "
            f"shape {shape}, not {out.dtype} of shape {out.shape}."
        )
    if mask is not None:
        if not unsigned:
            raise ValueError("A mask of the weights needs unsigned activations: pass unsigned=True with it.")
        mask = mask if isinstance(mask, PreparedWeights) else prepare_weights(_matrix(mask, "mask"))
        _check_widths(a_bits, mask, K, "mask")
        if mask.columns != weights.columns:
            raise ValueError(f"The mask of {mask.shape} words does not fit the signs of {weights.shape} words.")
    if K == 0 or out.size == 0:
        out[...] = 0
        return out
    rows = halves(a_bits)
    if mask is not None:
        _multiply_masked(rows, weights.panels, mask.panels, K, out)
        return out
    count = get_threads() if threads is None else check_threads(threads)
    # Less work than this is done before other threads have woken up.
    if out.size * K < 4_000_000 or count == 1:
        _multiply(rows, weights.panels, K, out)
    elif threads is None:
        _multiply_parallel(rows, weights.panels, K, out, count)
    else:
        with use_threads(threads) as available:
            _multiply_parallel(rows, weights.panels, K, out, available)
    if unsigned:
        out += weights.sums(K)[: weights.columns]
        out >>= 1
    return out


def warm_up() -> float:
    """Compile the kernels of packing and products, or load them from disk, so that no measurement includes it.

    Returns:
        The seconds it took: about ten at the first time on a machine, then a fraction of one.
    """
    start = time.perf_counter()
    signs = pack_signs(np.ones((200, 384), np.float32))
    for threads in (1, max(2, get_threads())):
        binary_matmul(signs, signs, 384, threads=threads)
    binary_matmul(signs[:1], signs[:1], 384, unsigned=True, mask=signs[:1])
    return time.perf_counter() - start


def halves(words: np.ndarray) -> np.ndarray:
    """View uint64 words as the 32-bit halves that the kernels read.

    Args:
        words: uint64 (..., words), any strides.

    Returns:
        uint32 (..., 2 words), C-contiguous, low half first; a view where the words are contiguous.
    """
    words = np.ascontiguousarray(words, _WORDS)
    return words.view(_HALVES) if words.size else np.zeros((*words.shape[:-1], 2 * words.shape[-1]), np.uint32)


def _matrix(words: np.ndarray, name: str) -> np.ndarray:
    words = check_words(words, name)
    if words.ndim != 2:
        raise ValueError(f"The {name} must be a matrix (rows, words) of packed words, not of shape {words.shape}.")
    return words


def _check_widths(a_bits: np.ndarray, weights: PreparedWeights, length: int, name: str) -> None:
    check_length("K", length)
    if length < 0 or not a_bits.shape[1] == weights.words == word_count(length):
        raise ValueError(
            f"Operands of shapes {a_bits.shape} and {weights.shape} ({name}) cannot be multiplied over K = {length} "
            f"bits: both need {word_count(max(length, 0))} words of 64 bits in a row."
        )


@kernel
def _multiply_rows(rows, panels, panel, length, out, start, stop, scratch):
    steps = steps_of(length)
    column = panel * PANEL
    columns = min(PANEL, out.shape[1] - column)
    last = rows.shape[0] - 1
    for row in range(start, stop, TILE):
        count = min(TILE, stop - row)
        whole = count == TILE and columns == PANEL
        target = out if whole else scratch
        # One call site: the tile is large, and every copy of it costs a second of compile time.
        tile_of_signs(
            rows, row, last, panels, panel, steps, length, target, row if whole else 0, column if whole else 0
        )
        if not whole:
            for r in range(count):
                for c in range(columns):
                    out[row + r, column + c] = scratch[r, c]


@kernel
def _multiply_share(rows, panels, length, out, task, tasks):
    # Neighbouring blocks of rows and panels, so that a panel stays in the first-level cache.
    scratch = np.empty((TILE, PANEL), np.int32)
    blocks = (out.shape[0] + _ROW_BLOCK - 1) // _ROW_BLOCK
    units = panels.shape[0] * blocks
    for unit in range(units * task // tasks, units * (task + 1) // tasks):
        start = unit % blocks * _ROW_BLOCK
        stop = min(start + _ROW_BLOCK, out.shape[0])
        _multiply_rows(rows, panels, unit // blocks, length, out, start, stop, scratch)


@kernel
def _multiply(rows, panels, length, out):
    _multiply_share(rows, panels, length, out, 0, 1)


@kernel(parallel=True)
def _multiply_parallel(rows, panels, length, out, tasks):
    for task in numba.prange(tasks):
        _multiply_share(rows, panels, length, out, task, tasks)


@kernel
def _multiply_masked(rows, signs, masks, length, out):
    steps = steps_of(length)
    positive, present = np.empty((TILE, PANEL), np.int32), np.empty((TILE, PANEL), np.int32)
    last = rows.shape[0] - 1
    for panel in range(signs.shape[0]):
        column = panel * PANEL
        columns = min(PANEL, out.shape[1] - column)
        for row in range(0, out.shape[0], TILE):
            count = min(TILE, out.shape[0] - row)
            tile_of_common_bits(rows, row, last, signs, panel, steps, 0, positive, 0, 0)
            tile_of_common_bits(rows, row, last, masks, panel, steps, 0, present, 0, 0)
            for r in range(count):
                for c in range(columns):
                    out[row + r, column + c] = 2 * positive[r, c] - present[r, c]

"""The fused form of a 1-bit linear layer's product: one compiled pass forward, on bits, and one back.

It gives what `binvit.nn.products.binary_product` gives, up to float rounding, for every input rule with a
`binvit.nn.rules.Form` and every weight rule with levels -1 and +1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from binvit.nn.fused import bit_products, elementwise, ends
from binvit.nn.fused.ends import End
from binvit.nn.fused.float_products import product, product_over_rows
from binvit.nn.precision import full_precision
from binvit.nn.rules import Bwn, Plane, Rule, Sign

_BWN = Bwn()
_NONE = np.empty(0, np.float32)


class Layer(NamedTuple):
    """A 1-bit linear layer, or several of equal width whose outputs stand side by side, in P parts of one input."""

    rule_x: Rule
    rule_w: Rule
    parameters_x: Sequence[Sequence[Tensor]]  # of each part
    parameters_w: Sequence[Sequence[Tensor]]
    w: Tensor  # (N, K), the rows of all parts
    shift: Tensor | None  # (K,) or (P, K)
    bias: Tensor | None  # (N,)


def takes_linear(rule_x: Rule, rule_w: Rule, *tensors: Tensor | None) -> bool:
    """Tell whether `binary_linear` covers a linear layer with these rules and tensors."""
    binary = (rule_w.lowest, rule_w.highest) == (-1, 1) and not rule_w.is_float
    form = rule_x.form(*rule_x.default())
    return binary and form is not None and form.mean in ("none", "row") and elementwise.usable(*tensors)


class _Weights(NamedTuple):
    levels: Tensor
    gain: float  # scales of the weights: one number, or (N, 1)
    gains: Tensor | None
    kept: tuple[Tensor, ...] = ()  # by the rule, for its gradient

    def rows(self, of: slice) -> _Weights:
        gains = self.gains if self.gains is None else self.gains[of]
        return self._replace(levels=self.levels[of], gains=gains, kept=())


def _weights(rule: Rule, w: Tensor, parameters: Sequence[Tensor]) -> _Weights:
    if rule == _BWN:
        levels = w.new_empty(w.shape)
        return _Weights(levels, float(elementwise.centred_signs(elementwise.rows_of(w), levels.numpy())), None)
    taken = _takes_signs(rule, w)
    ((levels, scale, _, kept),) = _sign_planes(rule, w) if taken else rule.planes(w.detach(), *parameters)
    levels = levels.contiguous()
    if scale is not None and scale.numel() == 1:
        return _Weights(levels, scale.item(), None, kept)
    return _Weights(levels, 1.0, scale, kept)


def _takes_signs(rule: Rule, w: Tensor) -> bool:
    if (
        not isinstance(rule, Sign)
        or w.shape[1] < elementwise.SHORTEST_ROW
        or len(w) < 2
        or not elementwise.sums_like_torch()
    ):
        return False
    return rule.by_row and rule.factor in ("constant", "bare") and rule.window in elementwise.WINDOWS


def _sign_planes(rule: Any, w: Tensor) -> list[Plane]:
    """Return what `rule.planes(w)` does, to the last bit."""
    w = w.detach().contiguous()
    levels, c = torch.empty_like(w), torch.empty_like(w) if rule.center else w
    scale = w.new_empty(len(w), 1) if rule.scale == "row" else None
    sizes = _NONE if scale is None else scale.view(-1).numpy()
    elementwise.signs_of_rows(w.numpy(), rule.center, c.numpy(), levels.numpy(), sizes)
    return [Plane(levels, scale, kept=(c,) if scale is None or rule.factor == "bare" else (c, scale))]


def _sign_gradient(rule: Any, kept: Sequence[Tensor], g: Tensor) -> Tensor:
    """Return what `rule.backward_from(kept, g)` does, to the last bit."""
    (c, *scales), dx = kept, torch.empty_like(g)
    gains = scales[0].view(-1).numpy() if scales else _NONE
    window = elementwise.WINDOWS[rule.window]
    elementwise.slopes_of_rows(c.numpy(), elementwise.rows_of(g), window, gains, rule.center, dx.numpy())
    return dx


class _Layout(NamedTuple):
    """What of a layer is no tensor, and how its tensors stand in a row."""

    rule_x: Rule
    rule_w: Rule
    parts: int
    end: End | None
    own: bool  # the end adds the layer's input itself

    def split(self, tensors: Sequence[Any]) -> tuple[list[Sequence[Any]], list[Sequence[Any]], Sequence[Any]]:
        """Return the parameters of the inputs' and of the weights' rule, part by part, and the end's vectors."""
        n_x, n_w = len(self.rule_x.parameters), len(self.rule_w.parameters)
        middle, stop = self.parts * n_x, self.parts * (n_x + n_w)
        of_x = [tensors[i * n_x : (i + 1) * n_x] for i in range(self.parts)]
        of_w = [tensors[middle + i * n_w : middle + (i + 1) * n_w] for i in range(self.parts)]
        return of_x, of_w, tensors[stop:]

    def rows(self, w: Tensor) -> list[slice]:
        """Return the rows of each part's weights."""
        n = len(w) // self.parts
        return [slice(i * n, (i + 1) * n) for i in range(self.parts)]

    def own_rows(self, x: np.ndarray, own: Tensor | None) -> np.ndarray | None:
        """Return the rows that the end adds: those of the layer's input, of another tensor, or none."""
        return x if self.own else None if own is None else elementwise.rows_of(own)

    @property
    def at_once(self) -> bool:
        """Tell whether the weights of all parts are binarized together."""
        return self.parts == 1 or self.rule_w.by_row


class _BinaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layout: _Layout,
        x: Tensor,
        own: Tensor | None,
        w: Tensor,
        shift: Tensor | None,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        rows, k = elementwise.rows_of(x), x.shape[-1]
        of_x, of_w, vectors = layout.split(tensors)
        shifts = _shifts(shift, layout.parts, k)
        if layout.at_once:
            weights = [_weights(layout.rule_w, w, of_w[0])]
            parts = weights if layout.parts == 1 else [weights[0].rows(of) for of in layout.rows(w)]
        else:
            parts = weights = [
                _weights(layout.rule_w, w[of], given) for of, given in zip(layout.rows(w), of_w, strict=True)
            ]
        y = x.new_empty(len(rows), len(w))
        ctx.forms = []
        for part, of, parameters, moved in zip(parts, layout.rows(w), of_x, shifts, strict=True):
            n = of.stop - of.start
            form: Any = layout.rule_x.form(*(p.item() for p in parameters))
            panels = bit_products.prepare_levels(part.levels.numpy())
            means = np.empty(len(rows) if form.mean == "row" else 0, np.float32)
            gain = form.scale * part.gain
            bit_products.linear_products(
                rows,
                moved,
                *elementwise.numbers(form)[3:],
                panels.panels,
                np.zeros(n, np.int32) if form.threshold is None else panels.sums(k),
                elementwise.vector(_times(part.gains, gain), n, gain),
                elementwise.vector(None if bias is None else bias[of], n),
                of.start,
                means,
                y.numpy(),
            )
            ctx.forms.append((form, part.gain, means))
        ctx.layout, ctx.counts = layout, [len(given.kept) for given in weights]
        kept = [tensor for given in weights for tensor in (given.levels, given.gains, *given.kept)]
        out, products = y, None
        if layout.end is not None:
            products = y
            out, ctx.tail = ends.apply_end(layout.end, y, layout.own_rows(rows, own), vectors)
        ctx.save_for_backward(x, own, w, shift, bias, products, *tensors, *kept)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        layout: _Layout = ctx.layout
        x, own, w, shift, bias, products, *rest = ctx.saved_tensors
        count = len(rest) - sum(ctx.counts) - 2 * len(ctx.counts)
        of_x, of_w, vectors = layout.split(rest[:count])
        kept = iter(rest[count:])
        weights = [(next(kept), next(kept), [next(kept) for _ in range(n)]) for n in ctx.counts]
        rows, k = elementwise.rows_of(x), x.shape[-1]
        g = g.reshape(len(rows), -1)
        dx: Any = None
        of_own: Any = None
        dvectors: list[Any] = [None] * len(vectors)
        if products is not None:
            g, of_own, dvectors = ends.gradients(ctx.tail, products, layout.own_rows(rows, own), g)
        levels = [levels_w if gains is None else levels_w * gains for levels_w, gains, _ in weights]
        if layout.at_once and layout.parts > 1:
            levels = [levels[0][of] for of in layout.rows(w)]
        moved = _shifts(shift, layout.parts, k)
        dshift, dws, dbiases, dpx = np.empty((layout.parts, k), np.float32), [], [], []
        for i, of in enumerate(layout.rows(w)):
            form, gain, means = ctx.forms[i]
            up = g[:, of]
            d, binary = product(up, levels[i]), x.new_empty(rows.shape)
            if dx is None:  # the own input's gradient comes first where it is the only other term
                dx = of_own if layout.own and layout.parts == 1 else d
            sums = elementwise.binary_backward(
                rows,
                moved[i],
                d.numpy(),
                np.float32(gain),
                *elementwise.numbers(form),
                np.float32(form.gain),
                means,
                dx is not d,
                dx.numpy(),
                dshift[i],
                binary.numpy(),
            )
            dws.append(_times(product_over_rows(up, binary), form.scale))
            dbiases.append(None if bias is None else up.sum(0))
            numbers = [p.item() for p in of_x[i]]
            found = layout.rule_x.parameter_gradients(*sums, x.numel(), *numbers)
            dpx += [None if value is None else x.new_tensor(float(value)) for value in found]
        if layout.own and dx is not of_own:
            dx.add_(of_own)
        dw, dpw = _weight_gradients(layout, w, [of_rule for _, _, of_rule in weights], dws, of_w)
        of_own = None if layout.own or of_own is None else of_own.view(own.shape)
        of_shift = None if shift is None else torch.from_numpy(dshift).view(shift.shape)
        return None, dx.view(x.shape), of_own, dw, of_shift, _joined(dbiases), *dpx, *dpw, *dvectors


def _weight_gradients(
    layout: _Layout, w: Tensor, kept: Sequence[Sequence[Tensor]], binary: Sequence[Tensor], parameters: Sequence[Any]
) -> tuple[Tensor, list[Any]]:
    """Return the gradients of the weights and of their rule's parameters, for those of each part's binary weights."""
    found: list[Any] = []
    gradients, weights = [_joined(binary)], [w]
    if not layout.at_once:
        gradients, weights = list(binary), [w[of] for of in layout.rows(w)]
    for i, of_rule in enumerate(kept):
        if of_rule and _takes_signs(layout.rule_w, weights[i]):
            gradients[i], more = _sign_gradient(layout.rule_w, of_rule, gradients[i]), []
        elif of_rule:
            gradients[i], *more = layout.rule_w.backward_from(of_rule, gradients[i], *parameters[i])
        else:
            gradients[i], *more = layout.rule_w.backward(weights[i], gradients[i], *parameters[i])
        found += more
    return _joined(gradients), found


def _joined(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(list(parts))


def _shifts(shift: Tensor | None, parts: int, k: int) -> list[np.ndarray]:
    """Return the shift of each part, (K,), zeros for none."""
    return [elementwise.vector(None, k)] * parts if shift is None else list(elementwise.rows_of(shift))


def _times(x: Any, factor: float) -> Any:
    """Return a tensor times a factor, None for None; a product with 1 is spared."""
    return x if x is None or factor == 1 else x * factor


@torch.compiler.disable  # compiled by numba
@full_precision
def _binary_linear(
    x: Tensor, own: Tensor | None, layout: _Layout, tensors: list[Tensor | None], more: list[Tensor | None]
) -> Tensor:
    return _BinaryLinear.apply(layout, x, own, *tensors, *more)


def binary_linear(
    x: Tensor, layer: Layer, end: End | None = None, own: Tensor | None = None, vectors: Sequence[Tensor | None] = ()
) -> Tensor:
    """Compute `binvit.nn.products.binary_product` for a linear layer of one or several parts, and what follows it.

    Args:
        x: (..., K), float32 on the CPU.
        layer: the layer, whose rules `takes_linear` accepts.
        end: what follows, as for `binvit.nn.fused.ends.layer_end`; None for nothing.
        own: what the end adds, or None; it may be x.
        vectors: the parameters of the end.

    Returns:
        (..., N).
    """
    layout = _Layout(layer.rule_x, layer.rule_w, len(layer.parameters_x), end, own is x)
    more = [tensor for given in (*layer.parameters_x, *layer.parameters_w) for tensor in given]
    tensors = [layer.w, layer.shift, layer.bias]
    return _binary_linear(x, None if own is x else own, layout, tensors, [*more, *vectors])

"""Writes LLVM vector code: addresses in numba arrays, unaligned loads, splats, sums in registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

LANES = 64
_INDEX = ir.IntType(64)


def check_arrays(name: str, wanted: dict[str, tuple[types.Type, types.Type, int]]) -> None:
    """Refuse arrays of another type when a kernel is compiled, since an intrinsic would read them as its own.

    Args:
        name: the intrinsic.
        wanted: for each argument its type, the element type it must have and its number of axes.

    Raises:
        TypeError: if an argument is not such an array.
    """
    for argument, (array, dtype, ndim) in wanted.items():
        if not (isinstance(array, types.Array) and array.dtype == dtype and array.ndim == ndim):
            raise TypeError(f"{name} needs {argument} as a {ndim}-D array of {dtype}, not {array}.")


def _suffix(kind: ir.Type) -> str:
    return f"v{kind.count}i{kind.element.width}" if isinstance(kind, ir.VectorType) else f"i{kind.width}"


class Emitter:
    """Emits the LLVM code of one intrinsic: addresses, loads, splats.

    Args:
        context: numba's target context.
        builder: the LLVM builder.
        signature: the intrinsic's signature.
        arguments: its LLVM arguments.
    """

    def __init__(self, context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> None:
        self.context, self.builder = context, builder
        self.signature, self.arguments = signature, arguments

    def address(self, position: int, *indices: ir.Value | int) -> ir.Value:
        """Return the address of one element of an array argument; all axes but the last may be strided.

        Args:
            position: which argument.
            indices: one index per axis.
        """
        array = self.context.make_array(self.signature.args[position])(
            self.context, self.builder, self.arguments[position]
        )
        size = self.context.get_abi_sizeof(self.context.get_data_type(self.signature.args[position].dtype))
        strides = cgutils.unpack_tuple(self.builder, array.strides)
        values = [ir.Constant(_INDEX, i) if isinstance(i, int) else i for i in indices]
        offset = self.builder.mul(values[-1], ir.Constant(_INDEX, size))
        for i, stride in zip(values[:-1], strides, strict=False):
            offset = self.builder.add(offset, self.builder.mul(i, stride))
        return cgutils.pointer_add(self.builder, array.data, offset)

    def length(self, position: int, axis: int) -> ir.Value:
        """Return the length of one axis of an array argument.

        Args:
            position: which argument.
            axis: which axis.
        """
        array = self.context.make_array(self.signature.args[position])(
            self.context, self.builder, self.arguments[position]
        )
        return cgutils.unpack_tuple(self.builder, array.shape)[axis]

    def load(self, address: ir.Value, lane: ir.Type, lanes: int = LANES) -> ir.Value:
        """Load a vector from an address that may be unaligned.

        Args:
            address: where the first lane lies.
            lane: type of a lane.
            lanes: how many.
        """
        vector = ir.VectorType(lane, lanes)
        return self.builder.load(self.builder.bitcast(address, vector.as_pointer()), align=1)

    def store(self, vector: ir.Value, address: ir.Value) -> None:
        """Store a vector to an address that may be unaligned.

        Args:
            vector: what to store.
            address: where the first lane goes.
        """
        self.builder.store(vector, self.builder.bitcast(address, vector.type.as_pointer()), align=1)

    def prefetch(self, address: ir.Value) -> None:
        """Ask for the cache line of an address that will be read, which may lie outside of any array.

        Args:
            address: what will be read.
        """
        lane = ir.IntType(32)
        read, near, data = lane(0), lane(3), lane(1)
        place = self.builder.bitcast(address, ir.IntType(8).as_pointer())
        self.call("llvm.prefetch.p0i8", ir.VoidType(), place, read, near, data)

    def splat(self, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
        """Fill a vector with one number.

        Args:
            scalar: the number.
            lanes: how many times.
        """
        undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), None)
        return self.builder.shuffle_vector(first, undefined, zeros)

    def call(self, name: str, result: ir.Type, *operands: ir.Value) -> ir.Value:
        """Call one of LLVM's intrinsic functions.

        Args:
            name: its full name.
            result: its type.
            operands: its arguments.
        """
        kind = ir.FunctionType(result, [operand.type for operand in operands])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), operands)

    def popcount(self, value: ir.Value) -> ir.Value:
        """Count the bits of an integer or of every lane of a vector.

        Args:
            value: integer or vector.
        """
        return self.call(f"llvm.ctpop.{_suffix(value.type)}", value.type, value)

    def reduce(self, operation: str, vector: ir.Value) -> ir.Value:
        """Combine all lanes of a vector of integers.

        Args:
            operation: ``add``, ``umin``, ...
            vector: the vector.
        """
        return self.call(f"llvm.vector.reduce.{operation}.{_suffix(vector.type)}", vector.type.element, vector)

    def halve(self, vector: ir.Value, combine: Callable[..., ir.Value]) -> ir.Value:
        """Combine all lanes of a vector by halves: LLVM's own reductions of floats go lane by lane.

        Args:
            vector: the vector; its number of lanes is a power of two.
            combine: emits the combination of two vectors.
        """
        builder, lanes = self.builder, vector.type.count
        while lanes > 1:
            lanes //= 2
            low, high = (
                builder.shuffle_vector(
                    vector, vector, ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(first, first + lanes)))
                )
                for first in (0, lanes)
            )
            vector = combine(low, high)
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    def extremum(self, predicate: str, vector: ir.Value) -> ir.Value:
        """Find the least or largest lane of a vector of floats.

        Args:
            predicate: ``<`` for the least, ``>`` for the largest.
            vector: the vector; its number of lanes is a power of two.
        """
        builder = self.builder
        return self.halve(
            vector, lambda low, high: builder.select(builder.fcmp_ordered(predicate, high, low), high, low)
        )

    def accumulate(self, steps: ir.Value, step: Callable[..., list[ir.Value]]) -> list[ir.Value]:
        """Emit a loop over at least one step whose sums stay in registers.

        Args:
            steps: number of steps.
            step: called with the step's index and the sums so far, None at the first, which starts the sums instead of
                adding to zeros; emits one step and returns the new sums.
        """
        builder = self.builder
        first = step(ir.Constant(_INDEX, 0), None)
        before, loop, end = builder.block, builder.append_basic_block("step"), builder.append_basic_block("end")
        builder.cbranch(builder.icmp_signed(">", steps, ir.Constant(_INDEX, 1)), loop, end)
        builder.position_at_end(loop)
        k = builder.phi(_INDEX)
        sums = [builder.phi(value.type) for value in first]
        following = step(k, sums)
        last_block = builder.block
        next_k = builder.add(k, ir.Constant(_INDEX, 1))
        builder.cbranch(builder.icmp_signed("<", next_k, steps), loop, end)
        k.add_incoming(ir.Constant(_INDEX, 1), before)
        k.add_incoming(next_k, last_block)
        builder.position_at_end(end)
        totals = [builder.phi(value.type) for value in first]
        for phis in (sums, totals):
            for phi, start, again in zip(phis, first, following, strict=True):
                phi.add_incoming(start, before)
                phi.add_incoming(again, last_block)
        return totals

    def fold(self, first: int | ir.Value, steps: ir.Value, value: ir.Value, step: Callable[..., ir.Value]) -> ir.Value:
        """Emit a loop over any number of steps that carries one value in a register.

        Args:
            first: index of the first step.
            steps: one past the index of the last step; no step is done if it is not larger than `first`.
            value: what is carried into the first step.
            step: called with the step's index and the value so far; emits one step and returns the new value.
        """
        builder = self.builder
        first = ir.Constant(_INDEX, first) if isinstance(first, int) else first
        before, loop, end = builder.block, builder.append_basic_block("step"), builder.append_basic_block("end")
        builder.cbranch(builder.icmp_signed(">", steps, first), loop, end)
        builder.position_at_end(loop)
        k, carried = builder.phi(_INDEX), builder.phi(value.type)
        following = step(k, carried)
        next_k = builder.add(k, ir.Constant(_INDEX, 1))
        last_block = builder.block
        builder.cbranch(builder.icmp_signed("<", next_k, steps), loop, end)
        k.add_incoming(first, before)
        k.add_incoming(next_k, last_block)
        carried.add_incoming(value, before)
        carried.add_incoming(following, last_block)
        builder.position_at_end(end)
        result = builder.phi(value.type)
        result.add_incoming(value, before)
        result.add_incoming(following, last_block)
        return result

    def word(self, mask: ir.Value) -> ir.Value:
        """Turn comparisons into one word of as many bits, lane 0 in the lowest.

        Args:
            mask: vector of bits.
        """
        return self.builder.bitcast(mask, ir.IntType(mask.type.count))

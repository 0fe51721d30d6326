"""Fixes bfloat16 in Triton's interpreter. For tests only; the package does not use it.

The interpreter stores bfloat16 as uint16 bits: without this its dot multiplies the bits as integers, and its conversion
from float32 truncates.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def repair_bf16() -> None:
    """Make dot widen bfloat16 operands, and conversions round to nearest even. Further calls have no effect."""
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl
    if getattr(dot, "repaired", False):
        return

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, source, to):
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, source, to)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # rounding must not carry from a NaN's mantissa into its exponent
        rounded = np.where(np.isnan(source.data), (bits >> 16) | 0x40, rounded)
        return interpreter.TensorHandle(rounded.astype(np.uint16), to.scalar)

    create_dot.repaired = True
    builder.create_dot, builder.cast_impl = create_dot, cast_impl

"""Repairs bfloat16 in triton's interpreter, which holds it as 16-bit patterns. Tests only, never the package.

Left alone, its dot multiplies the patterns as integers, and its float32 -> bfloat16 conversion truncates.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def repair_bf16() -> None:
    """dot widens bfloat16 operands, conversions round to nearest even; calling it again changes nothing"""
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
        # rounding must not carry a nan's mantissa over into its exponent
        rounded = np.where(np.isnan(source.data), (bits >> 16) | 0x40, rounded)
        return interpreter.TensorHandle(rounded.astype(np.uint16), to.scalar)

    create_dot.repaired = True
    builder.create_dot, builder.cast_impl = create_dot, cast_impl

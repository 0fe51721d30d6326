"""Makes triton's interpreter multiply bfloat16: it stores bfloat16 as bit patterns and multiplies those. Tests only."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

# its float32 -> bfloat16 conversion drops the low bits instead of rounding: up to one unit in the last place
BF16_TRUNCATES = 2.0**-7


def repair_bf16_dot() -> None:
    """widen bfloat16 operands of every tl.dot to float32; calling it again changes nothing"""
    builder = interpreter.InterpreterBuilder
    original = builder.create_dot
    if getattr(original, "widens_bf16", False):
        return

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return original(self, widened(a), widened(b), *rest)

    create_dot.widens_bf16 = True
    builder.create_dot = create_dot

// included by every instruction set's file before it enables its target, so that the standard library stays portable.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"

#define EFFT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define EFFT_TARGET_BEGIN(isa) EFFT_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define EFFT_TARGET_END EFFT_PRAGMA(clang attribute pop)
#else
#define EFFT_TARGET_BEGIN(isa) EFFT_PRAGMA(GCC push_options) EFFT_PRAGMA(GCC target(isa))
#define EFFT_TARGET_END EFFT_PRAGMA(GCC pop_options)
#endif

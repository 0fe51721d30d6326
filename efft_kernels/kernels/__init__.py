"""The kernel contract. Every backend is one file here and defines the same functions with the same arguments.

Letters, used in Python, Triton, C++, tests and README alike:

    M  rows of x (every leading dimension flattened)     K  input features      N  output features
    R  rank of the adapter                               S  slices of a group
    P, Q  the two ranks of a core: sigma is [S, P, Q]
    B  samples of a mixed batch, of M / B rows each      A  adapters of a mixed batch

    group_update(sigma, v, scale)                              up[s] = scale * sigma[s] @ v
        sigma [S, P, Q], v [Q, N] -> up [S, P, N]. Its memory is [P, S, N], so the slices side by side,
        ``up.transpose(0, 1).reshape(P, S * N)``, and any run of neighbouring slices are views.

    group_update_backward(dup, sigma, v, scale, needs)         dsigma[s] = scale * dup[s] @ v.T
        dup [S, P, N] with any strides                         dv = sum_s scale * sigma[s].T @ dup[s]
        needs: two bools, for (sigma, v)

    lowrank_linear(x, weight, bias, down, up)                  p = x @ down    y = x @ weight.T + bias + p @ up
        x [M, K], weight [N, K], bias [N] or None, down [K, R], up [R, N] -> y [M, N], p [M, R]

    lowrank_linear_backward(dy, x, weight, down, up, p, needs) dp = dy @ up.T
        dy [M, N]; needs: five bools, for                      dx = dy @ weight + dp @ down.T
        (x, weight, bias, down, up)                            dweight = dy.T @ x    dbias = sum_m dy
        x and p are None where no gradient                     ddown = x.T @ dp      dup = p.T @ dy
        that is asked for reads them

    mixed_linear(x, weight, bias, down, up, ids)               a = ids[m // (M / B)]
        down [A, K, R], up [A, R, N], ids [B] of int64         p[m] = x[m] @ down[a]
        -> y [M, N], p [M, R]                                  y[m] = x[m] @ weight.T + bias + p[m] @ up[a]
        An id below zero stands for no adapter: p[m] = 0 there. M is a multiple of B.

    mixed_linear_backward(dy, x, weight, down, up, p, ids, needs)
        as lowrank_linear_backward, row by row with            ddown[a] = sum of x[m].T @ dp[m] over the rows of a
        the pair of the row's adapter                          dup[a]   = sum of p[m].T @ dy[m] over the rows of a
        An adapter without rows gets zeros. No value of one sample reaches another's results, or the gradients of
        an adapter that is not its own: not a nan either.

    lowrank_add(y, x, down, up)                                p = x @ down    y + p @ up
        for a weight whose product is not ours: y [M, N], x [M, K] -> [M, N], p [M, R]; y is not written to

    lowrank_add_backward(dy, x, down, up, p, needs)            dp = dy @ up.T    dx = dp @ down.T
        needs: three bools, for (x, down, up)                  ddown = x.T @ dp  dup = p.T @ dy

    merge_(weights, downs, ups)                                weight[i] += (down[i] @ up[i]).T, in place
        three lists of equal length, all of one dtype and device; nothing but the weights is written

A backward returns the list of the gradients that were asked for, in the order of ``needs``, and computes no other.
All floating-point tensors of one call have one dtype and one device. Any strides are accepted everywhere: fc2 passes
``down = v.T``, a fused qkv passes a slice of a wider ``up``. Sums run in float32 (float64 for float64), are split
by shape alone and reduced in a fixed order, so two runs are bit-equal. Results have the dtype of the inputs.

Beside these a backend defines

    unavailable() -> str | None               why it cannot run in this process at all, or None
    unsupported(op, *tensors) -> str | None   why it cannot run this op on these tensors (its own, in its order), or None
    unproven(device) -> str | None            what is missing on record before it may be chosen there, or None
    slower(op, *tensors, needs=None)          why plain torch is the better choice for these tensors, or None; needs are
        -> str | None                         those of a backward

Backends know nothing of methods, models or modules, and import torch only. Arguments reach them checked (ops.py).
"""

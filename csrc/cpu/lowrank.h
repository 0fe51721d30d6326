// LowRank (efft.h) over blocks of rows: a block is brought into the L2 cache once, and everything is made from it there.

// K in chunks of equal length, the chunks in blocks: one block of chunks of one block of rows is in the cache at a time
struct Chunks {
  int64_t K, length, count, per_block;

  Chunks(int64_t K, int64_t length) : K(K), length(length), count((K + length - 1) / length), per_block(1) {}
  Chunks(int64_t K, int64_t most, int64_t most_per_block) : Chunks(K, most) {
    const int64_t blocks = (count + most_per_block - 1) / most_per_block;
    length = std::min(most, ((K + count - 1) / count + 7) / 8 * 8);
    count = (K + length - 1) / length;
    per_block = (count + blocks - 1) / blocks;
  }
  int64_t begin(int64_t i) const { return i * length; }
  int64_t size(int64_t i) const { return std::min(length, K - i * length); }
};

// memory for intermediate results. never shrinks: it belongs to a thread and is used again at every call
class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(static_cast<char*>(operator new(bytes, std::align_val_t(64)))), bytes_(bytes) {}
  ~Scratch() { operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  void* at_least(size_t bytes) {
    if (bytes > bytes_) {
      Scratch larger(bytes);
      std::swap(data_, larger.data_);
      std::swap(bytes_, larger.bytes_);
    }
    return data_;
  }
  template <class E>
  E* as() const {
    return reinterpret_cast<E*>(data_);
  }

 private:
  char* data_;
  size_t bytes_;
};

template <class T>
class LowRankPass {
  using S = Sum<T>;
  static constexpr int NR = Shape<T>::NR, KC = Shape<T>::KC, PITCH = Shape<T>::PITCH;
  static constexpr int64_t CHUNKS_PER_BLOCK = 4;
  static constexpr int64_t BLOCK_BYTES = 320 * 1024;  // of 512 KB and more of L2: the panels pass through it too
  static constexpr int64_t MOST_SPLITS = 16;          // of the sums over rows
  static constexpr int64_t MOST_JOINED = 64;          // steps of p that continue a chunk of a

 public:
  explicit LowRankPass(const LowRank& g)
      : g_(g),
        chunks_(g.K, KC, CHUNKS_PER_BLOCK),
        r_chunks_(g.R, KC),
        panels_(panels_of<T>(g.N)),
        r_panels_(panels_of<T>(g.R)),
        blocked_((chunks_.count + chunks_.per_block - 1) / chunks_.per_block > 1) {
    // rows in splits, each of blocks of equal height, by the shapes alone: sums over rows come out the same whatever
    // the number of threads
    const int64_t tiles = (g.M + MR - 1) / MR;
    const int64_t most = std::max<int64_t>(1, BLOCK_BYTES / (chunks_.per_block * PITCH * int64_t(sizeof(S)) * MR));
    int64_t blocks = std::max<int64_t>(1, (tiles + most - 1) / most);
    if (tiles > 4) blocks += blocks % 2;
    block_rows_ = MR * ((tiles + blocks - 1) / blocks);
    blocks = block_rows_ ? (g.M + block_rows_ - 1) / block_rows_ : 0;
    const bool sums_rows = g.qa || g.xp;
    blocks_per_split_ = sums_rows ? (blocks + MOST_SPLITS - 1) / MOST_SPLITS : 1;
    splits_ = blocks ? (blocks + blocks_per_split_ - 1) / blocks_per_split_ : 0;
  }

  void run() {
    const Scratch d(bytes(g_.d.data ? r_panels_ * g_.K * NR * sizeof(Panel<T>) : 0));
    const Scratch u(bytes(g_.u.data ? panels_ * g_.R * NR * sizeof(Panel<T>) : 0));
    const Scratch bias(bytes(panels_ * NR * sizeof(S)));
    const Scratch qa(bytes(g_.qa ? splits_ * g_.K * r_panels_ * NR * sizeof(S) : 0));
    const Scratch xp(bytes(g_.xp ? splits_ * g_.N * r_panels_ * NR * sizeof(S) : 0));
    d_ = d.as<Panel<T>>(), u_ = u.as<Panel<T>>(), bias_ = bias.as<S>(), qa_ = qa.as<S>(), xp_ = xp.as<S>();
    if (g_.d.data) pack_panels<T>(g_.d, g_.K, g_.R, d_);
    if (g_.u.data) pack_panels<T>(g_.u, g_.R, g_.N, u_);
    for (int64_t j = 0; j < panels_ * NR; ++j) {
      bias_[j] = g_.bias.data && j < g_.N ? load_one(static_cast<const T*>(g_.bias.data) + j * g_.bias.col) : S{0};
    }
    // few rows: the columns of c are shared out as well. each share packs its rows for itself, none waits
    int64_t shares = 1;
    if (g_.c.data && splits_ > 0) shares = std::min((thread_count() + splits_ - 1) / splits_, (panels_ + 7) / 8);
    parallel_for(splits_ * shares, [&](int64_t i) {
      const int64_t split = i / shares, share = i % shares;
      for (int64_t block = 0; block < blocks_per_split_; ++block) {
        const int64_t row0 = (split * blocks_per_split_ + block) * block_rows_;
        if (row0 >= g_.M) break;
        rows(row0, std::min(block_rows_, g_.M - row0), panels_ * share / shares, panels_ * (share + 1) / shares,
             share == 0, split, block > 0);
      }
    });
    if (g_.qa) reduce(qa_, g_.K, static_cast<T*>(g_.qa), 1, g_.K);
    if (g_.xp) reduce(xp_, g_.N, static_cast<T*>(g_.xp), g_.R, 1);
  }

 private:
  static size_t bytes(int64_t n) { return size_t((n + 63) / 64 * 64 + 64); }

  // everything for rows row0 ... row0 + count, and columns [panel0, panel1) of c. `first` share: p and the sums as well
  void rows(int64_t row0, int64_t count, int64_t panel0, int64_t panel1, bool first, int64_t split, bool adds) {
    const int64_t tiles = (count + MR - 1) / MR, padded = tiles * MR;
    const int64_t chunk_size = padded * PITCH, strip_size = padded * NR;
    const int64_t sizes[] = {(chunks_.per_block + r_chunks_.count) * chunk_size + 64, 2 * r_panels_ * strip_size,
                             (blocked_ ? panels_ : 1) * strip_size, MR * NR};
    thread_local Scratch scratch(64);
    S* const a = static_cast<S*>(scratch.at_least((sizes[0] + sizes[1] + sizes[2] + sizes[3]) * sizeof(S)));
    S* const p_chunks = a + chunks_.per_block * chunk_size;  // [r chunk][row][PITCH]
    S* const p = a + sizes[0];                               // [r panel][row][NR]
    S* const q = p + r_panels_ * strip_size;                 // [r panel][row][NR]
    S* const strips = a + sizes[0] + sizes[1];               // [panel][row][NR]
    S* const edge = strips + sizes[2];                       // [MR][NR]

    if (g_.qa && first) load_strips(g_.q, row0, count, q);
    for (int64_t chunk0 = 0; chunk0 < chunks_.count; chunk0 += chunks_.per_block) {
      const int64_t chunk1 = std::min(chunks_.count, chunk0 + chunks_.per_block);
      const bool last = chunk1 == chunks_.count;
      for (int64_t i = chunk0; i < chunk1; ++i) {
        S* chunk = a + (i - chunk0) * chunk_size;
        pack_chunk<T>(g_.a, row0, count, chunks_.begin(i), chunks_.size(i), chunk);
        if (g_.qa && first) transposed(chunk, q, padded, chunks_.begin(i), chunks_.size(i), qa_, split, g_.K, adds);
        for (int64_t r = 0; g_.d.data && r < r_panels_; ++r) {
          const Panel<T>* d = d_ + (r * g_.K + chunks_.begin(i)) * NR;
          for (int64_t t = 0; t < tiles; ++t) {
            S* out = p + r * strip_size + t * MR * NR;
            tile<T>({chunk + t * MR * PITCH, d, chunks_.size(i)}, {}, i ? out : zeros(), i ? NR : 0, out, NR, d);
          }
        }
      }
      if (last && g_.d.data) {
        for (int64_t r = 0; r < r_panels_; ++r) {
          for (int64_t i = 0; i < padded; ++i) {
            const S* src = p + r * strip_size + i * NR;
            std::copy_n(src, NR, p_chunks + (r * NR / KC) * chunk_size + i * PITCH + r * NR % KC);
            if (!g_.p || !first || i >= count) continue;
            T* dst = static_cast<T*>(g_.p) + (row0 + i) * g_.R + r * NR;
            for (int64_t j = 0; j < std::min<int64_t>(NR, g_.R - r * NR); ++j) store_one(dst + j, S(src[j] * g_.scale));
          }
        }
      }
      if (!g_.c.data) continue;
      for (int64_t j = panel0; j < panel1; ++j) {
        S* strip = strips + (blocked_ ? j - panel0 : 0) * strip_size;
        columns(row0, count, j, chunk0, chunk1, a, chunk_size, p_chunks, strip, edge);
      }
    }
    if (g_.xp && first) {
      const Chunks n(g_.N, KC);
      for (int64_t i = 0; i < n.count; ++i) {
        pack_chunk<T>(g_.x, row0, count, n.begin(i), n.size(i), a);
        transposed(a, p, padded, n.begin(i), n.size(i), xp_, split, g_.N, adds);
      }
    }
  }

  // panel j of c for a block of rows, over chunks [chunk0, chunk1) of K and, after the last, over R
  void columns(int64_t row0, int64_t count, int64_t j, int64_t chunk0, int64_t chunk1, const S* a, int64_t chunk_size,
               const S* p_chunks, S* strip, S* edge) {
    const Panel<T>* b = static_cast<const Panel<T>*>(g_.b) + j * g_.K * NR;
    const Panel<T>* u = u_ + j * g_.R * NR;
    const bool last = chunk1 == chunks_.count;
    const int64_t r_count = last && g_.u.data ? r_chunks_.count : 0;
    // p continues the last chunk of a if it is short, for a tile's start and end cost as much as some 16 steps. a long
    // one is a pass of its own, or the chain of roundings would get longer than a chunk
    const bool joined = r_count > 0 && g_.R <= MOST_JOINED;
    const int64_t k_count = chunk1 - chunk0, passes = k_count + (joined ? 0 : r_count);
    for (int64_t i = 0; i < passes; ++i) {
      const bool ends = last && i == passes - 1;
      const auto k_steps = [&](int64_t k) -> Steps<T> {
        return {a + k * chunk_size, b + chunks_.begin(chunk0 + k) * NR, chunks_.size(chunk0 + k)};
      };
      const auto r_steps = [&](int64_t r) -> Steps<T> {
        return {p_chunks + r * chunk_size, u + r_chunks_.begin(r) * NR, r_chunks_.size(r)};
      };
      Steps<T> first = i < k_count ? k_steps(i) : r_steps(i - k_count);
      Steps<T> then = ends && joined ? r_steps(0) : Steps<T>{};
      // the first tiles fetch the next chunk of the panel, the others the next rows
      const char* const next = reinterpret_cast<const char*>(first.b + first.count * NR);
      const int64_t next_bytes = first.count * NR * int64_t(sizeof(Panel<T>)), step_bytes = first.count / 4 * 64;
      for (int64_t t = 0; t * MR < count; ++t) {
        S* const kept = strip + t * MR * NR;
        const bool starts = chunk0 == 0 && i == 0;
        const S* in = starts ? bias_ + j * NR : kept;
        int64_t in_row = starts ? 0 : NR;
        T* const c_tile = ends ? c_at(row0 + t * MR, j * NR) : nullptr;
        // what c is added to takes the place of the bias, if one pass does it all
        const bool direct = ends && stores_directly(count - t * MR, j) && (!g_.c_adds || starts);
        if (direct && g_.c_adds) in = reinterpret_cast<const S*>(c_tile), in_row = g_.c.row;
        S* out = direct ? reinterpret_cast<S*>(c_tile) : ends ? edge : kept;
        const bool fetches_panel = t * step_bytes < next_bytes;
        const void* ahead = fetches_panel ? next + t * step_bytes : static_cast<const void*>(first.a + MR * PITCH);
        if (ends) prefetch_columns(c_tile, std::min<int64_t>(MR, count - t * MR), (j + 1) * NR);
        tile<T>(first, then, in, in_row, out, direct ? g_.c.row : NR, ahead);
        if (ends && !direct) {
          store_tile(edge, c_tile, std::min<int64_t>(MR, count - t * MR), std::min<int64_t>(NR, g_.N - j * NR));
        }
        first.a += MR * PITCH;
        if (then.count) then.a += MR * PITCH;
      }
    }
  }

  T* c_at(int64_t i, int64_t j) const {
    return static_cast<T*>(const_cast<void*>(g_.c.data)) + i * g_.c.row + j * g_.c.col;
  }

  // c is written one cache line a row: fetch those of the next panel, or the stores would wait for memory
  void prefetch_columns(const T* c_tile, int64_t rows, int64_t next) const {
    if (next >= g_.N || g_.c.col != 1) return;
    for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(c_tile + i * g_.c.row + NR, 1);
  }

  bool stores_directly(int64_t rows, int64_t j) const {
    return std::is_same_v<T, S> && rows >= MR && (j + 1) * NR <= g_.N && g_.c.col == 1 && g_.scale == 1.0;
  }

  // c[i, j] (+)= scale * tile[i, j], rounded once
  void store_tile(const S* from, T* c, int64_t rows, int64_t columns) const {
    constexpr int VL = Shape<T>::VL;
    for (int64_t i = 0; i < rows; ++i) {
      int64_t j = 0;
      if (g_.c.col == 1) {
        for (; j + VL <= columns; j += VL) {
          T* dst = c + i * g_.c.row + j;
          const Vec<S> v = load<Vec<S>>(from + i * NR + j) * S(g_.scale);
          store_sum(dst, g_.c_adds ? load_sum(dst) + v : v);
        }
      }
      for (; j < columns; ++j) {
        T* dst = c + i * g_.c.row + j * g_.c.col;
        const S s = from[i * NR + j] * S(g_.scale);
        store_one(dst, g_.c_adds ? load_one(dst) + s : s);
      }
    }
  }

  // q [M, R] as strips: [r panel][row][NR], zeros in the rows and columns that are not there
  void load_strips(const View& q, int64_t row0, int64_t count, S* strips) const {
    const int64_t padded = (count + MR - 1) / MR * MR;
    for (int64_t r = 0; r < r_panels_; ++r) {
      for (int64_t i = 0; i < padded; ++i) {
        for (int64_t j = 0; j < NR; ++j) {
          const bool there = i < count && r * NR + j < g_.R;
          strips[(r * padded + i) * NR + j] = there ? load_one(row_of<T>(q, row0 + i) + (r * NR + j) * q.col) : S{0};
        }
      }
    }
  }

  // this split's sums for columns k0 ... of a chunk:  sums[split][r panel][k][NR] (+)= chunk.T @ strip
  void transposed(const S* chunk, const S* strips, int64_t padded, int64_t k0, int64_t size, S* sums, int64_t split,
                  int64_t K, bool adds) const {
    for (int64_t r = 0; r < r_panels_; ++r) {
      S* out = sums + ((split * r_panels_ + r) * K + k0) * NR;
      transposed_tiles<T>(chunk, strips + r * padded * NR, padded, size, out, NR, adds);
    }
  }

  // out[k, r] = scale * sum over splits, in their order
  void reduce(const S* sums, int64_t K, T* out, int64_t out_k, int64_t out_r) const {
    constexpr int64_t STEP = 64;
    parallel_for((K + STEP - 1) / STEP, [&](int64_t part) {
      for (int64_t k = part * STEP; k < std::min(K, (part + 1) * STEP); ++k) {
        for (int64_t r = 0; r < g_.R; ++r) {
          const int64_t at = (r / NR * K + k) * NR + r % NR;
          S sum = 0;
          for (int64_t split = 0; split < splits_; ++split) sum += sums[split * r_panels_ * K * NR + at];
          store_one(out + k * out_k + r * out_r, S(sum * g_.scale));
        }
      }
    });
  }

  static const S* zeros() {
    static const S z[NR] = {};
    return z;
  }

  const LowRank& g_;
  const Chunks chunks_, r_chunks_;
  const int64_t panels_, r_panels_;
  const bool blocked_;  // K takes several blocks: unfinished strips of all panels are kept
  int64_t block_rows_, blocks_per_split_, splits_;
  Panel<T>* d_ = nullptr;  // [r panel][K][NR]
  Panel<T>* u_ = nullptr;  // [panel][R][NR]
  S* bias_ = nullptr;      // [panel][NR]
  S* qa_ = nullptr;        // [split][r panel][K][NR]
  S* xp_ = nullptr;        // [split][r panel][N][NR]
};

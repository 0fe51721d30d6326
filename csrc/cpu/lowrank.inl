// LowRank (kernels.h) by blocks of rows: a block is loaded into the L2 cache once, for all outputs.

// splits K cells into chunks of equal length, and the chunks into blocks: the cache holds one block of chunks of one
// block of rows at a time
struct Chunks {
  int64_t K, length, count, per_block;

  Chunks(int64_t K, int64_t length) : K(K), length(length), count((K + length - 1) / length), per_block(1) {}
  // the length of a chunk is a multiple of `unit`, at most `most`, which is one too
  Chunks(int64_t K, int64_t most, int64_t unit, int64_t most_per_block) : Chunks(K, most) {
    const int64_t blocks = (count + most_per_block - 1) / most_per_block;
    length = ((K + count - 1) / count + unit - 1) / unit * unit;
    count = (K + length - 1) / length;
    per_block = (count + blocks - 1) / blocks;
  }
  int64_t begin(int64_t i) const { return i * length; }
  int64_t size(int64_t i) const { return std::min(length, K - i * length); }
};

// memory for intermediate results. it never shrinks: each thread reuses its own in every call
class Scratch {
 public:
  explicit Scratch(size_t bytes)
      : data_(static_cast<char*>(operator new(bytes, std::align_val_t(64)))), bytes_(bytes) {}
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

 private:
  char* data_;
  size_t bytes_;
};

template <class T>
class LowRankPass {
  using S = Sum<T>;
  static constexpr int VL = Shape<T>::VL, NR = Shape<T>::NR, KC = Shape<T>::KC, PITCH = Shape<T>::PITCH;
  static constexpr int PER = Shape<T>::PER, RT = Shape<T>::RT;
  static_assert(sizeof(Cell<T>) == sizeof(S) && MR % 2 == 0 && KC % NR == 0 && VL % RT == 0, "what is assumed below");
  static constexpr int64_t CHUNKS_PER_BLOCK = 4;
  // part of the L2 cache, which the panels and the chunks of x stream through as well: it has at least 512 KB, with
  // AVX-512 at least 1 MB
  static constexpr int64_t BLOCK_BYTES = (VB == 64 ? 480 : 320) * 1024;
  // a block that packs its panels itself is higher, so that packing is rare. its rows come from the L3 cache, but a
  // panel is small enough to stay in L2
  static constexpr int64_t PACKING_BLOCK_BYTES = (VB == 64 ? 4 : 3) * 512 * 1024;
  static constexpr size_t MOST_KEPT = 16 << 20;  // bytes of memory kept per calling thread
  static constexpr int64_t MOST_SPLITS = 16;     // partial results of a sum over rows
  static constexpr int64_t MOST_JOINED = 64;     // largest R whose steps continue a chunk of a

 public:
  explicit LowRankPass(const LowRank& g)
      : g_(g),
        chunks_(cells<T>(g.K), KC, NR / PER, CHUNKS_PER_BLOCK),
        r_chunks_(cells<T>(g.R), KC),
        panels_(panels_of<T>(g.N)),
        r_width_(g.R <= VL ? VL : NR),
        r_panels_((g.R + r_width_ - 1) / r_width_),
        packs_(g.c.data && !g.b),
        blocked_((chunks_.count + chunks_.per_block - 1) / chunks_.per_block > 1) {
    // adjacent samples of one adapter form a run of rows. a block never crosses runs, so it has one d and one u
    if (!g.ids) adapters_.push_back({0}), add_run(0, g.M, 0);
    for (int64_t i = 0, end; i < g.B; i = end) {
      for (end = i + 1; end < g.B && g.ids[end] == g.ids[i]; ++end) continue;
      if (g.ids[i] >= 0 && slot_of(g.ids[i]) < 0) adapters_.push_back({g.ids[i]});
      add_run(g.M / g.B * i, g.M / g.B * (end - i), slot_of(g.ids[i]));
    }
  }

  void run() {
    const int64_t slots = int64_t(adapters_.size()), splits = int64_t(splits_.size());
    const size_t sizes[] = {
        bytes(g_.d.data ? slots * d_size() * sizeof(Panel<T>) : 0),
        bytes(g_.u.data ? slots * u_size() * sizeof(Panel<T>) : 0),
        bytes(panels_ * NR * sizeof(S)),
        bytes(g_.qa ? splits * sums_size(g_.K) * sizeof(S) : 0),
        bytes(g_.xp ? splits * sums_size(g_.N) * sizeof(S) : 0),
    };
    const size_t all = sizes[0] + sizes[1] + sizes[2] + sizes[3] + sizes[4];
    // kept for the next call unless it is large, because fresh memory costs a page fault per 4 KB
    thread_local Scratch kept(64);
    Scratch own(all > MOST_KEPT ? all : 64);
    char* at = static_cast<char*>(all > MOST_KEPT ? own.at_least(all) : kept.at_least(all));
    const auto next = [&](int i) { return std::exchange(at, at + sizes[i]); };
    d_ = reinterpret_cast<Panel<T>*>(next(0)), u_ = reinterpret_cast<Panel<T>*>(next(1));
    bias_ = reinterpret_cast<S*>(next(2)), qa_ = reinterpret_cast<S*>(next(3)), xp_ = reinterpret_cast<S*>(next(4));
    if (slots == 1) {
      pack_adapter(0);
    } else {
      parallel_for(slots, [&](int64_t slot) { pack_adapter(slot); });
    }
    for (int64_t j = 0; j < panels_ * NR; ++j) {
      bias_[j] = g_.bias.data && j < g_.N ? load_one(static_cast<const T*>(g_.bias.data) + j * g_.bias.col) : S{0};
    }
    const int64_t shares = this->shares();
    parallel_for(splits * shares, [&](int64_t i) {
      const int64_t number = i / shares, share = i % shares;
      const Split& split = splits_[number];
      for (int64_t done = 0; done < split.rows; done += split.block_rows) {
        rows(split.row0 + done, std::min(split.block_rows, split.rows - done), panels_ * share / shares,
             panels_ * (share + 1) / shares, share == 0, split.slot, number, done > 0);
      }
    });
    if (g_.qa) reduce(qa_, g_.K, static_cast<T*>(g_.qa), 1, g_.K);
    if (g_.xp) reduce(xp_, g_.N, static_cast<T*>(g_.xp), g_.R, 1);
  }

  // with few rows, the columns of c are divided into shares as well. each share packs its rows again, without waiting
  // for another
  int64_t shares() const {
    if (g_.c.data == g_.x.data) return 1;  // c is in the place of x: no share may write what another still reads
    const int64_t splits = int64_t(splits_.size());
    return g_.c.data && splits > 0 ? std::min((thread_count() + splits - 1) / splits, (panels_ + 7) / 8) : 1;
  }

 private:
  // an adapter that has rows; its index in adapters_ is its slot. a type of this namespace, not int64_t, because the
  // linker could merge std::vector<int64_t> of different instruction sets (isa.h)
  struct Adapter {
    int64_t id;
  };
  // the rows of one task, which it visits in blocks; its partial sums over rows are separate
  struct Split {
    int64_t row0, rows, block_rows, slot;
  };

  int64_t slot_of(int64_t adapter) const {
    int64_t slot = int64_t(adapters_.size()) - 1;
    while (slot >= 0 && adapters_[slot].id != adapter) --slot;
    return slot;
  }

  // divides a run of rows into splits of blocks of equal height (up to two rows: the last tile is lower). this depends
  // on shapes alone, so sums over rows are bitwise the same for any number of threads
  void add_run(int64_t row0, int64_t count, int64_t slot) {
    const int64_t tiles = (count + MR - 1) / MR, all = (g_.M + MR - 1) / MR;
    const int64_t most_bytes = packs_ ? PACKING_BLOCK_BYTES : BLOCK_BYTES;
    const int64_t most = std::max<int64_t>(1, most_bytes / (chunks_.per_block * PITCH * int64_t(sizeof(S)) * MR));
    int64_t blocks = std::max<int64_t>(1, (tiles + most - 1) / most);
    const bool sums_rows = g_.qa || g_.xp;
    // an even number of blocks balances two threads, where no other run does; a single block is shared by columns
    if (!g_.ids && (blocks > 1 || (sums_rows && tiles > 8))) blocks += blocks % 2;
    int64_t block_rows = ((count + blocks - 1) / blocks + 1) / 2 * 2;
    if (block_rows % MR == 2 && blocks > 1) block_rows += 2;  // two rows do not hide the FMA latency
    if (!block_rows) return;
    // blocks per split such that all rows, as a single run, would be at most MOST_SPLITS splits
    const int64_t total = g_.ids ? (all + most - 1) / most : (g_.M + block_rows - 1) / block_rows;
    const int64_t step = sums_rows ? (total + MOST_SPLITS - 1) / MOST_SPLITS * block_rows : block_rows;
    for (int64_t done = 0; done < count; done += step) {
      splits_.push_back({row0 + done, std::min(step, count - done), block_rows, slot});
    }
  }

  int64_t d_size() const { return r_panels_ * chunks_.K * r_width_; }
  int64_t u_size() const { return panels_ * panel_size<T>(g_.R); }

  void pack_adapter(int64_t slot) const {
    const auto of_adapter = [&](View v, int64_t next) {
      if (v.data) v.data = static_cast<const T*>(v.data) + adapters_[slot].id * next;
      return v;
    };
    const View d = of_adapter(g_.d, g_.d_adapter), u = of_adapter(g_.u, g_.u_adapter);
    for (int64_t r = 0; d.data && r < r_panels_; ++r) {
      Panel<T>* panel = d_ + slot * d_size() + r * chunks_.K * r_width_;
      if (r_width_ == VL) {
        pack_panel<T, 1>(d, g_.K, g_.R, r * VL, panel);
      } else {
        pack_panel<T, 2>(d, g_.K, g_.R, r * NR, panel);
      }
    }
    for (int64_t j = 0; u.data && j < panels_; ++j) {
      pack_panel<T, 2>(u, g_.R, g_.N, j * NR, u_ + slot * u_size() + j * panel_size<T>(g_.R));
    }
  }

  static size_t bytes(int64_t n) { return size_t((n + 63) / 64 * 64 + 64); }

  // size of one split's sums over rows: [R rounded up to RT][K rounded up to NR]
  int64_t sums_size(int64_t K) const { return (g_.R + RT - 1) / RT * RT * sums_row(K); }
  static int64_t sums_row(int64_t K) { return (K + NR - 1) / NR * NR; }

  // all outputs for rows row0 ... row0 + count, with panels [panel0, panel1) of c. only the `first` share of the rows
  // stores p and the sums
  void rows(int64_t row0, int64_t count, int64_t panel0, int64_t panel1, bool first, int64_t slot, int64_t split,
            bool adds) {
    const int64_t tiles = (count + MR - 1) / MR, padded = tiles * MR;
    const int64_t chunk_size = padded * PITCH, strip_size = padded * NR, r_strip_size = padded * r_width_;
    const int64_t sizes[] = {(chunks_.per_block + r_chunks_.count + (g_.xp ? 1 : 0)) * chunk_size + 64,
                             2 * r_panels_ * r_strip_size, (blocked_ ? panels_ : 1) * strip_size, MR * NR,
                             packs_ ? chunks_.length * NR : 0};
    thread_local Scratch scratch(64);
    Cell<T>* const a =
        static_cast<Cell<T>*>(scratch.at_least((sizes[0] + sizes[1] + sizes[2] + sizes[3] + sizes[4]) * sizeof(S)));
    Cell<T>* const p_chunks = a + chunks_.per_block * chunk_size;           // [r chunk][row][PITCH]
    Cell<T>* const x_chunk = p_chunks + r_chunks_.count * chunk_size;       // [row][PITCH]
    S* const p = reinterpret_cast<S*>(a + sizes[0]);                        // [r panel][row][r_width]
    Cell<T>* const q = a + sizes[0] + r_panels_ * r_strip_size;             // [r panel][row, or pair][r_width]
    S* const strips = p + sizes[1];                                         // [panel][row][NR]
    S* const edge = strips + sizes[2];                                      // [MR][NR]
    Panel<T>* const packed = reinterpret_cast<Panel<T>*>(edge + sizes[3]);  // [chunk][NR]

    // rows without an adapter have p = 0 and do not contribute to the sums
    const bool adapted = slot >= 0, sums = first && adapted;
    if (!adapted) std::fill_n(p, r_panels_ * r_strip_size, S{0});
    if (g_.qa && sums) load_factors(g_.q, row0, count, q);
    for (int64_t chunk0 = 0; chunk0 < chunks_.count; chunk0 += chunks_.per_block) {
      const int64_t chunk1 = std::min(chunks_.count, chunk0 + chunks_.per_block);
      const bool last = chunk1 == chunks_.count;
      for (int64_t i = chunk0; i < chunk1; ++i) {
        Cell<T>* chunk = a + (i - chunk0) * chunk_size;
        const int64_t k0 = chunks_.begin(i) * PER, k_count = std::min(chunks_.size(i) * PER, g_.K - k0);
        pack_chunk<T>(g_.a, row0, count, k0, k_count, chunk);
        if (g_.qa && sums) transposed(chunk, q, count, k0, k_count, qa_, split, g_.K, adds);
        for (int64_t r = 0; g_.d.data && adapted && r < r_panels_; ++r) {
          const Panel<T>* d = d_ + slot * d_size() + (r * chunks_.K + chunks_.begin(i)) * r_width_;
          for (int64_t t = 0; t < tiles; ++t) {
            S* out = p + r * r_strip_size + t * MR * r_width_;
            const auto r_tile = r_width_ == VL ? tile<T, 1, MR> : tile<T, 2, MR>;
            // a wide tile has one set of accumulators, whose chains of roundings would be longer than plain torch's
            const int64_t most = r_width_ == VL ? KC : KC / 4;
            for (int64_t k = 0; k < chunks_.size(i); k += most) {
              const Steps<T> steps{chunk + t * MR * PITCH + k, d + k * r_width_, std::min(most, chunks_.size(i) - k)};
              const bool adds = i > 0 || k > 0;
              r_tile(steps, {}, adds ? out : zeros(), adds ? r_width_ : 0, out, r_width_,
                     Ahead{reinterpret_cast<const char*>(steps.b)});
            }
          }
        }
      }
      if (last && g_.d.data) finish_p(row0, count, padded, first, p, p_chunks);
      if (last && g_.xp && sums) {  // before c, which may be in the place of x
        // the sums take an even number of rows. one past the last is a multiple of zero, hence nan if d has an infinity
        for (int64_t r = 0; count % 2 && r < r_panels_; ++r)
          std::fill_n(p + (r * padded + count) * r_width_, r_width_, S{0});
        const Cell<T>* factors = pair_rows(p, padded, q);
        const Chunks n(cells<T>(g_.N), KC);
        for (int64_t i = 0; i < n.count; ++i) {
          const int64_t k0 = n.begin(i) * PER, k_count = std::min(n.size(i) * PER, g_.N - k0);
          pack_chunk<T>(g_.x, row0, count, k0, k_count, x_chunk);
          transposed(x_chunk, factors, count, k0, k_count, xp_, split, g_.N, adds);
        }
      }
      if (!g_.c.data) continue;
      for (int64_t j = panel0; j < panel1; ++j) {
        S* strip = strips + (blocked_ ? j - panel0 : 0) * strip_size;
        columns(row0, count, j, chunk0, chunk1, a, chunk_size, packed, p_chunks, slot, strip, edge);
      }
    }
  }

  // converts p to rows of cells for the product with u, and stores it as an output
  void finish_p(int64_t row0, int64_t count, int64_t padded, bool first, const S* p, Cell<T>* p_chunks) const {
    for (int64_t r = 0; r < r_panels_; ++r) {
      const int64_t cell = r * r_width_ / PER, columns = std::min<int64_t>(r_width_, g_.R - r * r_width_);
      for (int64_t i = 0; i < padded; ++i) {
        const S* src = p + (r * padded + i) * r_width_;
        Cell<T>* cells = p_chunks + (cell / KC * padded + i) * PITCH + cell % KC;
        pack_sums<T>(src, r_width_, cells);
        // the columns from R on are multiples of zero, hence nan if x has an infinity
        if constexpr (dots<T>) {
          if (columns % PER) cells[columns / PER] &= 0xffff;
        }
        if (!g_.p || !first || i >= count) continue;
        T* dst = static_cast<T*>(g_.p) + (row0 + i) * g_.R + r * r_width_;
        for (int64_t j = 0; j < columns; ++j) store_one(dst + j, S(src[j] * g_.scale));
      }
    }
  }

  // the part of panel j of b for a chunk, packed here if b is not
  const Panel<T>* panel(int64_t j, int64_t chunk, Panel<T>* packed) const {
    const int64_t k0 = chunks_.begin(chunk);
    if (!packs_) return static_cast<const Panel<T>*>(g_.b) + j * panel_size<T>(g_.K) + k0 * NR;
    View b = g_.b_rows;
    b.data = row_of<T>(b, k0 * PER);
    pack_panel<T, 2>(b, std::min(chunks_.size(chunk) * PER, g_.K - k0 * PER), g_.N, j * NR, packed);
    return packed;
  }

  // the cache lines from which the tiles after these read b: `rows` of them `step` bytes apart, then those next to them
  struct Lines {
    const char* first;
    int64_t count, rows, step;
    const char* line(int64_t i) const { return first + i % rows * step + i / rows * 64; }
  };

  Lines next_lines(const Steps<T>& steps, int64_t j, int64_t chunk) const {
    if (!packs_ || j >= panels_) {
      const int64_t count = std::max<int64_t>(1, steps.count * NR * int64_t(sizeof(Panel<T>)) / 64);
      return {reinterpret_cast<const char*>(steps.b + steps.count * NR), count, count, 64};
    }
    const int64_t k0 = chunks_.begin(chunk) * PER, rows = std::min(chunks_.size(chunk) * PER, g_.K - k0);
    const T* first = row_of<T>(g_.b_rows, k0) + j * NR * g_.b_rows.col;
    const int64_t across = (NR * int64_t(sizeof(T)) + 63) / 64;
    return {reinterpret_cast<const char*>(first), rows * across, rows, g_.b_rows.row * int64_t(sizeof(T))};
  }

  // panel j of c for a block of rows: sums over chunks [chunk0, chunk1) of K and, after the last chunk, over R
  void columns(int64_t row0, int64_t count, int64_t j, int64_t chunk0, int64_t chunk1, const Cell<T>* a,
               int64_t chunk_size, Panel<T>* packed, const Cell<T>* p_chunks, int64_t slot, S* strip, S* edge) {
    const Panel<T>* u = u_ + std::max<int64_t>(slot, 0) * u_size() + j * panel_size<T>(g_.R);
    const bool last = chunk1 == chunks_.count;
    const int64_t r_count = last && g_.u.data && slot >= 0 ? r_chunks_.count : 0;
    // a short p is appended to the last chunk of a, because the start and end of a tile cost as much as about 16 steps.
    // a long p is a separate pass, otherwise the chain of roundings would exceed a chunk
    const bool joined = r_count > 0 && g_.R <= MOST_JOINED;
    const int64_t k_count = chunk1 - chunk0, passes = k_count + (joined ? 0 : r_count);
    for (int64_t i = 0; i < passes; ++i) {
      const bool ends = last && i == passes - 1;
      const auto k_steps = [&](int64_t k) -> Steps<T> {
        return {a + k * chunk_size, panel(j, chunk0 + k, packed), chunks_.size(chunk0 + k)};
      };
      const auto r_steps = [&](int64_t r) -> Steps<T> {
        return {p_chunks + r * chunk_size, u + r_chunks_.begin(r) * NR, r_chunks_.size(r)};
      };
      Steps<T> first = i < k_count ? k_steps(i) : r_steps(i - k_count);
      Steps<T> then = ends && joined ? r_steps(0) : Steps<T>{};
      // the tiles prefetch the next chunk of the panel; if there are many, the last ones prefetch the next rows instead
      const Lines next = next_lines(first, i + 1 < k_count ? j : j + 1, i + 1 < k_count ? chunk0 + i + 1 : chunk0);
      const int64_t tiles = (count + MR - 1) / MR;
      const int64_t lines =
          std::max<int64_t>(1, (next.count + tiles * (first.count / 4) - 1) / (tiles * (first.count / 4 + 1)));
      const int64_t per_tile = first.count / 4 * lines;
      for (int64_t t = 0; t * MR < count; ++t) {
        S* const kept = strip + t * MR * NR;
        const bool starts = chunk0 == 0 && i == 0;
        const S* in = starts ? bias_ + j * NR : kept;
        int64_t in_row = starts ? 0 : NR;
        T* const c_tile = ends ? c_at(row0 + t * MR, j * NR) : nullptr;
        // with c_adds and a single pass, the old c takes the place of the bias
        const bool direct = ends && stores_directly(count - t * MR, j) && (!g_.c_adds || starts);
        if (direct && g_.c_adds) in = reinterpret_cast<const S*>(c_tile), in_row = g_.c.row;
        S* out = direct ? reinterpret_cast<S*>(c_tile) : ends ? edge : kept;
        Ahead ahead{reinterpret_cast<const char*>(first.a + MR * PITCH), lines};
        if (t * per_tile < next.count) ahead = {next.line(t * per_tile), lines, next.step};
        if (ends) prefetch_columns(c_tile, std::min<int64_t>(MR, count - t * MR), (j + 1) * NR);
        tile_of<T>(count - t * MR)(first, then, in, in_row, out, direct ? g_.c.row : NR, ahead);
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

  // c is written one cache line per row: prefetch those of the next panel, otherwise the stores wait for memory
  void prefetch_columns(const T* c_tile, int64_t rows, int64_t next) const {
    if (next >= g_.N || g_.c.col != 1) return;
    for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(c_tile + i * g_.c.row + NR, 1);
  }

  bool stores_directly(int64_t rows, int64_t j) const {
    const bool fits = rows >= MR || rows % 2 == 0;  // otherwise the tile has one more row
    return std::is_same_v<T, S> && fits && (j + 1) * NR <= g_.N && g_.c.col == 1 && g_.scale == 1.0;
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

  // copies q [M, R] to the layout of transposed_tiles: [r panel][row, or pair of rows][r_width], padded with zeros
  void load_factors(const View& q, int64_t row0, int64_t count, Cell<T>* factors) const {
    const int64_t padded = (count + MR - 1) / MR * MR;
    for (int64_t r = 0; r < r_panels_; ++r) {
      for (int64_t i = 0; i < padded; i += PER) {
        for (int64_t j = 0; j < r_width_; ++j, ++factors) {
          const auto at = [&](int64_t row) { return row_of<T>(q, row0 + row) + (r * r_width_ + j) * q.col; };
          const bool there = r * r_width_ + j < g_.R && i < count;
          if constexpr (dots<T>) {
            const uint32_t second = there && i + 1 < count ? at(i + 1)->bits : 0;
            *factors = (there ? at(i)->bits : 0) | second << 16;
          } else {
            *factors = there ? load_one(at(i)) : S{0};
          }
        }
      }
    }
  }

  // p in the same layout: p itself, or, with dot products, `pairs` with two of its rows per cell
  const Cell<T>* pair_rows(const S* p, int64_t padded, Cell<T>* pairs) const {
    if constexpr (dots<T>) {
      for (int64_t i = 0; i < r_panels_ * padded; i += 2) {
        for (int64_t j = 0; j < r_width_; j += VL) {
          const auto row = [&](int64_t n) { return narrow(T{}, load<Vec<S>>(p + (i + n) * r_width_ + j)); };
          store(pairs + i / 2 * r_width_ + j, row(0) | row(1) << 16);
        }
      }
      return pairs;
    } else {
      return p;
    }
  }

  // the split's sums for the columns of a chunk from k0 on:  sums[split][r][k] (+)= factors.T @ chunk
  void transposed(const Cell<T>* chunk, const Cell<T>* factors, int64_t rows, int64_t k0, int64_t columns, S* sums,
                  int64_t split, int64_t K, bool adds) const {
    const int64_t padded = (rows + MR - 1) / MR * MR, even = (rows + 1) / 2 * 2;
    for (int64_t r = 0; r < r_panels_; ++r) {
      S* out = sums + split * sums_size(K) + r * r_width_ * sums_row(K) + k0;
      const int64_t R = std::min<int64_t>(r_width_, g_.R - r * r_width_);
      const Cell<T>* factor = factors + r * padded / PER * r_width_;
      transposed_tiles<T>(chunk, factor, r_width_, even, columns, R, out, sums_row(K), adds);
    }
  }

  // out[k, r] = scale * sum over an adapter's splits, in order; one such matrix per adapter
  void reduce(const S* sums, int64_t K, T* out, int64_t out_k, int64_t out_r) const {
    constexpr int64_t STEP = 64;
    const int64_t steps = (K + STEP - 1) / STEP;
    parallel_for(g_.A * steps, [&](int64_t i) {
      const int64_t adapter = i / steps, k0 = i % steps * STEP, count = std::min(K - k0, STEP);
      const int64_t slot = slot_of(adapter);
      T* const matrix = out + adapter * g_.R * K;
      for (int64_t r = 0; r < g_.R; ++r) {
        S total[STEP] = {};
        for (size_t split = 0; slot >= 0 && split < splits_.size(); ++split) {
          if (splits_[split].slot != slot) continue;
          const S* row = sums + int64_t(split) * sums_size(K) + r * sums_row(K);
          for (int64_t k = 0; k < count; ++k) total[k] += row[sums_column<T>(k0 + k)];
        }
        for (int64_t k = 0; k < count; ++k) store_one(matrix + (k0 + k) * out_k + r * out_r, S(total[k] * g_.scale));
      }
    });
  }

  static const S* zeros() {
    static const S z[NR] = {};
    return z;
  }

  const LowRank& g_;
  const Chunks chunks_, r_chunks_;
  const int64_t panels_;
  const int64_t r_width_, r_panels_;  // panels over R are narrow if one vector holds all columns
  const bool packs_;                  // b is not packed yet
  const bool blocked_;                // K needs several blocks: partial sums of all panels are kept
  std::vector<Adapter> adapters_;
  std::vector<Split> splits_;
  Panel<T>* d_ = nullptr;  // [slot][r panel][K][r_width]
  Panel<T>* u_ = nullptr;  // [slot][panel][R][NR]
  S* bias_ = nullptr;      // [panel][NR]
  S* qa_ = nullptr;        // [split][R][K], in the layout of sums_size() and sums_column()
  S* xp_ = nullptr;        // [split][R][N]
};

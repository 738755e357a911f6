// The CPU kernel: one pass over W0 [rows, cols] that builds W' and, where G = dL/dW' is given, the gradients of the
// factors too. What it computes is core/equation.py's Update.delta and Update.backward; what it never does is write a
// [rows, cols] tensor other than W'. Plain C++17 with vector types (GCC or clang), no headers of torch.
//
// dW = scale * magnitude(L1 R1) . direction(L2 R2)      L [rows, r], R [r, cols]
// A torch.nn.Linear stores [out, in]: L1, R1, L2, R2 = B, A, D, C. A Conv1D stores [in, out]: A^T, B^T, C^T, D^T.
//
// Work goes by blocks of ROWS rows and, inside, by panels of PANEL columns, so that the panel of R, the rows of L and
// the products dP, dQ of one tile stay in the first-level cache. Each thread owns a run of row blocks; sums over rows
// (dR1, dR2) are kept per thread and added in thread order, so a given number of threads gives the same bits.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
typedef float vf __attribute__((vector_size(VL * sizeof(float))));
typedef float vf_u __attribute__((vector_size(VL * sizeof(float)), aligned(4), may_alias));
constexpr int WIDE = VL < 8 ? 8 : VL;  // columns of dL at once

constexpr int PANEL = 4 * VL;  // columns of a panel
constexpr int ROWS = 32;       // rows of a block
constexpr int TILE = 4;        // rows whose products are held in registers at once

inline vf load(const float* p) { return *(const vf_u*)p; }
inline void store(float* p, vf v) { *(vf_u*)p = v; }
inline vf splat(float s) { return vf{} + s; }
inline long ceil_to(long n, long k) { return (n + k - 1) / k * k; }

enum Dtype { F32 = 0, BF16 = 1, F16 = 2 };
enum Magnitude { RELU = 0, ABS = 1, PLAIN = 2 };
enum Direction { STE = 0, PRODUCT = 1, TANH = 2 };
enum Clip { CHAIN = 0, UPDATE = 1, NONE = 2, WINDOW = 3 };

// ---- elements of W, G and W' ------------------------------------------------------------------------------------

inline float from_bf16(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

inline uint16_t to_bf16(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (u & 0x7fffffffu) > 0x7f800000u ? (uint16_t)0x7fc0 : (uint16_t)rounded;  // NaN would round to infinity
}

template <typename T>
inline float widen(T x) { return (float)x; }
template <>
inline float widen<uint16_t>(uint16_t x) { return from_bf16(x); }
template <typename T>
inline T narrow(float x) { return (T)x; }
template <>
inline uint16_t narrow<uint16_t>(float x) { return to_bf16(x); }

template <typename T>
inline void read(const void* base, long offset, int count, float* to) {
    const T* p = (const T*)base + offset;
    if (count == PANEL) {
        for (int j = 0; j < PANEL; ++j) to[j] = widen<T>(p[j]);
    } else {
        for (int j = 0; j < count; ++j) to[j] = widen<T>(p[j]);
        for (int j = count; j < PANEL; ++j) to[j] = 0.f;
    }
}

template <typename T>
inline void write(void* base, long offset, int count, const float* from) {
    T* p = (T*)base + offset;
    if (count == PANEL) {
        for (int j = 0; j < PANEL; ++j) p[j] = narrow<T>(from[j]);
    } else {
        for (int j = 0; j < count; ++j) p[j] = narrow<T>(from[j]);
    }
}

// Rows lie far apart, where the hardware's own prefetching does not reach: ask for the next panel while this one is
// worked on.
inline void prefetch_panel(int dtype, const void* base, long row, long cols, long column, int n) {
    if (!base || column >= cols) return;
    const int size = dtype == F32 ? 4 : 2;
    for (int i = 0; i < n; ++i) {
        const char* p = (const char*)base + ((row + i) * cols + column) * size;
        for (int at = 0; at < PANEL * size; at += 64) __builtin_prefetch(p + at, 0, 2);
    }
}

// One row of a panel, as float32, zeros behind the last column.
inline void read_row(int dtype, const void* base, long offset, int count, float* to) {
    if (dtype == F32) read<float>(base, offset, count, to);
    else if (dtype == BF16) read<uint16_t>(base, offset, count, to);
    else read<_Float16>(base, offset, count, to);
}

inline void write_row(int dtype, void* base, long offset, int count, const float* from) {
    if (dtype == F32) write<float>(base, offset, count, from);
    else if (dtype == BF16) write<uint16_t>(base, offset, count, from);
    else write<_Float16>(base, offset, count, from);
}

// ---- factors, packed --------------------------------------------------------------------------------------------

struct Pair {  // L R, zero-padded so that no loop needs an edge case
    int r = 0, r4 = 0, r8 = 0;
    std::vector<float> left;     // [rows to TILE][r4]
    std::vector<float> right;    // [panel][r4][PANEL]
    std::vector<float> right_t;  // [panel][PANEL][r8], for dL

    void pack(const float* L, const float* R, int rank, long rows, long cols, bool transposed) {
        r = rank, r4 = (int)ceil_to(rank, 4), r8 = (int)ceil_to(rank, 8);
        left.assign(ceil_to(rows, ROWS) * r4, 0.f);
        for (long i = 0; i < rows; ++i) std::memcpy(&left[i * r4], L + i * r, r * sizeof(float));
        long panels = (cols + PANEL - 1) / PANEL;
        right.assign(panels * r4 * PANEL, 0.f);
        if (transposed) right_t.assign(panels * PANEL * r8, 0.f);
        for (long p = 0; p < panels; ++p) {
            int count = (int)(cols - p * PANEL < PANEL ? cols - p * PANEL : PANEL);
            for (int l = 0; l < r; ++l) {
                const float* from = R + l * cols + p * PANEL;
                std::memcpy(&right[(p * r4 + l) * PANEL], from, count * sizeof(float));
                if (transposed)
                    for (int j = 0; j < count; ++j) right_t[(p * PANEL + j) * r8 + l] = from[j];
            }
        }
    }
};

// to [n to TILE][PANEL] = L R, for L [..][ld] and one panel of R
void product(float* to, const float* L, int ld, const float* R, int r, int n) {
    for (int i0 = 0; i0 < n; i0 += TILE) {
        for (int v = 0; v < 4; v += 2) {
            vf acc[TILE][2] = {};
            for (int l = 0; l < r; ++l) {
                const vf a = load(R + l * PANEL + v * VL), b = load(R + l * PANEL + (v + 1) * VL);
                for (int i = 0; i < TILE; ++i) {
                    const vf s = splat(L[(i0 + i) * ld + l]);
                    acc[i][0] += s * a;
                    acc[i][1] += s * b;
                }
            }
            for (int i = 0; i < TILE; ++i) {
                store(to + (i0 + i) * PANEL + v * VL, acc[i][0]);
                store(to + (i0 + i) * PANEL + (v + 1) * VL, acc[i][1]);
            }
        }
    }
}

// Sums over a block start at zero and are then added to the total, which keeps rounding small: its errors grow with the
// root of the block's and of the number of blocks instead of that of all rows.

// part [r4][PANEL] += L^T X, for X [n][PANEL]: a block's share of dR
void add_left_transposed(float* part, const float* L, int r4, const float* X, int n) {
    for (int l = 0; l < r4; l += 4) {
        vf acc[4][4] = {};
        for (int i = 0; i < n; ++i) {
            vf x[4];
            for (int v = 0; v < 4; ++v) x[v] = load(X + i * PANEL + v * VL);
            for (int a = 0; a < 4; ++a) {
                vf s = splat(L[i * r4 + l + a]);
                for (int v = 0; v < 4; ++v) acc[a][v] += s * x[v];
            }
        }
        for (int a = 0; a < 4; ++a)
            for (int v = 0; v < 4; ++v) {
                float* to = part + (l + a) * PANEL + v * VL;
                store(to, load(to) + acc[a][v]);
            }
    }
}

// dL [8][r8] (columns l .. l + WIDTH NV) += X R^T, for X [8][PANEL] and R^T [PANEL][r8]
template <int WIDTH, int NV>
inline void add_right_transposed(float* dL, int r8, const float* X, const float* Rt) {
    typedef float vec __attribute__((vector_size(WIDTH * sizeof(float))));
    typedef float vec_u __attribute__((vector_size(WIDTH * sizeof(float)), aligned(4), may_alias));
    vec acc[8][NV] = {};
    for (int j = 0; j < PANEL; ++j) {
        vec r[NV];
        for (int v = 0; v < NV; ++v) r[v] = *(const vec_u*)(Rt + j * r8 + v * WIDTH);
        for (int i = 0; i < 8; ++i) {
            const vec s = vec{} + X[i * PANEL + j];
            for (int v = 0; v < NV; ++v) acc[i][v] += s * r[v];
        }
    }
    for (int i = 0; i < 8; ++i)
        for (int v = 0; v < NV; ++v) *(vec_u*)(dL + i * r8 + v * WIDTH) += acc[i][v];
}

void add_right_transposed(float* dL, int r8, const float* X, const float* Rt, int n) {
    for (int i = 0; i < n; i += 8) {  // dL and X have whole blocks of rows
        int l = 0;
        for (; l + 2 * WIDE <= r8; l += 2 * WIDE) add_right_transposed<WIDE, 2>(dL + i * r8 + l, r8, X + i * PANEL, Rt + l);
        for (; l + WIDE <= r8; l += WIDE) add_right_transposed<WIDE, 1>(dL + i * r8 + l, r8, X + i * PANEL, Rt + l);
        if (l < r8) add_right_transposed<8, 1>(dL + i * r8 + l, r8, X + i * PANEL, Rt + l);
    }
}

// ---- the formula, on one vector ---------------------------------------------------------------------------------

// Comparisons are written so that NaN falls on the side that keeps it.
template <int MAG>
inline vf magnitude(vf P) {
    if (MAG == RELU) return P <= 0.f ? vf{} : P;
    if (MAG == ABS) return P < 0.f ? -P : P;
    return P;
}

template <int MAG>
inline vf slope(vf P) {
    const vf one = splat(1.f);
    if (MAG == RELU) return P <= 0.f ? vf{} : one;
    if (MAG == ABS) return P < 0.f ? -one : (P == 0.f ? vf{} : one);
    return one;
}

// tanh x = E / (E + 2), E = exp(2x) - 1, of |x| and with the sign of x after. exp(y) = 2^n exp(r), |r| <= ln 2 / 2, by the
// series of exp(r) - 1 to r^7 (5e-9), so that small x keep their digits. From |x| = 9 on it is 1 in float32.
inline vf tanh_of(vf x) {
    const vf most = splat(9.f);
    vf a = x < 0.f ? -x : x;
    a = a > most ? most : a;
    const vf y = a + a, shift = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number
    const vf n = (y * 1.44269504f + shift) - shift;
    const vf r = y - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts
    vf p = splat(1.f / 5040);
    for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f}) p = p * r + c;
    typedef int32_t vi __attribute__((vector_size(VL * sizeof(int32_t))));
    vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
    vf power;
    std::memcpy(&power, &exponent, sizeof power);
    const vf E = p * r * power + (power - 1.f), t = E / (E + 2.f);
    return x < 0.f ? -t : t;
}

template <int DIR>
inline vf direction(vf Q) {
    if (DIR == PRODUCT) return Q;
    if (DIR == TANH) return tanh_of(Q);
    const vf one = splat(1.f);
    return Q > 0.f ? one : (Q <= 0.f ? -one : Q);
}

inline vf clamp1(vf x) {
    const vf one = splat(1.f);
    x = x > one ? one : x;
    return x < -one ? -one : x;
}

// dW [n][PANEL] from the products P and Q
template <int MAG, int DIR>
void delta(float* dW, const float* P, const float* Q, long n, float scale) {
    const vf s = splat(scale);
    for (long at = 0; at < n * PANEL; at += VL)
        store(dW + at, s * magnitude<MAG>(load(P + at)) * direction<DIR>(load(Q + at)));
}

// P, Q [n][PANEL] become dL/dP, dL/dQ for G = dL/d(dW)
template <int MAG, int DIR>
void chain(float* P, float* Q, const float* G, long n, float scale, int clip) {
    const vf s = splat(scale);
    for (long at = 0; at < n * PANEL; at += VL) {
        const vf p = load(P + at), q = load(Q + at), g = load(G + at), M = s * magnitude<MAG>(p);
        const vf S = direction<DIR>(q);
        store(P + at, s * slope<MAG>(p) * S * g);
        vf dQ = g * M;
        if (DIR == TANH) dQ = dQ * (1.f - S * S);
        if (DIR == STE && clip == WINDOW) {
            const vf t = tanh_of(q);
            dQ = dQ * (1.f - t * t);
        }
        if (DIR == STE && clip == CHAIN) dQ = clamp1(dQ);
        if (DIR == STE && clip == UPDATE) dQ = clamp1(g) * M;
        store(Q + at, dQ);
    }
}

struct Formula {
    void (*delta)(float*, const float*, const float*, long, float);
    void (*chain)(float*, float*, const float*, long, float, int);
};

template <int MAG, int DIR>
constexpr Formula formula() { return {delta<MAG, DIR>, chain<MAG, DIR>}; }

const Formula FORMULAS[3][3] = {
    {formula<RELU, STE>(), formula<RELU, PRODUCT>(), formula<RELU, TANH>()},
    {formula<ABS, STE>(), formula<ABS, PRODUCT>(), formula<ABS, TANH>()},
    {formula<PLAIN, STE>(), formula<PLAIN, PRODUCT>(), formula<PLAIN, TANH>()},
};

float dot(const float* a, const float* b) {  // over one row of a panel
    vf s = {};
    for (int j = 0; j < PANEL; j += VL) s += load(a + j) * load(b + j);
    float total = 0.f;
    for (int k = 0; k < VL; ++k) total += s[k];
    return total;
}

}  // namespace

extern "C" {

struct Job {  // mirrored in cpu.py
    const void *W, *G;  // W null: 0. G null: build only.
    void* out;          // W', or null
    int64_t rows, cols;
    const float *L1, *R1, *L2, *R2;
    const float *L1_0, *R1_0, *L2_0, *R2_0;  // the initial factors of a residual start, or null
    float *dL1, *dR1, *dL2, *dR2;
    const float *row_m;                  // DoRA: rows scaled to length m in this pass ...
    float *row_norm;                     // ... and their length before that written here
    const float *row_scale, *col_scale;  // or scaled by what is given
    float *row_dot, *col_dot;            // sums of G . (W0 + dW), along rows or columns
    float *col_square;                   // sums of (W0 + dW)^2 along columns
    int32_t W_dtype, G_dtype, out_dtype;
    int32_t r1, r2;
    int32_t magnitude, direction, clip;
    int32_t minus_base;
    int32_t threads;
    double scale;  // taken as a float
};

}

namespace {

struct Plan {
    const Job& job;
    Pair one, two, one_0, two_0;
    long panels;
    bool gradients, residual;
    int threads;
    // [thread] partial sums over rows
    std::vector<float> dR1, dR2, col_dot, col_square;
    std::vector<float> dL1, dL2;  // [rows to ROWS][r8]
};

void run_rows(Plan& plan, int thread, long first_block, long last_block) {
    const Job& job = plan.job;
    const long rows = job.rows, cols = job.cols, panels = plan.panels;
    const Pair &one = plan.one, &two = plan.two, &one_0 = plan.one_0, &two_0 = plan.two_0;
    const Formula formula = FORMULAS[job.magnitude][job.direction];
    const bool scaled = job.row_scale || job.col_scale;
    alignas(64) float W[ROWS * PANEL], G[ROWS * PANEL], P[ROWS * PANEL], Q[ROWS * PANEL], V[ROWS * PANEL];
    std::vector<float> kept(job.row_m ? ROWS * panels * PANEL : 0);  // W0 + dW of a block, until its norm is known

    for (long block = first_block; block < last_block; ++block) {
        const long i0 = block * ROWS;
        const int n = (int)(rows - i0 < ROWS ? rows - i0 : ROWS);
        const int n8 = (n + 7) / 8 * 8;  // rows computed: zeros behind the last one
        double row_square[ROWS] = {}, row_dot[ROWS] = {};
        for (long p = 0; p < panels; ++p) {
            const long j0 = p * PANEL;
            const int count = (int)(cols - j0 < PANEL ? cols - j0 : PANEL);
            prefetch_panel(job.W_dtype, job.W, i0, cols, j0 + PANEL, n);
            prefetch_panel(job.G_dtype, job.G, i0, cols, j0 + PANEL, n);
            prefetch_panel(job.out_dtype, job.out, i0, cols, j0 + PANEL, n);
            product(P, &one.left[i0 * one.r4], one.r4, &one.right[p * one.r4 * PANEL], one.r, n8);
            product(Q, &two.left[i0 * two.r4], two.r4, &two.right[p * two.r4 * PANEL], two.r, n8);
            formula.delta(V, P, Q, n8, (float)job.scale);
            if (plan.residual) {
                product(W, &one_0.left[i0 * one_0.r4], one_0.r4, &one_0.right[p * one_0.r4 * PANEL], one_0.r, n8);
                product(G, &two_0.left[i0 * two_0.r4], two_0.r4, &two_0.right[p * two_0.r4 * PANEL], two_0.r, n8);
                formula.delta(W, W, G, n8, (float)job.scale);
                for (int at = 0; at < n8 * PANEL; at += VL) store(V + at, load(V + at) - load(W + at));
            }
            if (job.W) {
                for (int i = 0; i < n; ++i) {
                    read_row(job.W_dtype, job.W, (i0 + i) * cols + j0, count, W + i * PANEL);
                    for (int j = 0; j < PANEL; ++j) V[i * PANEL + j] += W[i * PANEL + j];
                }
            } else {
                std::memset(W, 0, sizeof W);
            }
            // V = W0 + dW from here on
            if (job.col_square) {
                float* square = &plan.col_square[(thread * panels + p) * PANEL];
                for (int i = 0; i < n; ++i)
                    for (int j = 0; j < PANEL; ++j) square[j] += V[i * PANEL + j] * V[i * PANEL + j];
            }
            if (plan.gradients) {
                for (int i = 0; i < n; ++i) read_row(job.G_dtype, job.G, (i0 + i) * cols + j0, count, G + i * PANEL);
                std::memset(G + n * PANEL, 0, (n8 - n) * PANEL * sizeof(float));
                if (job.row_dot)
                    for (int i = 0; i < n; ++i) row_dot[i] += dot(G + i * PANEL, V + i * PANEL);
                if (job.col_dot) {
                    float* to = &plan.col_dot[(thread * panels + p) * PANEL];
                    for (int i = 0; i < n; ++i)
                        for (int j = 0; j < PANEL; ++j) to[j] += G[i * PANEL + j] * V[i * PANEL + j];
                }
            }
            if (job.row_m) {
                for (int i = 0; i < n; ++i) {
                    row_square[i] += dot(V + i * PANEL, V + i * PANEL);
                    std::memcpy(&kept[(i * panels + p) * PANEL], V + i * PANEL, PANEL * sizeof(float));
                }
            } else {
                for (int i = 0; scaled && i < n; ++i) {
                    alignas(64) float by[PANEL];
                    for (int j = 0; j < PANEL; ++j)
                        by[j] = job.row_scale ? job.row_scale[i0 + i] : (j < count ? job.col_scale[j0 + j] : 0.f);
                    for (int j = 0; j < PANEL; ++j) {
                        V[i * PANEL + j] *= by[j];
                        G[i * PANEL + j] *= by[j];
                    }
                }
                if (job.minus_base)
                    for (int at = 0; at < n * PANEL; at += VL) store(V + at, load(V + at) - load(W + at));
                if (job.out)
                    for (int i = 0; i < n; ++i)
                        write_row(job.out_dtype, job.out, (i0 + i) * cols + j0, count, V + i * PANEL);
            }
            if (plan.gradients) {
                formula.chain(P, Q, G, n8, (float)job.scale, job.clip);
                add_left_transposed(&plan.dR1[(thread * panels + p) * one.r4 * PANEL], &one.left[i0 * one.r4], one.r4, P, n);
                add_left_transposed(&plan.dR2[(thread * panels + p) * two.r4 * PANEL], &two.left[i0 * two.r4], two.r4, Q, n);
                add_right_transposed(&plan.dL1[i0 * one.r8], one.r8, P, &one.right_t[p * PANEL * one.r8], n8);
                add_right_transposed(&plan.dL2[i0 * two.r8], two.r8, Q, &two.right_t[p * PANEL * two.r8], n8);
            }
        }
        for (int i = 0; i < n; ++i) {
            if (job.row_dot) job.row_dot[i0 + i] = (float)row_dot[i];
            if (!job.row_m) continue;
            const float norm = std::fmax((float)std::sqrt(row_square[i]), 1.17549435e-38f);
            const float by = job.row_m[i0 + i] / norm;
            job.row_norm[i0 + i] = norm;
            for (long p = 0; p < panels; ++p) {
                const int count = (int)(cols - p * PANEL < PANEL ? cols - p * PANEL : PANEL);
                const long offset = (i0 + i) * cols + p * PANEL;
                const float* from = &kept[(i * panels + p) * PANEL];
                for (int j = 0; j < PANEL; ++j) V[j] = from[j] * by;
                if (job.minus_base && job.W) {
                    read_row(job.W_dtype, job.W, offset, count, W);
                    for (int j = 0; j < PANEL; ++j) V[j] -= W[j];
                }
                if (job.out) write_row(job.out_dtype, job.out, offset, count, V);
            }
        }
    }
}

// to [r][cols] = the threads' partial sums [thread][panel][r4][PANEL], in thread order
void gather_right(float* to, const std::vector<float>& parts, int r, int r4, long cols, long panels, int threads) {
    for (int l = 0; l < r; ++l)
        for (long p = 0; p < panels; ++p) {
            const int count = (int)(cols - p * PANEL < PANEL ? cols - p * PANEL : PANEL);
            float* row = to + l * cols + p * PANEL;
            for (int t = 0; t < threads; ++t) {
                const float* from = &parts[((t * panels + p) * r4 + l) * PANEL];
                if (t == 0) std::memcpy(row, from, count * sizeof(float));
                else
                    for (int j = 0; j < count; ++j) row[j] += from[j];
            }
        }
}

void gather_columns(float* to, const std::vector<float>& parts, long cols, long panels, int threads) {
    for (long j = 0; j < cols; ++j) {
        to[j] = parts[j];
        for (int t = 1; t < threads; ++t) to[j] += parts[t * panels * PANEL + j];
    }
}

}  // namespace

extern "C" {

void duallora_run(const Job* job) {
    Plan plan{*job};
    plan.panels = (job->cols + PANEL - 1) / PANEL;
    plan.gradients = job->G != nullptr;
    plan.residual = job->L1_0 != nullptr;
    const long blocks = (job->rows + ROWS - 1) / ROWS;
    plan.threads = (int)(job->threads < blocks ? job->threads : blocks);
    if (plan.threads < 1) plan.threads = 1;
    plan.one.pack(job->L1, job->R1, job->r1, job->rows, job->cols, plan.gradients);
    plan.two.pack(job->L2, job->R2, job->r2, job->rows, job->cols, plan.gradients);
    if (plan.residual) {
        plan.one_0.pack(job->L1_0, job->R1_0, job->r1, job->rows, job->cols, false);
        plan.two_0.pack(job->L2_0, job->R2_0, job->r2, job->rows, job->cols, false);
    }
    if (plan.gradients) {
        plan.dR1.assign(plan.threads * plan.panels * plan.one.r4 * PANEL, 0.f);
        plan.dR2.assign(plan.threads * plan.panels * plan.two.r4 * PANEL, 0.f);
        plan.dL1.assign(blocks * ROWS * plan.one.r8, 0.f);
        plan.dL2.assign(blocks * ROWS * plan.two.r8, 0.f);
    }
    if (job->col_dot) plan.col_dot.assign(plan.threads * plan.panels * PANEL, 0.f);
    if (job->col_square) plan.col_square.assign(plan.threads * plan.panels * PANEL, 0.f);
    const int threads = plan.threads;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
#endif
    for (int t = 0; t < threads; ++t) run_rows(plan, t, blocks * t / threads, blocks * (t + 1) / threads);
    if (plan.gradients) {
        gather_right(job->dR1, plan.dR1, job->r1, plan.one.r4, job->cols, plan.panels, plan.threads);
        gather_right(job->dR2, plan.dR2, job->r2, plan.two.r4, job->cols, plan.panels, plan.threads);
        for (long i = 0; i < job->rows; ++i) {
            std::memcpy(job->dL1 + i * job->r1, &plan.dL1[i * plan.one.r8], job->r1 * sizeof(float));
            std::memcpy(job->dL2 + i * job->r2, &plan.dL2[i * plan.two.r8], job->r2 * sizeof(float));
        }
    }
    if (job->col_dot) gather_columns(job->col_dot, plan.col_dot, job->cols, plan.panels, plan.threads);
    if (job->col_square) gather_columns(job->col_square, plan.col_square, job->cols, plan.panels, plan.threads);
}

}

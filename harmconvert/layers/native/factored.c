/* A factored convolution over channels-last maps in one pass. The responses of a tile of pixels to the kept basis
 * kernels are computed in cache, one block of channels at a time, and multiplied by the coefficients immediately.
 *
 *   y[p, o] = bias[o] + sum_c sum_f coefficient[o, c, f] * response[p, c, f]
 *   response[p, c, f] = sum_ij vertical[v(f)][i] * horizontal[f][j] * x[row(p, i), column(p, j), c]
 *
 * In float32 the maps of responses, which are F times as large as x, are never written to memory. In bfloat16 only the
 * responses are computed here, in float32, and written in bfloat16: the product is left to a library that uses the
 * matrix instructions of the processor. The code is plain C with the vector types of GCC and clang; it needs no header
 * except those of the standard library.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 12 /* pixels in a register tile: 12 x 2 vectors of sums in 32 registers */
#elif defined(__AVX__)
#define LANES 8
#define ROWS 6 /* in 16 registers */
#else
#define LANES 4
#define ROWS 12
#endif
#define COLUMNS (2 * LANES) /* output channels in a register tile */
#define CACHE_FLOATS (160 * 1024) /* largest size of a tile's responses and sums, so that they fit into the L2 cache */

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias)); /* numbers in bfloat16 */
typedef union { float number; uint32_t word; } bits_t;

typedef struct {
    int64_t batch, height, width, channels;          /* of x */
    int64_t out_height, out_width, out_channels;     /* of y */
    int64_t rows, columns;                           /* of the kernel */
    int64_t stride_y, stride_x, dilation_y, dilation_x;
    int64_t top, left;                               /* zeros around x; below and right follow from the size of y */
    int64_t verticals, frequencies, block;           /* vertical vectors, basis kernels, channels of a block */
} shape_t;

int64_t harmconvert_panel(void) { return COLUMNS; }

#define INLINE static inline __attribute__((always_inline))

/* y[m][COLUMNS] = (bias if first, else y) + a[m][depth] x panel[depth][COLUMNS]; m is known at compile time. */
INLINE void tile(const int m, int64_t depth, const float *a, int64_t stride_a, const float *panel, const float *bias,
                 float *y, int64_t stride_y, int first)
{
    vector sum[ROWS][2];
    for (int i = 0; i < m; i++) {
        const float *from = first ? bias : y + i * stride_y;
        sum[i][0] = *(const vector *)from;
        sum[i][1] = *(const vector *)(from + LANES);
    }
    for (int64_t k = 0; k < depth; k++) {
        const vector p0 = *(const vector *)(panel + k * COLUMNS), p1 = *(const vector *)(panel + k * COLUMNS + LANES);
        for (int i = 0; i < m; i++) {
            const float value = a[i * stride_a + k];
            sum[i][0] += value * p0;
            sum[i][1] += value * p1;
        }
    }
    for (int i = 0; i < m; i++) {
        *(vector *)(y + i * stride_y) = sum[i][0];
        *(vector *)(y + i * stride_y + LANES) = sum[i][1];
    }
}

static void tiles(int64_t m, int64_t depth, const float *a, int64_t stride_a, const float *panel, const float *bias,
                  float *y, int64_t stride_y, int first)
{
    for (; m >= ROWS; m -= ROWS, a += ROWS * stride_a, y += ROWS * stride_y)
        tile(ROWS, depth, a, stride_a, panel, bias, y, stride_y, first);
    switch (m) {
#define CASE(n) case n: tile(n, depth, a, stride_a, panel, bias, y, stride_y, first); break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5)
#if ROWS > 6
    CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11)
#endif
    default: break;
    }
}

INLINE uint32_t rounded(uint32_t word) { return (word + 0x7fff + (word >> 16 & 1)) >> 16; }

/* Read and write vectors and single numbers; `half`: they are in bfloat16 in memory. It is known at compile time. */
INLINE vector load(const int half, const void *from, int64_t at)
{
    if (!half)
        return *(const vector *)((const float *)from + at);
    return (vector)(__builtin_convertvector(*(const halves *)((const uint16_t *)from + at), words) << 16);
}

INLINE void store(const int half, void *to, int64_t at, vector value)
{
    if (half) {
#ifdef __AVX512BF16__
        *(halves *)((uint16_t *)to + at) = (halves)_mm512_cvtneps_pbh((__m512)value);
#else
        const words word = (words)value, nan = (words)(value != value);
        const words round = (word + 0x7fff + (word >> 16 & 1)) >> 16;
        *(halves *)((uint16_t *)to + at) = __builtin_convertvector((nan & 0x7fc0) | (~nan & round), halves);
#endif
    } else
        *(vector *)((float *)to + at) = value;
}

INLINE float load_one(const int half, const void *from, int64_t at)
{
    if (!half)
        return ((const float *)from)[at];
    const bits_t bits = {.word = (uint32_t)((const uint16_t *)from)[at] << 16};
    return bits.number;
}

INLINE void store_one(const int half, void *to, int64_t at, float value)
{
    const bits_t bits = {.number = value};
    if (half)
        ((uint16_t *)to)[at] = value != value ? 0x7fc0 : (uint16_t)rounded(bits.word);
    else
        ((float *)to)[at] = value;
}

/* to[0 : count] = sum_i weight[i] * from[i][0 : count]; if from[i] is NULL, its values are zeros. */
INLINE void combine(const int to_half, void *restrict to, int64_t count, const int from_half, const void *const *from,
                    const float *weight, int64_t terms)
{
    int64_t c = 0;
    for (; c + 4 * LANES <= count; c += 4 * LANES) {
        vector s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
        for (int64_t i = 0; i < terms; i++) {
            if (!from[i] || weight[i] == 0)
                continue;
            s0 += weight[i] * load(from_half, from[i], c);
            s1 += weight[i] * load(from_half, from[i], c + LANES);
            s2 += weight[i] * load(from_half, from[i], c + 2 * LANES);
            s3 += weight[i] * load(from_half, from[i], c + 3 * LANES);
        }
        store(to_half, to, c, s0);
        store(to_half, to, c + LANES, s1);
        store(to_half, to, c + 2 * LANES, s2);
        store(to_half, to, c + 3 * LANES, s3);
    }
    for (; c + LANES <= count; c += LANES) {
        vector s = {0};
        for (int64_t i = 0; i < terms; i++)
            if (from[i])
                s += weight[i] * load(from_half, from[i], c);
        store(to_half, to, c, s);
    }
    for (; c < count; c++) {
        float s = 0;
        for (int64_t i = 0; i < terms; i++)
            if (from[i])
                s += weight[i] * load_one(from_half, from[i], c);
        store_one(to_half, to, c, s);
    }
}

/* Compute the responses of the pixels first .. last, all in one row of one map, for the channels c .. c + count.
 * `half`: x and the responses are in bfloat16, and the responses of frequency f are `apart_f` numbers behind those of
 * f - 1. */
INLINE void responses(const int half, const shape_t *s, const void *x, const float *vertical, const float *horizontal,
                      const int32_t *vertical_of, int64_t first, int64_t last, int64_t c, int64_t count, float *columns,
                      void *a, int64_t stride_a, int64_t apart_f)
{
    const void *from[64];
    const int64_t size = half ? sizeof(uint16_t) : sizeof(float);
    const int64_t out_row = first / s->out_width, out_column = first % s->out_width;
    const int64_t image = out_row / s->out_height, pixels = last - first;
    const int64_t top = out_row % s->out_height * s->stride_y - s->top;
    const int64_t left = out_column * s->stride_x - s->left;
    const int64_t needed = (pixels - 1) * s->stride_x + (s->columns - 1) * s->dilation_x + 1;
    const int64_t apart = s->verticals * count; /* size of one column: `count` channels for each vertical vector */
    for (int64_t column = 0; column < needed; column++) {
        const int64_t at = left + column;
        float *to = columns + column * apart;
        if (at < 0 || at >= s->width) {
            memset(to, 0, apart * sizeof(float));
            continue;
        }
        for (int64_t i = 0; i < s->rows; i++) {
            const int64_t row = top + i * s->dilation_y;
            from[i] = row < 0 || row >= s->height
                          ? NULL
                          : (const char *)x + (((image * s->height + row) * s->width + at) * s->channels + c) * size;
        }
        for (int64_t v = 0; v < s->verticals; v++)
            combine(0, to + v * count, count, half, from, vertical + v * s->rows, s->rows);
    }
    for (int64_t pixel = 0; pixel < pixels; pixel++)
        for (int64_t f = 0; f < s->frequencies; f++) {
            for (int64_t j = 0; j < s->columns; j++)
                from[j] = columns + (pixel * s->stride_x + j * s->dilation_x) * apart + vertical_of[f] * count;
            combine(half, (char *)a + (pixel * stride_a + f * apart_f) * size, count, 0, from,
                    horizontal + f * s->columns, s->columns);
        }
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Compute the panels q0 .. q1 of output channels for one tile of pixels p0 .. p1. The last panel may be wider than y:
 * then its sums are kept in `edge` and copied at the end. */
static void work(const shape_t *s, const float *x, const float *vertical, const float *horizontal,
                 const int32_t *vertical_of, const float *packed, const float *bias, float *y, int64_t p0, int64_t p1,
                 int64_t q0, int64_t q1, float *a, float *columns, float *edge)
{
    const int64_t o = s->out_channels, panels = up(o, COLUMNS), stride_a = s->frequencies * s->block + LANES;
    const float *weights = packed;
    for (int64_t c = 0; c < s->channels; c += s->block) {
        const int64_t count = least(s->block, s->channels - c), depth = s->frequencies * count;
        for (int64_t p = p0; p < p1;) {
            const int64_t end = least(p1, (p / s->out_width + 1) * s->out_width);
            responses(0, s, x, vertical, horizontal, vertical_of, p, end, c, count, columns, a + (p - p0) * stride_a,
                      stride_a, count);
            p = end;
        }
        for (int64_t q = q0; q < q1; q++) {
            const float *panel = weights + q * depth * COLUMNS;
            if ((q + 1) * COLUMNS <= o)
                tiles(p1 - p0, depth, a, stride_a, panel, bias + q * COLUMNS, y + p0 * o + q * COLUMNS, o, c == 0);
            else
                tiles(p1 - p0, depth, a, stride_a, panel, bias + q * COLUMNS, edge, COLUMNS, c == 0);
        }
        weights += panels * depth * COLUMNS;
    }
    if (q1 == panels && panels * COLUMNS > o)
        for (int64_t p = p0; p < p1; p++)
            memcpy(y + p * o + (panels - 1) * COLUMNS, edge + (p - p0) * COLUMNS,
                   (o - (panels - 1) * COLUMNS) * sizeof(float));
}

/* x (N, H, W, C), y (N, H', W', O), vertical (V, rows), horizontal (F, columns), vertical_of (F), bias (padded O);
 * packed: for each block of channels, for each panel of COLUMNS output channels, [F x channels][COLUMNS].
 * Returns 0, or 1 if there is not enough memory. */
int harmconvert_factored(const shape_t *s, const float *x, const float *vertical, const float *horizontal,
                         const int32_t *vertical_of, const float *packed, const float *bias, float *y, int threads)
{
    const int64_t pixels = s->batch * s->out_height * s->out_width, panels = up(s->out_channels, COLUMNS);
    const int64_t stride_a = s->frequencies * s->block + LANES;
    int64_t size = CACHE_FLOATS / (stride_a + least(s->out_channels, 1024));
    size = size < 2 * ROWS ? 2 * ROWS : size;
    int64_t count = up(up(pixels, size), threads) * threads; /* number of tiles: the same for each thread */
    size = up(up(pixels, count), ROWS) * ROWS;
    count = up(pixels, size);
    /* If there are few pixels, the threads also divide the output channels; each computes the responses itself. */
    const int64_t shares = count >= threads ? 1 : least(panels, up(threads, count));
    const int64_t needed = (s->out_width - 1) * s->stride_x + (s->columns - 1) * s->dilation_x + 1;
    const int64_t floats = size * stride_a + needed * s->verticals * s->block + size * COLUMNS;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *room = NULL;
        if (posix_memalign((void **)&room, 64, floats * sizeof(float)))
            room = NULL;
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < count * shares; job++) {
            const int64_t p0 = job / shares * size, share = job % shares;
            if (!room) {
#pragma omp atomic write
                failed = 1;
                continue;
            }
            float *columns = room + size * stride_a, *edge = columns + needed * s->verticals * s->block;
            work(s, x, vertical, horizontal, vertical_of, packed, bias, y, p0, least(pixels, p0 + size),
                 panels * share / shares, panels * (share + 1) / shares, room, columns, edge);
        }
        free(room);
    }
    return failed;
}

/* Write the responses z (N, H', W', F, C) of x (N, H, W, C), both in bfloat16; the other arguments are as above.
 * Returns 0, or 1 if there is not enough memory. */
int harmconvert_responses(const shape_t *s, const uint16_t *x, const float *vertical, const float *horizontal,
                          const int32_t *vertical_of, uint16_t *z, int threads)
{
    const int64_t needed = (s->out_width - 1) * s->stride_x + (s->columns - 1) * s->dilation_x + 1;
    const int64_t stride_z = s->frequencies * s->channels;
    int64_t block = CACHE_FLOATS / 2 / (needed * s->verticals) / LANES * LANES;
    block = least(s->channels, block < LANES ? LANES : block);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *columns = NULL;
        if (posix_memalign((void **)&columns, 64, needed * s->verticals * block * sizeof(float)))
            columns = NULL;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < s->batch * s->out_height; row++) {
            if (!columns) {
#pragma omp atomic write
                failed = 1;
                continue;
            }
            const int64_t first = row * s->out_width;
            for (int64_t c = 0; c < s->channels; c += block)
                responses(1, s, x, vertical, horizontal, vertical_of, first, first + s->out_width, c,
                          least(block, s->channels - c), columns, z + first * stride_z + c, stride_z, s->channels);
        }
        free(columns);
    }
    return failed;
}

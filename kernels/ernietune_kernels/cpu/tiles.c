#include "tiles.h"

#include <stdlib.h>

#include "convert.h"
#include "vector.h"

#define SIDE 16 /* rows of a tile */
#define DEPTH 32 /* its columns in bf16 */
#define TILE 1024 /* its bytes */

/* With many rows of x, a panel of weights, 64 rows of STEPS tiles, stays in the first cache. Beside it in the second
   stay SLICE tiles of each of GROUP rows of x, which all panels of these columns meet in turn. With few, all is in
   reading the weights once: panels are whole rows, and so few that their pages are known to the processor. */
#define STEPS 8
#define SLICE (4 * STEPS)
#define GROUP 256
#define FEW_BLOCKS 6 /* of sixteen rows of x */

INLINE int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t tiles_bytes(int64_t rows, int64_t width) { return divided_up(rows, SIDE) * divided_up(width, DEPTH) * 2 * TILE; }

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

int tiles_ready(void) {
    return __builtin_cpu_supports("avx512f") && !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} Shapes;

static void all_tiles_full(void) {
    Shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) shapes.row_bytes[i] = 64, shapes.rows[i] = SIDE;
    _tile_loadconfig(&shapes);
}

/* Transpose sixteen vectors of sixteen 32-bit numbers. */
INLINE void transpose(__m512i v[16]) {
    __m512i w[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(w[i + j], w[i + 2 + j]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(w[i + j], w[i + 2 + j]);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512i low = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88), high = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        w[i] = _mm512_shuffle_i32x4(low, high, 0x88);
        w[i + 8] = _mm512_shuffle_i32x4(low, high, 0xdd);
        low = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd), high = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
        w[i + 4] = _mm512_shuffle_i32x4(low, high, 0x88);
        w[i + 12] = _mm512_shuffle_i32x4(low, high, 0xdd);
    }
    memcpy(v, w, sizeof w);
}

typedef struct {
    const float *x;
    int64_t rows, width;
    char *tiles;
} Splitting;

/* 32 numbers as pairs of bf16: the rounded ones, and what the rounding left. */
INLINE void split32(const float *x, int64_t there, __m512i *high, __m512i *low) {
    __mmask32 mask = there >= DEPTH ? ~0u : (1u << there) - 1;
    __m512 a = _mm512_maskz_loadu_ps((__mmask16)mask, x), b = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), x + 16);
    *high = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    __m512 rounded_a = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(*high)), 16));
    __m512 rounded_b = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(*high, 1)), 16));
    *low = (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(b, rounded_b), _mm512_sub_ps(a, rounded_a));
}

/* The tile unit multiplies pairs: a tile of x has a row for each pair of columns and a column for each row of x. */
static void blocks_to_tiles(const void *context, int64_t begin, int64_t end) {
    const Splitting *s = context;
    int64_t steps = divided_up(s->width, DEPTH);
    for (int64_t block = begin; block < end; block++) {
        __m512i *tile = (__m512i *)(s->tiles + block * steps * 2 * TILE);
        int64_t there = s->rows - block * SIDE;
        for (int64_t step = 0; step < steps; step++, tile += 2 * SIDE) {
            __m512i high[SIDE] = {}, low[SIDE] = {};
            for (int64_t r = 0; r < SIDE && r < there; r++)
                split32(s->x + (block * SIDE + r) * s->width + step * DEPTH, s->width - step * DEPTH, high + r, low + r);
            transpose(high), transpose(low);
            memcpy(tile, high, TILE), memcpy(tile + SIDE, low, TILE);
        }
    }
}

void to_tiles(const float *x, int64_t rows, int64_t width, char *tiles) {
    Splitting splitting = {x, rows, width, tiles};
    for_all(blocks_to_tiles, &splitting, divided_up(rows, SIDE), 1);
}

/* Rows `first` to `end` of the weights that come next, which the processor's own look-ahead does not find. */
typedef struct {
    const char *weights;
    int64_t row, step, first, end; /* bytes from a row, and from a tile, to the next */
} Ahead;

/* Four or two tiles of weights times one block of x, `steps` tiles deep, into (or, with `add`, on) as many of sums. */
INLINE void multiply(int four, int add, const char *weights, int64_t row, const char *x, int64_t steps, float *sums,
                     Ahead ahead) {
    __asm__ volatile("" ::: "memory"); /* the loads of tiles do not say what they read */
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (add) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        if (four) _tile_loadd(2, sums + 512, 64);
        if (four) _tile_loadd(3, sums + 768, 64);
    }
    for (int64_t step = 0; step < steps; step++, weights += 64, x += 2 * TILE) {
        for (int64_t r = ahead.first; r < ahead.end; r++)
            __builtin_prefetch(ahead.weights + r * ahead.row + step * ahead.step, 0, 2);
        _tile_loadd(6, x, 64);
        _tile_loadd(7, x + TILE, 64);
        _tile_loadd(4, weights, row);
        _tile_loadd(5, weights + SIDE * row, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(0, 4, 7);
        _tile_dpbf16ps(1, 5, 7);
        if (!four) continue;
        _tile_loadd(4, weights + 2 * SIDE * row, row);
        _tile_loadd(5, weights + 3 * SIDE * row, row);
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 5, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if (four) _tile_stored(2, sums + 512, 64);
    if (four) _tile_stored(3, sums + 768, 64);
}

/* Columns `begin` to `end` of y for `blocks` blocks of x whose rows are `deep` tiles; a panel is `panel` rows of
   `steps` tiles. `sums` has the tiles of each panel and block, `room` one panel. */
typedef struct {
    const Matrix *matrix;
    int64_t begin, end;
    const char *tiles;
    int64_t blocks, deep, panel, steps, slice;
    float *sums;
    uint16_t *room;
} Part;

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static Part part_of(const Matrix *m, int64_t rows) {
    int64_t blocks = divided_up(smaller(rows, GROUP), SIDE), deep = divided_up(m->in, DEPTH);
    Part part = {.matrix = m, .blocks = blocks, .deep = deep};
    int few = blocks <= FEW_BLOCKS;
    part.panel = few ? 2 * SIDE : 4 * SIDE;
    part.slice = few ? deep : SLICE;
    part.steps = !few ? STEPS : m->bits == 16 ? deep : SLICE;
    return part;
}

/* A panel from a row and a tile on, as bf16: where it is stored, or in `room`. */
static const char *panel_of(const Part *p, int64_t row, int64_t tile, int64_t steps, int64_t *row_bytes) {
    const Matrix *m = p->matrix;
    int64_t column = tile * DEPTH, padded = steps * DEPTH, width = smaller(m->in - column, padded);
    int64_t rows = smaller(p->end - row, p->panel);
    if (p->blocks <= FEW_BLOCKS && m->bits == 16 && rows == p->panel && width == padded) {
        *row_bytes = 2 * m->in;
        return (const char *)m->codes + 2 * (row * m->in + column);
    }
    if (rows < p->panel || width < padded) memset(p->room, 0, (size_t)(p->panel * padded) * sizeof *p->room);
    for (int64_t r = 0; r < rows; r++) widen_to_bf16(m, row + r, column, width, p->room + r * padded);
    *row_bytes = 2 * padded;
    return (const char *)p->room;
}

static void add_panel(const Part *p, int64_t row, int64_t tile, int64_t steps, Ahead ahead, float *sums) {
    int64_t row_bytes;
    const char *weights = panel_of(p, row, tile, steps, &row_bytes), *x = p->tiles + tile * 2 * TILE;
    for (int64_t block = 0; block < p->blocks; block++, sums += p->panel * SIDE, x += p->deep * 2 * TILE) {
        ahead.first = p->panel * block / p->blocks, ahead.end = p->panel * (block + 1) / p->blocks;
        int add = tile > 0;
        if (p->panel == 4 * SIDE && add) multiply(1, 1, weights, row_bytes, x, steps, sums, ahead);
        else if (p->panel == 4 * SIDE) multiply(1, 0, weights, row_bytes, x, steps, sums, ahead);
        else multiply(0, add, weights, row_bytes, x, steps, sums, ahead);
    }
}

static void add_all(const Part *p) {
    const Matrix *m = p->matrix;
    Ahead ahead = {.row = m->in * m->bits / 8, .step = DEPTH * m->bits / 8};
    for (int64_t slice = 0; slice < p->deep; slice += p->slice) {
        int64_t end = smaller(slice + p->slice, p->deep);
        float *sums = p->sums;
        for (int64_t row = p->begin; row < p->end; row += p->panel, sums += p->blocks * p->panel * SIDE)
            for (int64_t tile = slice; tile < end; tile += p->steps) {
                int last = tile + p->steps >= end;
                int64_t next_row = last ? row + p->panel : row, next_tile = last ? slice : tile + p->steps;
                ahead.weights = (const char *)m->codes + next_row * ahead.row + next_tile * ahead.step;
                add_panel(p, row, tile, smaller(p->steps, end - tile), ahead, sums);
            }
    }
}

static void tile_to_y(const float *sums, const float *scale, int64_t rows, int64_t columns, float *y, int64_t y_row) {
    __m512i v[SIDE];
    memcpy(v, sums, TILE);
    transpose(v);
    __mmask16 mask = columns >= SIDE ? 0xffff : (__mmask16)((1u << columns) - 1);
    __m512 factor = scale ? _mm512_maskz_loadu_ps(mask, scale) : _mm512_set1_ps(1);
    for (int64_t r = 0; r < SIDE && r < rows; r++)
        _mm512_mask_storeu_ps(y + r * y_row, mask, _mm512_mul_ps(_mm512_castsi512_ps(v[r]), factor));
}

/* Sixteen whole rows of y at a time: its rows are far apart. */
static void sums_to_y(const Part *p, int64_t rows, float *y) {
    const Matrix *m = p->matrix;
    int64_t high = p->panel / SIDE;
    for (int64_t block = 0; block < p->blocks; block++)
        for (int64_t first = p->begin; first < p->end; first += SIDE) {
            int64_t tile = (first - p->begin) / SIDE;
            const float *sums = p->sums + ((tile / high * p->blocks + block) * high + tile % high) * SIDE * SIDE;
            const float *scale = m->bits == 8 ? m->scale + first : NULL;
            tile_to_y(sums, scale, rows - block * SIDE, p->end - first, y + block * SIDE * m->out + first, m->out);
        }
}

static void all_groups(Part *part, const char *tiles, int64_t rows, float *y) {
    for (int64_t done = 0; done < rows; done += GROUP) {
        part->tiles = tiles + done / SIDE * part->deep * 2 * TILE;
        part->blocks = divided_up(smaller(rows - done, GROUP), SIDE);
        add_all(part);
        sums_to_y(part, rows - done, y + done * part->matrix->out);
    }
}

int tiled_columns(const Matrix *m, int64_t begin, int64_t end, const char *tiles, int64_t rows, float *y) {
    Part part = part_of(m, rows);
    int64_t columns = divided_up(smaller(end - begin, COLUMNS), part.panel) * part.panel;
    int64_t sums = columns * part.blocks * SIDE * (int64_t)sizeof(float);
    char *own = aligned_alloc(64, (size_t)(sums + part.panel * part.steps * DEPTH * 2));
    if (!own) return -1;
    part.sums = (float *)own, part.room = (uint16_t *)(own + sums);
    Shapes others;
    _tile_storeconfig(&others);
    all_tiles_full();
    for (; begin < end; begin += COLUMNS) {
        part.begin = begin, part.end = smaller(begin + COLUMNS, end);
        all_groups(&part, tiles, rows, y);
    }
    _tile_loadconfig(&others); /* oneDNN remembers what it has set in a thread */
    free(own);
    return 0;
}
#else
int tiles_ready(void) { return 0; }
void to_tiles(const float *x, int64_t rows, int64_t width, char *tiles) { (void)x, (void)rows, (void)width, (void)tiles; }
int tiled_columns(const Matrix *m, int64_t begin, int64_t end, const char *tiles, int64_t rows, float *y) {
    (void)m, (void)begin, (void)end, (void)tiles, (void)rows, (void)y;
    return -1;
}
#endif

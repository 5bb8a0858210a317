/* Limits of the machine. Memory: read, non-temporal write, copy; any length and alignment; each
 * returns after its stores are done. Arithmetic: tiles. Compiled by limits.py with -O3
 * -march=native. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
typedef __m512i vec;
#define LOAD(p) _mm512_loadu_si512((const void *)(p))
#define OR(a, b) _mm512_or_si512(a, b)
#define STREAM(p, v) _mm512_stream_si512((__m512i *)(p), v)
#define FILL(b) _mm512_set1_epi8((char)(b))
#elif defined(__AVX2__)
typedef __m256i vec;
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define OR(a, b) _mm256_or_si256(a, b)
#define STREAM(p, v) _mm256_stream_si256((__m256i *)(p), v)
#define FILL(b) _mm256_set1_epi8((char)(b))
#elif defined(__SSE2__)
typedef __m128i vec;
#define LOAD(p) _mm_loadu_si128((const __m128i *)(p))
#define OR(a, b) _mm_or_si128(a, b)
#define STREAM(p, v) _mm_stream_si128((__m128i *)(p), v)
#define FILL(b) _mm_set1_epi8((char)(b))
#else /* another processor: normal stores, as non_temporal() says */
typedef unsigned char vec __attribute__((vector_size(16), aligned(1), may_alias));
#define LOAD(p) (*(const vec *)(p))
#define OR(a, b) ((a) | (b))
#define STREAM(p, v) (*(vec *)(p) = (v))
#define FILL(b) ((vec){0} + (unsigned char)(b))
#endif

#define WIDTH sizeof(vec)
#define LINE 64

static void fence(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

int non_temporal(void) {
#if defined(__SSE2__)
    return 1;
#else
    return 0;
#endif
}

/* The OR of all bytes, so that no load can be left out; `ahead` bytes are prefetched (0: none). */
unsigned read_bytes(const uint8_t *from, size_t bytes, size_t ahead) {
    vec sums[8];
    for (int k = 0; k < 8; k++) sums[k] = FILL(0);
    size_t i = 0;
    if (ahead) {
        for (; i + ahead + 8 * WIDTH <= bytes; i += 8 * WIDTH) {
            for (size_t line = 0; line < 8 * WIDTH; line += LINE)
                __builtin_prefetch(from + i + ahead + line, 0, 3);
            for (int k = 0; k < 8; k++) sums[k] = OR(sums[k], LOAD(from + i + k * WIDTH));
        }
    }
    for (; i + 8 * WIDTH <= bytes; i += 8 * WIDTH)
        for (int k = 0; k < 8; k++) sums[k] = OR(sums[k], LOAD(from + i + k * WIDTH));
    unsigned found = 0;
    for (; i < bytes; i++) found |= from[i];
    uint8_t out[WIDTH];
    for (int k = 0; k < 8; k++) {
        memcpy(out, &sums[k], WIDTH);
        for (size_t j = 0; j < WIDTH; j++) found |= out[j];
    }
    return found;
}

static size_t head_bytes(const uint8_t *to, size_t bytes) {
    size_t head = (LINE - (uintptr_t)to % LINE) % LINE;
    return head < bytes ? head : bytes;
}

/* Fills memory past the caches. */
void write_bytes(uint8_t *to, size_t bytes, int value) {
    size_t i = head_bytes(to, bytes);
    memset(to, value, i);
    vec v = FILL(value);
    for (; i + LINE <= bytes; i += LINE)
        for (size_t j = 0; j < LINE; j += WIDTH) STREAM(to + i + j, v);
    memset(to + i, value, bytes - i);
    fence();
}

/* Copies past the caches. */
void copy_bytes(uint8_t *to, const uint8_t *from, size_t bytes) {
    size_t i = head_bytes(to, bytes);
    memcpy(to, from, i);
    for (; i + LINE <= bytes; i += LINE)
        for (size_t j = 0; j < LINE; j += WIDTH) STREAM(to + i + j, LOAD(from + i + j));
    memcpy(to + i, from + i, bytes - i);
    fence();
}

/* Reads bytes and writes `times` as many past the caches, line by line. */
void expand_bytes(uint8_t *to, const uint8_t *from, size_t bytes, size_t times) {
    for (size_t i = 0; i + LINE <= bytes; i += LINE)
        for (size_t copy = 0; copy < times; copy++)
            for (size_t j = 0; j < LINE; j += WIDTH)
                STREAM(to + i * times + copy * LINE + j, LOAD(from + i + j));
    fence();
}

/* The tile instructions of AMX: products of 32x32 by 32x32 bfloat16, sums in registers, operands in
 * the first cache. */
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

int has_tiles(void) {
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
}

void multiply_tiles(size_t products) {
    static const struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    enum { PAIR = 2048, ROOM = 4 * PAIR };
    static const uint8_t left[ROOM] __attribute__((aligned(64)));
    static const uint8_t right[ROOM] __attribute__((aligned(64)));
    const size_t row = LINE;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
    for (size_t i = 0, at = 0; i < products; i++, at = (at + PAIR) % ROOM) {
        __asm__ volatile(
            "tileloadd (%0,%2), %%tmm4\n tileloadd (%1,%2), %%tmm6\n"
            "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n tileloadd 1024(%1,%2), %%tmm7\n"
            "tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n tileloadd 1024(%0,%2), %%tmm5\n"
            "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n tdpbf16ps %%tmm7, %%tmm5, %%tmm3"
            :: "r"(left + at), "r"(right + at), "r"(row) : "memory");
    }
    __asm__ volatile("tilerelease");
}
#else
int has_tiles(void) { return 0; }

void multiply_tiles(size_t products) { (void)products; }
#endif

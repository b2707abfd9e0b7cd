/* Pages whose whole content follows from one number, their key. Key 0 is a page of zeroes. */
#ifndef WORKLOAD_PAGES_H
#define WORKLOAD_PAGES_H

#include "common.h"

enum { PAGE_BYTES = 4096, PAGE_WORDS = PAGE_BYTES / 8, MARKED_KEYS = 16 };

static inline uint64_t page_marker_word(unsigned word)
{
    uint64_t value = 0;
    for (unsigned byte = 0; byte < 8; byte++)
        value |= (uint64_t)(unsigned char)((word * 8 + byte) * 37 + 11) << (8 * byte);
    return value;
}

/* Word 0 is the key, so that a stale page tells its age. One key of 16 has the marker behind it. */
static inline uint64_t page_word(uint64_t key, uint64_t seed, unsigned index)
{
    if (index == 0)
        return key;
    if ((index == 2 || index == 3) && seed % MARKED_KEYS == 0)
        return page_marker_word(index - 2);
    return seed + index * 0x9e3779b97f4a7c15u;
}

static inline void page_fill(void *page, uint64_t key)
{
    uint64_t *words = page, seed = wl_mix(key);
    for (unsigned i = 0; i < PAGE_WORDS; i++)
        words[i] = key == 0 ? 0 : seed + i * 0x9e3779b97f4a7c15u;
    if (key == 0)
        return;
    words[0] = key;
    words[2] = page_word(key, seed, 2);
    words[3] = page_word(key, seed, 3);
}

/* Return the first word that is wrong, or -1. Only the first `bytes` are the key's, the rest is zeroes. */
static inline int page_wrong_within(const void *page, uint64_t key, unsigned bytes)
{
    const uint64_t *words = page;
    uint64_t seed = wl_mix(key);
    for (unsigned i = 0; i < PAGE_WORDS; i++)
        if (words[i] != (key == 0 || i * 8 >= bytes ? 0 : page_word(key, seed, i)))
            return (int)i;
    return -1;
}

static inline int page_wrong(const void *page, uint64_t key)
{
    const uint64_t *words = page;
    uint64_t seed = wl_mix(key), difference = 0;
    uint64_t first = key == 0 ? 0 : seed, step = key == 0 ? 0 : 0x9e3779b97f4a7c15u;
    for (unsigned i = 4; i < PAGE_WORDS; i++)
        difference |= words[i] ^ (first + i * step);
    for (unsigned i = 0; i < 4; i++)
        difference |= words[i] ^ (key == 0 ? 0 : page_word(key, seed, i));
    return difference == 0 ? -1 : page_wrong_within(page, key, PAGE_BYTES);
}

#define CHECK_PAGE(page, key, ...) \
    do { \
        int wrong_ = page_wrong(page, key); \
        if (wrong_ >= 0) \
            page_is_bad(page, key, wrong_, __VA_ARGS__); \
    } while (0)

/* What the page is, and whose it would be if its first word is right. */
_Noreturn void page_is_bad(const void *page, uint64_t key, int word, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* A cheap random number for each call. */
static inline uint64_t dice(uint64_t *state)
{
    return wl_mix((*state)++);
}

static inline uint64_t below(uint64_t *state, uint64_t limit)
{
    return (uint64_t)(((unsigned __int128)dice(state) * limit) >> 64);
}

#endif

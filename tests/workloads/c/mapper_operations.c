/* One operation after the other on random regions, each followed by looks and writes at random. */
#define _GNU_SOURCE
#include "mapper.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { TOUCHES = 4, BIG_PAGES = 1024, STACK_DEPTH = 200, SMALL_PAGES = 64 };

static bool one_in(unsigned n)
{
    return below(&randomness, n) == 0;
}

static struct region *some_place(bool used)
{
    size_t first = below(&randomness, PLACES);
    for (size_t i = 0; i < PLACES; i++) {
        struct region *region = &regions[(first + i) % PLACES];
        if ((region->kind != NOTHING) == used)
            return region;
    }
    return NULL;
}

static void touch(struct region *region, size_t first, size_t pages, unsigned times)
{
    while (pages != 0 && times-- > 0) {
        check(region, first + below(&randomness, pages));
        change(region, first + below(&randomness, pages));
    }
}

/* A part of a region, at least 4 MiB now and then. */
static size_t some_part(const struct region *region, size_t *first)
{
    size_t most = region->pages, least = one_in(4) && most >= BIG_PAGES ? BIG_PAGES : 1;
    size_t pages =
        least + below(&randomness, (least == 1 && most > SMALL_PAGES ? SMALL_PAGES : most) - least + 1);
    *first = below(&randomness, most - pages + 1);
    return pages;
}

static void unmap(struct region *region)
{
    reserve(region->start, region->pages);
    forget(region, 0, region->most);
    if (region->kind == MEMFD)
        CHECK(close(region->fd) == 0, "close: %s", strerror(errno));
    region->kind = NOTHING;
    region->pages = 0;
}

static void map(size_t limit_pages)
{
    struct region *region = some_place(false);
    size_t used = pages_in_use(), most = one_in(2) ? SMALL_PAGES : place_pages;
    size_t pages = 1 + below(&randomness, most);
    if (region == NULL || used + pages > limit_pages)
        return;
    region->kind = PRIVATE + below(&randomness, SHARED - PRIVATE + 1);
    region->offset = below(&randomness, place_pages);
    if (region->kind == MEMFD) {
        region->fd = memfd_create("mapper", MFD_CLOEXEC);
        CHECK(region->fd >= 0, "memfd_create: %s", strerror(errno));
        CHECK(ftruncate(region->fd, (off_t)(place_pages * PAGE_BYTES)) == 0, "ftruncate: %s",
              strerror(errno));
    }
    /* Shared memory has the size it was mapped with; more than is mapped now is there to grow into. */
    region->pages = region->kind == SHARED ? place_pages : pages;
    map_at(region, 0, region->pages, MAP_FIXED);
    if (region->kind == SHARED)
        reserve(region->start + pages * PAGE_BYTES, place_pages - pages);
    region->pages = pages;
    for (size_t page = 0; page < pages; page += 1 + below(&randomness, 4))
        change(region, page);
}

static bool is_private(const struct region *region)
{
    return region->kind == PRIVATE || region->kind == HUGE || region->kind == FILE_PRIVATE;
}

static void unmap_and_map(struct region *region)
{
    size_t first, pages = some_part(region, &first);
    if (region->kind == SHARED)
        return; /* Nothing leads back to it. */
    CHECK(munmap(address_of(region, first), pages * PAGE_BYTES) == 0, "munmap: %s", strerror(errno));
    map_at(region, first, pages, MAP_FIXED_NOREPLACE);
    if (is_private(region))
        forget(region, first, pages);
    touch(region, first, pages, TOUCHES);
}

/* False: the region was left as it is, because its parts have become strangers to each other. */
static bool remap(struct region *region, size_t pages, int flags, unsigned char *where)
{
    protect(region, 0, region->pages, PROT_READ | PROT_WRITE);
    void *got = mremap(region->start, region->pages * PAGE_BYTES, pages * PAGE_BYTES, flags, where);
    CHECK(got == where || (got == MAP_FAILED && errno == EFAULT),
          "mremap of %p with flags %d to %p gave %p: %s", (void *)region->start, flags, (void *)where, got,
          strerror(errno));
    return got == where;
}

static void grow(struct region *region, size_t limit_pages)
{
    size_t old = region->pages, room = place_pages - old, used = pages_in_use();
    if (room == 0 || used >= limit_pages)
        return;
    room = room < limit_pages - used ? room : limit_pages - used;
    size_t more = 1 + below(&randomness, room < BIG_PAGES ? room : BIG_PAGES);
    unsigned char *end = region->start + old * PAGE_BYTES;
    CHECK(munmap(end, more * PAGE_BYTES) == 0, "munmap: %s", strerror(errno));
    if (!remap(region, old + more, 0, region->start)) {
        reserve(end, more);
        return;
    }
    region->pages = old + more;
    memset(region->access + old, PROT_READ | PROT_WRITE, more);
    touch(region, old, more, TOUCHES);
}

static void shrink(struct region *region)
{
    if (region->pages == 1)
        return;
    size_t pages = 1 + below(&randomness, region->pages - 1), gone = region->pages - pages;
    if (!remap(region, pages, 0, region->start))
        return;
    reserve(region->start + pages * PAGE_BYTES, gone);
    /* What is shared lives on behind the end of the mapping. */
    if (is_private(region))
        forget(region, pages, gone);
    region->pages = pages;
}

static void move(struct region *region, struct region *to, bool leave_old)
{
    if (to == NULL || to == region)
        return;
    bool moved = remap(region, region->pages,
                       MREMAP_MAYMOVE | MREMAP_FIXED | (leave_old ? MREMAP_DONTUNMAP : 0), to->start);
    if (!moved) {
        /* An older kernel unmaps there before it looks here. Since Linux 6.17 a range of several mappings
           moves one by one, and stops where one is under userfaultfd(2): some may have gone over. */
        if (to->kind != NOTHING)
            unmap(to);
        reserve(to->start, place_pages);
        unmap(region);
        reserve(region->start, place_pages);
        return;
    }
    if (to->kind != NOTHING) {
        size_t tail = to->pages > region->pages ? to->pages - region->pages : 0;
        reserve(to->start + region->pages * PAGE_BYTES, tail);
        if (to->kind == MEMFD)
            CHECK(close(to->fd) == 0, "close: %s", strerror(errno));
        forget(to, 0, to->most);
    }
    struct region old = *region, gone = *to;
    *to = old;
    to->start = gone.start;
    region->keys = gone.keys;
    region->access = gone.access;
    region->sum = gone.sum;
    if (leave_old) {
        /* The old range is still mapped, and as new. */
        memset(region->access, PROT_READ | PROT_WRITE, region->pages);
        touch(region, 0, region->pages, TOUCHES);
    } else {
        reserve(region->start, region->pages);
        region->kind = NOTHING;
        region->pages = 0;
    }
    touch(to, 0, to->pages, TOUCHES);
}

static void protect_part(struct region *region)
{
    static const int accesses[] = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE};
    size_t first, pages = some_part(region, &first);
    protect(region, first, pages, accesses[below(&randomness, 4)]);
    touch(region, first, pages, TOUCHES);
}

static void drop(struct region *region)
{
    size_t first, pages = some_part(region, &first);
    bool remove = !is_private(region) && one_in(2);
    int advice = remove ? MADV_REMOVE : MADV_DONTNEED;
    CHECK(madvise(address_of(region, first), pages * PAGE_BYTES, advice) == 0, "madvise %d: %s", advice,
          strerror(errno));
    if (remove || is_private(region))
        forget(region, first, pages);
    touch(region, first, pages, TOUCHES);
}

static void move_the_break(void)
{
    struct region *heap = &regions[HEAP_AT];
    CHECK(sbrk(0) == heap->start + heap->pages * PAGE_BYTES, "the break moved to %p", sbrk(0));
    size_t pages = below(&randomness, heap->most + 1), old = heap->pages;
    CHECK(brk(heap->start + pages * PAGE_BYTES) == 0, "brk: %s", strerror(errno));
    heap->pages = pages;
    if (pages < old)
        forget(heap, pages, old - pages);
    else
        touch(heap, old, pages - old, TOUCHES);
}

static void grow_down(void)
{
    struct region *region = &regions[GROWING_AT];
    if (one_in(8)) {
        size_t gone = region->pages - GROWN_AT_LEAST;
        forget(region, GROWN_AT_LEAST, gone);
        CHECK(gone == 0 || munmap(address_of(region, region->pages - 1), gone * PAGE_BYTES) == 0, "munmap");
        region->pages = GROWN_AT_LEAST;
    }
    for (size_t i = 0; i < SMALL_PAGES && region->pages < GROWN_LIMIT; i++)
        change(region, region->pages++);
}

static uint64_t __attribute__((noinline)) descend(unsigned depth)
{
    volatile uint64_t frame[PAGE_WORDS];
    uint64_t seed = wl_mix(depth);
    for (unsigned i = 0; i < PAGE_WORDS; i += 32)
        frame[i] = seed + i;
    uint64_t deeper = depth == 0 ? 0 : descend(depth - 1);
    for (unsigned i = 0; i < PAGE_WORDS; i += 32)
        CHECK(frame[i] == seed + i, "the stack changed at depth %u", depth);
    return deeper + 1;
}

static void recurse(void)
{
    unsigned depth = (unsigned)below(&randomness, STACK_DEPTH);
    CHECK(descend(depth) == depth + 1, "recursion went wrong");
}

static void operate_on(struct region *region, unsigned which, size_t limit_pages)
{
    static const char *const names[] = {"unmap and map",  "grow",    "shrink", "move",  "move over another",
                                        "move and leave", "protect", "drop",   "unmap", "map"};
    last_operation = names[which];
    switch (which) {
    case 0: unmap_and_map(region); break;
    case 1: grow(region, limit_pages); break;
    case 2: shrink(region); break;
    case 3: move(region, some_place(false), false); break;
    case 4: move(region, some_place(true), false); break;
    case 5:
        if (is_private(region) && pages_in_use() + region->pages <= limit_pages)
            move(region, some_place(false), true);
        break;
    case 6: protect_part(region); break;
    case 7: drop(region); break;
    case 8: unmap(region); break;
    default: map(limit_pages); break;
    }
}

void operate(size_t limit_pages)
{
    /* More is mapped than unmapped. */
    static const unsigned often[] = {0, 0, 1, 1, 2, 3, 3, 4, 5,  6,  6,  6,
                                     7, 7, 7, 7, 8, 9, 9, 9, 10, 11, 11, 12};
    unsigned which = often[below(&randomness, sizeof often / sizeof *often)];
    struct region *region = some_place(true);
    if (which == 10)
        move_the_break();
    else if (which == 11)
        grow_down();
    else if (which == 12)
        recurse();
    else
        operate_on(region, region == NULL ? 9 : which, limit_pages);
    for (unsigned i = 0; i < TOUCHES; i++) {
        struct region *other = &regions[below(&randomness, REGIONS)];
        touch(other, 0, other->pages, TOUCHES);
        if (one_in(64))
            audit(other);
    }
}

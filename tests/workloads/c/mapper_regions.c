/* Regions of every kind, and what each of their pages must hold. */
#define _GNU_SOURCE
#include "mapper.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct region regions[REGIONS];
uint64_t randomness;
size_t place_pages;
const char *last_operation = "none";

static const char *const kind_names[] = {"nothing", "private", "huge", "private file",
                                         "memfd",   "shared",  "heap", "growing"};
static uint64_t last_key;
static int data_fd;

static uint64_t key_of_file(size_t page)
{
    return 1ull << 60 | page;
}

static uint64_t key_of_page(const struct region *region, size_t page)
{
    if (region->keys[page] == 0 && region->kind == FILE_PRIVATE)
        return key_of_file(region->offset + page);
    return region->keys[page];
}

unsigned char *address_of(const struct region *region, size_t page)
{
    if (region->kind == GROWS_DOWN)
        return region->start - page * PAGE_BYTES;
    return region->start + page * PAGE_BYTES;
}

static uint64_t term(size_t page, uint64_t key)
{
    return key == 0 ? 0 : wl_mix(key + ((uint64_t)page << 32));
}

void set_key(struct region *region, size_t page, uint64_t key)
{
    region->sum += term(page, key) - term(page, region->keys[page]);
    region->keys[page] = key;
}

void audit(const struct region *region)
{
    uint64_t sum = 0;
    for (size_t page = 0; page < region->most; page++)
        sum += term(page, region->keys[page]);
    CHECK(sum == region->sum, "the keys of place %d do not have their sum", (int)(region - regions));
}

void forget(struct region *region, size_t first, size_t pages)
{
    for (size_t page = first; page < first + pages; page++)
        set_key(region, page, 0);
}

void check(const struct region *region, size_t page)
{
    unsigned char *at = address_of(region, page);
    if (region->access[page] != PROT_NONE)
        CHECK_PAGE(at, key_of_page(region, page), "%s at place %d page %zu (%p) after %s",
                   kind_names[region->kind], (int)(region - regions), page, (void *)at, last_operation);
    else if (page % 8 == 0)
        CHECK(wl_faults(at, false), "%s: PROT_NONE page %zu can be read", kind_names[region->kind], page);
}

void change(struct region *region, size_t page)
{
    unsigned char *at = address_of(region, page);
    check(region, page);
    if (region->access[page] == (PROT_READ | PROT_WRITE)) {
        set_key(region, page, ++last_key);
        page_fill(at, last_key);
    } else if (page % 8 == 0)
        CHECK(wl_faults(at, true), "%s: PROT_READ page %zu can be written", kind_names[region->kind], page);
}

void check_all(void)
{
    for (struct region *region = regions; region < regions + REGIONS; region++) {
        audit(region);
        for (size_t page = 0; page < region->pages; page++)
            check(region, page);
    }
}

size_t pages_in_use(void)
{
    size_t sum = 0;
    for (unsigned i = 0; i < PLACES; i++)
        sum += regions[i].pages;
    return sum;
}

void reserve(unsigned char *start, size_t pages)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    if (pages != 0)
        CHECK(mmap(start, pages * PAGE_BYTES, PROT_NONE, flags, -1, 0) == start, "reserve: %s",
              strerror(errno));
}

void protect(struct region *region, size_t first, size_t pages, int access)
{
    CHECK(mprotect(address_of(region, first), pages * PAGE_BYTES, access) == 0, "mprotect: %s",
          strerror(errno));
    memset(region->access + first, access, pages);
}

void map_at(struct region *region, size_t first, size_t pages, int how)
{
    int flags = how, fd = -1;
    size_t offset = 0;
    if (region->kind == FILE_PRIVATE) {
        flags |= MAP_PRIVATE;
        fd = data_fd;
        offset = region->offset + first;
    } else if (region->kind == MEMFD) {
        flags |= MAP_SHARED;
        fd = region->fd;
        offset = first;
    } else
        flags |= MAP_ANONYMOUS | (region->kind == SHARED ? MAP_SHARED : MAP_PRIVATE);
    unsigned char *at = address_of(region, first);
    unsigned char *got =
        mmap(at, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, flags, fd, (off_t)(offset * PAGE_BYTES));
    CHECK(got == at, "mmap of %s at %p gave %p: %s", kind_names[region->kind], (void *)at, (void *)got,
          strerror(errno));
    if (region->kind == HUGE)
        (void)madvise(at, pages * PAGE_BYTES, MADV_HUGEPAGE); /* EINVAL: this kernel has none. */
    memset(region->access + first, PROT_READ | PROT_WRITE, pages);
}

static void make_file(size_t pages)
{
    uint64_t content[PAGE_WORDS];
    data_fd = open("mapped.data", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    CHECK(data_fd >= 0, "open: %s", strerror(errno));
    for (size_t page = 0; page < pages; page++) {
        page_fill(content, key_of_file(page));
        CHECK(write(data_fd, content, PAGE_BYTES) == PAGE_BYTES, "write: %s", strerror(errno));
    }
}

static void *shadow(size_t bytes)
{
    void *where = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(where != MAP_FAILED, "mmap: %s", strerror(errno));
    return where;
}

static void make_growing(struct region *region)
{
    /* All room below is within the gap that the kernel keeps under a stack: nobody else is put there. */
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED;
    size_t room = GROWN_LIMIT + GROWN_AT_LEAST;
    unsigned char *space = shadow((room + GROWN_LIMIT) * PAGE_BYTES), *top = space + room * PAGE_BYTES;
    size_t bytes = GROWN_AT_LEAST * PAGE_BYTES;
    reserve(space, room + GROWN_LIMIT);
    CHECK(munmap(space + PAGE_BYTES, (room - 1) * PAGE_BYTES) == 0, "munmap: %s", strerror(errno));
    CHECK(mmap(top - bytes, bytes, PROT_READ | PROT_WRITE, flags, -1, 0) == top - bytes, "mmap: %s",
          strerror(errno));
    *region = (struct region){
        .kind = GROWS_DOWN, .start = top - PAGE_BYTES, .pages = GROWN_AT_LEAST, .most = GROWN_LIMIT};
}

void regions_make(size_t room)
{
    const size_t align = 2 << 20;
    place_pages = room;
    make_file(2 * place_pages);
    unsigned char *space = shadow(PLACES * place_pages * PAGE_BYTES + align);
    space += -(uintptr_t)space & (align - 1);
    reserve(space, PLACES * place_pages);
    for (unsigned i = 0; i < PLACES; i++)
        regions[i] =
            (struct region){.start = space + i * place_pages * PAGE_BYTES, .most = place_pages, .fd = -1};
    make_growing(&regions[GROWING_AT]);
    regions[HEAP_AT] = (struct region){.kind = HEAP, .most = HEAP_PAGES};
    for (struct region *region = regions; region < regions + REGIONS; region++) {
        region->keys = shadow(region->most * sizeof *region->keys);
        region->access = shadow(region->most);
        memset(region->access, PROT_READ | PROT_WRITE, region->most);
    }
    /* From here on nothing calls malloc, which would move the break too. */
    uintptr_t end = (uintptr_t)sbrk(0);
    CHECK(sbrk((intptr_t)(-end & (PAGE_BYTES - 1))) != (void *)-1, "sbrk: %s", strerror(errno));
    regions[HEAP_AT].start = sbrk(0);
}

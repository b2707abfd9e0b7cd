/* Regions of known content, file mappings with private pages among shared ones, a huge and sparse one. */
#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { COW_BYTES = 2 << 20, SPARSE_TOUCHED = 64, RESIDENT_LIMIT_KB = 600 * 1024 };
#define SPARSE_BYTES (8ull << 30)

static struct region regions[MOST_REGIONS];
static unsigned region_count;
static unsigned char *cow, *sparse;
static unsigned char cow_written[COW_BYTES / PAGE];

static uint64_t word(const struct region *region, size_t page, unsigned index)
{
    uint64_t age = region->age[page];
    return wl_mix(((uint64_t)region->number << 56) ^ ((uint64_t)page << 24) ^ (age << 9) ^ index);
}

static void write_page(struct region *region, size_t page)
{
    uint64_t *words = (uint64_t *)(region->start + page * PAGE);
    for (unsigned i = 0; i < PAGE / 8; i++)
        words[i] = word(region, page, i);
    if (page == 0)
        wl_marker(region->start);
}

static void verify_page(const struct region *region, size_t page)
{
    const uint64_t *words = (const uint64_t *)(region->start + page * PAGE);
    for (unsigned i = page == 0 ? WL_MARKER_BYTES / 8 : 0; i < PAGE / 8; i++)
        CHECK(words[i] == word(region, page, i), "%s: page %zu word %u is %" PRIx64 " at age %u", region->name, page, i,
              words[i], region->age[page]);
}

struct region *region_make(const char *name, void *where, size_t length, int protection, int flags, int fd)
{
    CHECK(region_count < MOST_REGIONS, "too many regions");
    struct region *region = &regions[region_count++];
    *region = (struct region){.name = name, .length = length, .number = region_count};
    region->start = mmap(where, length, protection, flags, fd, 0);
    CHECK(region->start != MAP_FAILED, "mmap %s: %s", name, strerror(errno));
    region->age = calloc(length / PAGE, sizeof *region->age);
    CHECK(region->age != NULL, "out of memory");
    for (size_t page = 0; page < length / PAGE; page++)
        write_page(region, page);
    return region;
}

void region_verify(const struct region *region)
{
    for (size_t page = 0; page < region->length / PAGE; page++)
        verify_page(region, page);
}

void regions_step(uint64_t round)
{
    for (unsigned r = 0; r < region_count; r++) {
        struct region *region = &regions[r];
        size_t pages = region->length / PAGE;
        if (region->hidden)
            continue;
        for (unsigned i = 0; i < PAGES_PER_STEP; i++) {
            size_t page = (round * PAGES_PER_STEP + i) % pages;
            verify_page(region, page);
            if (region->constant)
                continue;
            region->age[page]++;
            write_page(region, page);
        }
        if (region->constant)
            CHECK(wl_faults(region->start, true), "%s: can be written", region->name);
    }
}

void regions_verify(void)
{
    for (unsigned r = 0; r < region_count; r++)
        if (!regions[r].hidden)
            region_verify(&regions[r]);
}

void file_fill(int fd, size_t length)
{
    uint64_t page[PAGE / 8];
    for (size_t at = 0; at < length; at += PAGE) {
        for (unsigned i = 0; i < PAGE / 8; i++)
            page[i] = wl_mix(at + i);
        CHECK(write(fd, page, PAGE) == PAGE, "write: %s", strerror(errno));
    }
}

void file_matches(int fd, const char *region_name, uint64_t round)
{
    unsigned char page[PAGE];
    for (unsigned r = 0; r < region_count; r++) {
        if (strcmp(regions[r].name, region_name) != 0)
            continue;
        size_t at = round % (regions[r].length / PAGE) * PAGE;
        CHECK(pread(fd, page, PAGE, (off_t)at) == PAGE, "%s: pread: %s", region_name, strerror(errno));
        CHECK(memcmp(page, regions[r].start + at, PAGE) == 0, "%s: file and mapping differ at %zu", region_name, at);
    }
}

void cow_start(int fd)
{
    cow = mmap(NULL, COW_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    CHECK(cow != MAP_FAILED, "mmap private file: %s", strerror(errno));
}

void cow_step(int fd, uint64_t round)
{
    /* A third of the pages becomes private, one a round; the others must go on showing the file. */
    size_t mine = round * 3 % (COW_BYTES / PAGE);
    for (size_t page = 0; page < COW_BYTES / PAGE; page++) {
        uint64_t wanted = wl_mix(page * PAGE + 7) ^ (cow_written[page] ? ~0ull : 0);
        uint64_t found = ((uint64_t *)(cow + page * PAGE))[7];
        CHECK(found == wanted, "private file page %zu (written: %d) is %" PRIx64, page, cow_written[page], found);
    }
    if (mine % 3 == 0 && !cow_written[mine]) {
        ((uint64_t *)(cow + mine * PAGE))[7] ^= ~0ull;
        cow_written[mine] = 1;
    }
    uint64_t on_disk;
    CHECK(pread(fd, &on_disk, sizeof on_disk, (off_t)(mine * PAGE + 56)) == sizeof on_disk, "pread");
    CHECK(on_disk == wl_mix(mine * PAGE + 7), "a private page reached the file");
}

static size_t sparse_offset(unsigned i)
{
    return (size_t)(wl_mix(i) % (SPARSE_BYTES / PAGE / SPARSE_TOUCHED) + i * (SPARSE_BYTES / PAGE / SPARSE_TOUCHED)) * PAGE;
}

void sparse_start(void)
{
    sparse = mmap(NULL, SPARSE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(sparse != MAP_FAILED, "mmap sparse: %s", strerror(errno));
    CHECK(madvise(sparse, SPARSE_BYTES, MADV_NOHUGEPAGE) == 0 || errno == EINVAL, "madvise: %s", strerror(errno));
    for (unsigned i = 0; i < SPARSE_TOUCHED; i++)
        *(uint64_t *)(sparse + sparse_offset(i)) = wl_mix(i + 1);
}

static long resident_kb(void)
{
    long pages = 0;
    char text[128] = "";
    int statm = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
    CHECK(statm >= 0 && read(statm, text, sizeof text - 1) > 0, "/proc/self/statm: %s", strerror(errno));
    CHECK(sscanf(text, "%*d %ld", &pages) == 1, "/proc/self/statm: %s", text);
    close(statm);
    return pages * (PAGE / 1024);
}

void sparse_step(void)
{
    for (unsigned i = 0; i < SPARSE_TOUCHED; i++) {
        size_t at = sparse_offset(i), next = at + PAGE == SPARSE_BYTES ? 0 : at + PAGE;
        CHECK(*(uint64_t *)(sparse + at) == wl_mix(i + 1), "sparse page %u changed", i);
        uint64_t between = *(volatile uint64_t *)(sparse + next);
        CHECK(between == 0 || next == sparse_offset((i + 1) % SPARSE_TOUCHED), "sparse hole %u is not empty", i);
    }
    long resident = resident_kb();
    CHECK(resident < RESIDENT_LIMIT_KB, "%ld KiB resident: holes were filled", resident);
}

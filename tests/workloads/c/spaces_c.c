/* Memory of every kind that is moved in a way of its own: huge pages, shared, in a memfd, locked, reserved and never
   used, used here and there. Pages of all of them are rewritten at random.
   Options: rate, pages written per second (0: as fast as can be); seed; sparse_gib, size of the sparse heap. */
#define _GNU_SOURCE
#include "pages.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SLOTS = 1024, HUGE_BYTES = 2 << 20, CHECKS_FOR_A_WRITE = 2, LOOK_AT_LOCKS_EVERY = 8 };

static const size_t reserved_bytes = (size_t)1 << 40;

enum { HUGE, SHARED, MEMFD, LOCKED, LOCKED_ON_FAULT, SPARSE, KINDS };

static struct space {
    const char *name;
    unsigned char *start;
    size_t stride; /* from one page in use to the next */
    uint32_t *versions;
} spaces[KINDS];
static unsigned char *reserved;

static unsigned char *map(size_t bytes, int protection, int flags, int fd)
{
    void *where = mmap(NULL, bytes, protection, flags, fd, 0);
    CHECK(where != MAP_FAILED, "mmap of %zu: %s", bytes, strerror(errno));
    return where;
}

static void make(unsigned kind, const char *name, size_t bytes, int flags, int fd)
{
    struct space *made = &spaces[kind];
    made->name = name;
    made->start = map(bytes, PROT_READ | PROT_WRITE, flags, fd);
    made->stride = bytes / SLOTS;
    made->versions = calloc(SLOTS, sizeof *made->versions);
    CHECK(made->versions != NULL, "calloc");
}

static void make_all(void)
{
    const int own = MAP_PRIVATE | MAP_ANONYMOUS;
    const size_t dense = (size_t)SLOTS * PAGE_BYTES;
    make(HUGE, "huge pages", dense + HUGE_BYTES, own, -1);
    spaces[HUGE].start += -(uintptr_t)spaces[HUGE].start & (HUGE_BYTES - 1);
    spaces[HUGE].stride = PAGE_BYTES;
    /* A kernel built without has ordinary pages. */
    (void)madvise(spaces[HUGE].start, dense, MADV_HUGEPAGE);
    make(SHARED, "shared anonymous memory", dense, MAP_SHARED | MAP_ANONYMOUS, -1);
    int fd = memfd_create("spaces", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)dense) == 0, "memfd: %s", strerror(errno));
    make(MEMFD, "a memfd", dense, MAP_SHARED, fd);
    make(LOCKED, "locked memory", dense, own, -1);
    CHECK(mlock(spaces[LOCKED].start, dense) == 0, "mlock: %s", strerror(errno));
    make(LOCKED_ON_FAULT, "memory locked on fault", dense * 4, own, -1);
    CHECK(mlock2(spaces[LOCKED_ON_FAULT].start, dense * 4, MLOCK_ONFAULT) == 0, "mlock2: %s", strerror(errno));
    make(SPARSE, "a sparse heap", wl_opt("sparse_gib", 64) << 30, own | MAP_NORESERVE, -1);
    reserved = map(reserved_bytes, PROT_NONE, own | MAP_NORESERVE, -1);
}

static unsigned char *page_of(const struct space *space, size_t slot)
{
    return space->start + slot * space->stride;
}

static uint64_t key_of(const struct space *space, size_t slot)
{
    uint32_t version = space->versions[slot];
    return version == 0 ? 0 : (uint64_t)(space - spaces + 1) << 56 | (uint64_t)slot << 32 | version;
}

static void rewrite(struct space *space, size_t slot)
{
    space->versions[slot]++;
    page_fill(page_of(space, slot), key_of(space, slot));
}

static void check(const struct space *space, size_t slot)
{
    CHECK_PAGE(page_of(space, slot), key_of(space, slot), "page %zu of %s", slot, space->name);
}

/* What was never touched is zeroes, and what cannot be touched stays so. */
static void check_untouched(uint64_t *random)
{
    const struct space *sparse = &spaces[SPARSE];
    const unsigned char *between = page_of(sparse, below(random, SLOTS)) + sparse->stride / 2;
    CHECK_PAGE(between, 0, "untouched memory");
    uint64_t where[] = {0, reserved_bytes - 1, below(random, reserved_bytes)};
    for (unsigned i = 0; i < sizeof where / sizeof *where; i++)
        CHECK(wl_faults(reserved + where[i], false), "reserved memory can be read");
}

static void check_locks(void)
{
    char line[200];
    uint64_t locked_kib = 0, wanted_kib = (uint64_t)SLOTS * PAGE_BYTES * 5 >> 10;
    FILE *status = fopen("/proc/self/status", "re");
    CHECK(status != NULL, "status: %s", strerror(errno));
    while (fgets(line, sizeof line, status) != NULL)
        (void)sscanf(line, "VmLck: %" SCNu64, &locked_kib);
    fclose(status);
    CHECK(locked_kib == wanted_kib, "%" PRIu64 " KiB are locked, not %" PRIu64, locked_kib, wanted_kib);
}

int main(int argc, char **argv)
{
    wl_init(argc, argv);
    wl_faults_catch();
    make_all();
    uint64_t rate = wl_opt("rate", 2000), random = wl_mix(wl_opt("seed", 1)), written = 0, beat = 0;
    int64_t due_ns = 0, interval_ns = rate == 0 ? 0 : 1000000000 / (int64_t)rate;
    while (!wl_beat()) {
        rewrite(&spaces[below(&random, KINDS)], below(&random, SLOTS));
        written++;
        for (unsigned i = 0; i < CHECKS_FOR_A_WRITE; i++)
            check(&spaces[below(&random, KINDS)], below(&random, SLOTS));
        if (beat != wl_alive_count()) {
            beat = wl_alive_count();
            check_untouched(&random);
            if (beat % LOOK_AT_LOCKS_EVERY == 0)
                check_locks();
        }
        wl_pace(&due_ns, interval_ns);
    }
    for (unsigned kind = 0; kind < KINDS; kind++)
        for (size_t slot = 0; slot < SLOTS; slot++)
            check(&spaces[kind], slot);
    check_locks();
    wl_ok("%" PRIu64 " pages written", written);
}

/* A big array whose pages are rewritten at random, and a thread that looks on: for measuring as well.
   Options:
     mib, size of the array; thp=1, of huge pages; shared=1, in a memfd; shared=2, in shared anonymous memory;
     threads, that write; rate, MiB that they write per second in all (0: none; too many: as fast as can be);
     hot_mib, how much is written to (0: all); checks, pages that the verifier reads in one tick;
     tick_us, its pause between two (0: none); gap_ms, a tick so late is noted in the file `gaps`. */
#define _GNU_SOURCE
#include "pages.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { BLOCK_PAGES = 512, MOST_THREADS = 64, WRITES_IN_A_ROW = 16, AUDIT_EVERY = 1024 };

static struct {
    unsigned char *pages;
    _Atomic uint32_t *versions; /* odd while the page is being written; only the block's owner writes */
    uint64_t *sums;             /* of each block's versions */
    size_t count, blocks, hot_blocks;
} array;
static unsigned thread_count;
static int64_t row_interval_ns;
static atomic_bool leave;
static struct {
    _Atomic uint64_t pages;
    char own_cache_line[56];
} written[MOST_THREADS];

static uint64_t key_of(size_t page, uint32_t version)
{
    return (uint64_t)(page + 1) << 32 | version;
}

static uint64_t block_sum(size_t block)
{
    uint64_t sum = 0;
    for (size_t page = block * BLOCK_PAGES; page < (block + 1) * BLOCK_PAGES; page++)
        sum += wl_mix(key_of(page, atomic_load_explicit(&array.versions[page], memory_order_relaxed)));
    return sum;
}

static void audit(size_t block)
{
    CHECK(block_sum(block) == array.sums[block], "the versions of block %zu do not have their sum", block);
}

static void write_page(size_t page)
{
    uint32_t version = atomic_load_explicit(&array.versions[page], memory_order_relaxed);
    atomic_store_explicit(&array.versions[page], version + 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    page_fill(array.pages + page * PAGE_BYTES, key_of(page, version + 2));
    atomic_store_explicit(&array.versions[page], version + 2, memory_order_release);
    array.sums[page / BLOCK_PAGES] += wl_mix(key_of(page, version + 2)) - wl_mix(key_of(page, version));
}

static bool check_page(size_t page)
{
    uint32_t version = atomic_load_explicit(&array.versions[page], memory_order_acquire);
    if (version % 2 != 0)
        return false;
    const unsigned char *content = array.pages + page * PAGE_BYTES;
    int wrong = page_wrong(content, key_of(page, version));
    atomic_thread_fence(memory_order_acquire);
    /* Wrong counts only if nobody wrote meanwhile. */
    if (wrong >= 0 && atomic_load_explicit(&array.versions[page], memory_order_relaxed) == version)
        page_is_bad(content, key_of(page, version), wrong, "page %zu, version %u", page, version);
    return wrong < 0;
}

static void *write_pages(void *argument)
{
    unsigned id = (unsigned)(uintptr_t)argument;
    uint64_t random = wl_mix(id) << 20, rows = 0;
    int64_t due_ns = 0;
    size_t own_hot_blocks = (array.hot_blocks - id + thread_count - 1) / thread_count;
    while (!atomic_load_explicit(&leave, memory_order_relaxed)) {
        for (unsigned i = 0; i < WRITES_IN_A_ROW; i++) {
            size_t block = below(&random, own_hot_blocks) * thread_count + id;
            write_page(block * BLOCK_PAGES + below(&random, BLOCK_PAGES));
        }
        atomic_fetch_add_explicit(&written[id].pages, WRITES_IN_A_ROW, memory_order_relaxed);
        if (++rows % (AUDIT_EVERY / WRITES_IN_A_ROW) == 0)
            audit(below(&random, own_hot_blocks) * thread_count + id);
        wl_pace(&due_ns, row_interval_ns);
    }
    return NULL;
}

static void *fill_pages(void *argument)
{
    for (size_t block = (uintptr_t)argument; block < array.blocks; block += thread_count) {
        array.sums[block] = block_sum(block);
        for (size_t page = block * BLOCK_PAGES; page < (block + 1) * BLOCK_PAGES; page++)
            write_page(page);
    }
    return NULL;
}

static uint64_t all_written(void)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < thread_count; i++)
        sum += written[i].pages;
    return sum;
}

static void *reserve(size_t bytes)
{
    void *where = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(where != MAP_FAILED, "mmap: %s", strerror(errno));
    return where;
}

static void make_array(void)
{
    size_t bytes = wl_opt("mib", 64) << 20;
    uint64_t shared = wl_opt("shared", 0);
    array.count = bytes / PAGE_BYTES;
    array.blocks = array.count / BLOCK_PAGES;
    array.hot_blocks = wl_opt("hot_mib", 0) / 2;
    if (array.hot_blocks == 0 || array.hot_blocks > array.blocks)
        array.hot_blocks = array.blocks;
    CHECK(bytes % (BLOCK_PAGES * PAGE_BYTES) == 0, "mib must be even");
    CHECK(thread_count >= 1 && thread_count <= MOST_THREADS && thread_count <= array.hot_blocks,
          "too many threads");
    int fd = -1, flags = shared == 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED | MAP_ANONYMOUS;
    if (shared == 1) {
        fd = memfd_create("array", MFD_CLOEXEC);
        CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0, "memfd: %s", strerror(errno));
        flags = MAP_SHARED;
    }
    /* Aligned to a huge page whatever the kernel would choose. */
    unsigned char *space =
        mmap(NULL, bytes + (2 << 20), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(space != MAP_FAILED, "mmap: %s", strerror(errno));
    space += -(uintptr_t)space & ((2 << 20) - 1);
    array.pages = mmap(space, bytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0);
    CHECK(array.pages != MAP_FAILED, "mmap: %s", strerror(errno));
    int advice = wl_opt("thp", 0) != 0 ? MADV_HUGEPAGE : MADV_NOHUGEPAGE;
    /* A kernel built without has nothing to turn off. */
    CHECK(madvise(array.pages, bytes, advice) == 0 || advice == MADV_NOHUGEPAGE, "madvise: %s",
          strerror(errno));
    array.versions = reserve(array.count * sizeof *array.versions);
    array.sums = reserve(array.blocks * sizeof *array.sums);
}

static void run_threads(void *(*what)(void *), pthread_t *threads)
{
    for (uintptr_t i = 0; i < thread_count; i++)
        CHECK(pthread_create(&threads[i], NULL, what, (void *)i) == 0, "pthread_create");
}

static void join_threads(const pthread_t *threads)
{
    for (unsigned i = 0; i < thread_count; i++)
        CHECK(pthread_join(threads[i], NULL) == 0, "pthread_join");
}

/* A line at a fixed place, for whoever measures. */
static void show(int fd, uint64_t checked, int64_t longest_ns, int64_t since_ns)
{
    char line[160];
    int length = snprintf(line, sizeof line,
                          "written %016" PRIu64 " checked %016" PRIu64 " longest_gap_ns %016" PRId64
                          " since_ns %020" PRId64 "\n",
                          all_written(), checked, longest_ns, since_ns);
    CHECK(pwrite(fd, line, (size_t)length, 0) == length, "status: pwrite: %s", strerror(errno));
}

static int64_t look_on(uint64_t *checked)
{
    int status = open("status", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    int gaps = open("gaps", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    CHECK(status >= 0 && gaps >= 0, "open: %s", strerror(errno));
    int64_t tick_ns = (int64_t)wl_opt("tick_us", 1000) * 1000, noted_ns = (int64_t)wl_opt("gap_ms", 20) * MS;
    unsigned checks = (unsigned)wl_opt("checks", 4);
    uint64_t random = 1, beat = 0;
    int64_t last_ns = wl_now(CLOCK_REALTIME), longest_ns = 0, since_ns = 0;
    while (!wl_beat()) {
        for (unsigned i = 0; i < checks; i++)
            *checked += check_page(below(&random, array.count));
        int64_t now_ns = wl_now(CLOCK_REALTIME), gap_ns = now_ns - last_ns;
        if (gap_ns > longest_ns) {
            longest_ns = gap_ns;
            since_ns = last_ns;
        }
        if (gap_ns >= noted_ns)
            CHECK(dprintf(gaps, "%" PRId64 " %" PRId64 "\n", last_ns, now_ns) > 0, "gaps: %s",
                  strerror(errno));
        last_ns = now_ns;
        if (beat != wl_alive_count())
            show(status, *checked, longest_ns, since_ns);
        beat = wl_alive_count();
        if (tick_ns != 0)
            wl_nap(tick_ns);
    }
    return longest_ns;
}

int main(int argc, char **argv)
{
    pthread_t threads[MOST_THREADS];
    wl_init(argc, argv);
    thread_count = (unsigned)wl_opt("threads", 2);
    make_array();
    run_threads(fill_pages, threads);
    join_threads(threads);
    uint64_t rate = wl_opt("rate", 20), checked = 0;
    if (rate != 0) {
        row_interval_ns =
            (int64_t)(1e9 * WRITES_IN_A_ROW * PAGE_BYTES * thread_count / ((double)rate * (1 << 20)));
        run_threads(write_pages, threads);
    }
    int64_t longest_ns = look_on(&checked);
    leave = true;
    if (rate != 0)
        join_threads(threads);
    for (size_t block = 0; block < array.blocks; block++)
        audit(block);
    for (size_t page = 0; page < array.count; page++)
        CHECK(check_page(page), "page %zu was left half written", page);
    wl_ok("%" PRIu64 " pages written, %" PRIu64 " checked, longest gap %" PRId64 " ns", all_written(),
          checked, longest_ns);
}

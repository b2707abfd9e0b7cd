/* Every kind of mapping, each word known, the protections tried, and a child that shares some of it.
   Option: answer_ms, how long parent and child wait for each other. */
#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { KEEP_HIDDEN_ROUNDS = 16, STACK_STEP = 4096, HEAP_LIMIT = 64 << 20 };

static struct region *hidden;
static char *heap_start;
static size_t heap_bytes;
static int private_fd, shared_fd, memory_fd;

static void make_regions(void)
{
    const int anonymous = MAP_PRIVATE | MAP_ANONYMOUS;
    region_make("anonymous", NULL, 16 << 20, PROT_READ | PROT_WRITE, anonymous, -1);
    region_make("anonymous shared", NULL, 4 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
    memory_fd = memfd_create("pattern", MFD_CLOEXEC);
    CHECK(memory_fd >= 0 && ftruncate(memory_fd, 2 << 20) == 0, "memfd: %s", strerror(errno));
    region_make("memfd", NULL, 2 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd);
    private_fd = open("private.data", O_RDWR | O_CREAT | O_TRUNC, 0644);
    shared_fd = open("shared.data", O_RDWR | O_CREAT | O_TRUNC, 0644);
    CHECK(private_fd >= 0 && shared_fd >= 0, "open: %s", strerror(errno));
    file_fill(private_fd, 2 << 20);
    CHECK(ftruncate(shared_fd, 1 << 20) == 0, "ftruncate: %s", strerror(errno));
    region_make("file shared", NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd);
    struct region *huge = region_make("hugepage", NULL, 8 << 20, PROT_READ | PROT_WRITE, anonymous, -1);
    /* Without transparent huge pages in the kernel this is an ordinary region. */
    (void)madvise(huge->start, huge->length, MADV_HUGEPAGE);
    region_make("grows down", NULL, 256 << 10, PROT_READ | PROT_WRITE, anonymous | MAP_GROWSDOWN, -1);
    struct region *constant = region_make("read only", NULL, 1 << 20, PROT_READ | PROT_WRITE, anonymous, -1);
    CHECK(mprotect(constant->start, constant->length, PROT_READ) == 0, "mprotect: %s", strerror(errno));
    constant->constant = true;
    hidden = region_make("hidden", NULL, 1 << 20, PROT_READ | PROT_WRITE, anonymous, -1);
    CHECK(mprotect(hidden->start, hidden->length, PROT_NONE) == 0, "mprotect: %s", strerror(errno));
    hidden->constant = hidden->hidden = true;
}

static void verify_hidden(uint64_t round)
{
    CHECK(wl_faults(hidden->start, false), "PROT_NONE memory can be read");
    if (round % KEEP_HIDDEN_ROUNDS != 0)
        return;
    CHECK(mprotect(hidden->start, hidden->length, PROT_READ) == 0, "mprotect: %s", strerror(errno));
    region_verify(hidden);
    CHECK(mprotect(hidden->start, hidden->length, PROT_NONE) == 0, "mprotect: %s", strerror(errno));
}

/* The break: what was asked for stays, and more can be had right behind it. */
static void grow_heap(uint64_t round)
{
    CHECK(sbrk(0) == heap_start + heap_bytes, "the break moved to %p", sbrk(0));
    for (size_t at = 0; at < heap_bytes; at += 4096)
        CHECK(*(uint64_t *)(heap_start + at) == wl_mix(at), "heap byte %zu changed", at);
    if (round % 8 != 0 || heap_bytes >= HEAP_LIMIT)
        return;
    char *more = sbrk(65536);
    CHECK(more == heap_start + heap_bytes, "sbrk gave %p: %s", (void *)more, strerror(errno));
    for (size_t at = heap_bytes; at < heap_bytes + 65536; at += 4096)
        *(uint64_t *)(heap_start + at) = wl_mix(at);
    heap_bytes += 65536;
}

/* Recurse deeper from round to round, so that the stack must still grow after a move. */
static uint64_t __attribute__((noinline)) descend(unsigned depth)
{
    volatile uint64_t frame[STACK_STEP / 8];
    for (unsigned i = 0; i < STACK_STEP / 8; i += 64)
        frame[i] = wl_mix(depth * STACK_STEP + i);
    uint64_t below = depth == 0 ? 0 : descend(depth - 1);
    for (unsigned i = 0; i < STACK_STEP / 8; i += 64)
        CHECK(frame[i] == wl_mix(depth * STACK_STEP + i), "the stack changed at depth %u", depth);
    return below + 1;
}

static void start(void)
{
    wl_faults_catch();
    make_regions();
    cow_start(private_fd);
    sparse_start();
    sharing_start();
    heap_start = sbrk(0);
    /* From here on nothing calls malloc, which would move the break too. */
    heap_bytes = 0;
}

int main(int argc, char **argv)
{
    wl_init(argc, argv);
    start();
    uint64_t round = 1;
    for (; !wl_stopping(); round++) {
        regions_step(round);
        verify_hidden(round);
        file_matches(memory_fd, "memfd", round);
        file_matches(shared_fd, "file shared", round);
        cow_step(private_fd, round);
        sparse_step();
        grow_heap(round);
        unsigned depth = round < 1024 ? (unsigned)round : 1024;
        CHECK(descend(depth) == depth + 1, "recursion went wrong");
        sharing_step();
        wl_alive();
        wl_nap(4 * MS);
    }
    regions_verify();
    verify_hidden(0);
    sharing_end();
    wl_ok("%" PRIu64 " rounds", round);
}

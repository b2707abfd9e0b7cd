/* Futexes in such memory, and many threads at one page. */
#define _GNU_SOURCE
#include "kernelio.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { REWRITE_EVERY = 4 };

/* The lock, what it guards and its twin lie on pages of their own. */
static struct locked {
    pthread_mutex_t lock __attribute__((aligned(4096)));
    pthread_cond_t turned __attribute__((aligned(4096)));
    uint64_t turn __attribute__((aligned(4096)));
    uint64_t twin __attribute__((aligned(4096)));
    uint64_t died, found_dead;
} *locked;

static void must(int error, const char *what)
{
    CHECK(error == 0, "%s: %s", what, strerror(error));
}

void locks_start(void)
{
    pthread_mutexattr_t robust;
    must(pthread_mutexattr_init(&robust), "mutexattr_init");
    must(pthread_mutexattr_setrobust(&robust, PTHREAD_MUTEX_ROBUST), "setrobust");
    locked = (struct locked *)pages_of_own((sizeof *locked + PAGE_BYTES - 1) / PAGE_BYTES);
    must(pthread_mutex_init(&locked->lock, &robust), "mutex_init");
    must(pthread_cond_init(&locked->turned, NULL), "cond_init");
}

/* Whoever gets a lock whose owner has died says so and goes on. */
static void got_lock(int error, const char *what)
{
    if (error == EOWNERDEAD) {
        locked->found_dead++;
        error = pthread_mutex_consistent(&locked->lock);
    }
    must(error, what);
    CHECK(locked->turn == locked->twin, "turn %" PRIu64 ", twin %" PRIu64, locked->turn, locked->twin);
    CHECK(locked->found_dead == locked->died, "%" PRIu64 " died with the lock, %" PRIu64 " were found",
          locked->died, locked->found_dead);
}

void *take_turns(void *which)
{
    for (int64_t due_ns = 0; !leave; wl_pace(&due_ns, MS / 4)) {
        got_lock(pthread_mutex_lock(&locked->lock), "lock");
        while (locked->turn % 2 != (uintptr_t)which && !leave)
            got_lock(pthread_cond_wait(&locked->turned, &locked->lock), "cond_wait");
        locked->turn++;
        locked->twin++;
        must(pthread_cond_broadcast(&locked->turned), "broadcast");
        must(pthread_mutex_unlock(&locked->lock), "unlock");
    }
    got_lock(pthread_mutex_lock(&locked->lock), "lock");
    must(pthread_cond_broadcast(&locked->turned), "broadcast");
    must(pthread_mutex_unlock(&locked->lock), "unlock");
    return NULL;
}

void *die_with_lock(void *nothing)
{
    got_lock(pthread_mutex_lock(&locked->lock), "lock");
    locked->died++;
    return nothing; /* The kernel follows the robust list of the thread, which leads to the lock. */
}

uint64_t locks_end(void)
{
    got_lock(pthread_mutex_lock(&locked->lock), "lock");
    must(pthread_mutex_unlock(&locked->lock), "unlock");
    return locked->turn;
}

static unsigned char *crowded;
static size_t crowded_pages;
static uint64_t *crowded_keys, last_key;
static pthread_barrier_t here, gone;
static size_t next_page;
static bool crowd_leaves;

void crowd_start(void)
{
    crowded_pages = (wl_opt("mib", 8) << 20) / PAGE_BYTES;
    crowded = pages_of_own(crowded_pages);
    crowded_keys = (uint64_t *)pages_of_own((crowded_pages * 8 + PAGE_BYTES - 1) / PAGE_BYTES);
    for (size_t page = 0; page < crowded_pages; page++) {
        crowded_keys[page] = ++last_key;
        page_fill(crowded + page * PAGE_BYTES, last_key);
    }
    must(pthread_barrier_init(&here, NULL, CROWD), "barrier_init");
    must(pthread_barrier_init(&gone, NULL, CROWD), "barrier_init");
}

static void touch_by_call(int fd, const unsigned char *page, uint64_t key)
{
    unsigned char copy[PAGE_BYTES];
    CHECK(pwrite(fd, page, PAGE_BYTES, 0) == PAGE_BYTES, "pwrite: %s", strerror(errno));
    CHECK(pread(fd, copy, PAGE_BYTES, 0) == PAGE_BYTES, "pread: %s", strerror(errno));
    CHECK_PAGE(copy, key, "a page that write(2) read");
}

void *be_crowd(void *which)
{
    uint64_t random = 29;
    int64_t due_ns = 0;
    int fd = memfd_create("touched", MFD_CLOEXEC);
    CHECK(fd >= 0, "memfd_create: %s", strerror(errno));
    for (uint64_t round = 0;; round++) {
        if (pthread_barrier_wait(&here) == PTHREAD_BARRIER_SERIAL_THREAD) {
            next_page = below(&random, crowded_pages);
            crowd_leaves = leave;
        }
        (void)pthread_barrier_wait(&gone);
        if (crowd_leaves)
            break;
        unsigned char *page = crowded + next_page * PAGE_BYTES;
        uint64_t key = crowded_keys[next_page];
        if (which == NULL)
            touch_by_call(fd, page, key);
        else
            CHECK_PAGE(page, key, "page %zu of the crowd's", next_page);
        /* All have seen it once they are here again; the first then writes it anew. */
        (void)pthread_barrier_wait(&here);
        if (which == NULL && round % REWRITE_EVERY == 0) {
            crowded_keys[next_page] = ++last_key;
            page_fill(page, last_key);
        }
        (void)pthread_barrier_wait(&gone);
        if (which == NULL)
            wl_pace(&due_ns, MS / 4);
    }
    close(fd);
    return NULL;
}

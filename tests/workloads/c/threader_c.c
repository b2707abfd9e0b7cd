/* Threads that are born and die all the time. Each checks its stack and its thread-local memory, counts under
   a mutex, and hands a token on under a condition variable.
   Options: threads, how many live at once; life_us, how long at most. */
#define _GNU_SOURCE
#include "pages.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MOST_THREADS = 64, TLS_PAGES = 2, STACK_PAGES = 16, STACK_BYTES = 256 << 10 };

/* Counted by all, in pages far from each other: after each change they agree. */
static struct {
    unsigned char marker[WL_MARKER_BYTES];
    uint64_t turns, room[PAGE_WORDS], twin;
    uint64_t born, died, token, token_sum;
} count __attribute__((aligned(4096)));
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t died_one = PTHREAD_COND_INITIALIZER, token_moved = PTHREAD_COND_INITIALIZER;
static unsigned life_us;

static struct life {
    pthread_t thread;
    bool alive, detached, done;
    void *stack; /* our own, or NULL: the library's */
    uint64_t salt;
} lives[MOST_THREADS];

static __thread struct {
    uint64_t secret;
    uint64_t pages[TLS_PAGES * PAGE_WORDS];
} own;
static __thread uint64_t empty[PAGE_WORDS];

static void must(int error, const char *what)
{
    CHECK(error == 0, "%s: %s", what, strerror(error));
}

static uint64_t key_of(uint64_t salt, unsigned page)
{
    return (salt | 1) + page * 2; /* never 0 */
}

static void check_own(uint64_t salt, const uint64_t *stack, pid_t tid)
{
    CHECK(own.secret == salt, "a thread lost its TLS");
    for (unsigned i = 0; i < TLS_PAGES; i++)
        CHECK_PAGE(own.pages + i * PAGE_WORDS, key_of(salt, i), "TLS page %u", i);
    for (unsigned i = 0; i < STACK_PAGES; i++)
        CHECK_PAGE(stack + i * PAGE_WORDS, key_of(salt, TLS_PAGES + i), "stack page %u", i);
    CHECK(tid == syscall(SYS_gettid), "the tid was %d, is %ld", tid, syscall(SYS_gettid));
}

static void check_count(void)
{
    CHECK(count.turns == count.twin, "%" PRIu64 " turns, %" PRIu64 " of the twin", count.turns, count.twin);
    CHECK(count.token_sum == count.token * (count.token + 1) / 2, "the tokens do not have their sum");
    CHECK(count.died <= count.born && count.born - count.died <= MOST_THREADS,
          "%" PRIu64 " born, %" PRIu64 " died", count.born, count.died);
}

static void take_turn(bool wait)
{
    must(pthread_mutex_lock(&lock), "lock");
    check_count();
    count.turns++;
    count.twin++;
    uint64_t seen = count.token;
    if (wait) {
        struct timespec soon;
        clock_gettime(CLOCK_REALTIME, &soon);
        soon.tv_nsec += 2 * MS;
        soon.tv_sec += soon.tv_nsec / 1000000000;
        soon.tv_nsec %= 1000000000;
        int error = 0;
        while (count.token == seen && error == 0)
            error = pthread_cond_timedwait(&token_moved, &lock, &soon);
        CHECK(error == 0 || error == ETIMEDOUT, "timedwait: %s", strerror(error));
        check_count();
    } else {
        count.token++;
        count.token_sum += count.token;
        must(pthread_cond_broadcast(&token_moved), "broadcast");
    }
    must(pthread_mutex_unlock(&lock), "unlock");
}

static void *live(void *argument)
{
    struct life *life = argument;
    uint64_t salt = life->salt, random = salt, stack[STACK_PAGES * PAGE_WORDS];
    pid_t tid = (pid_t)syscall(SYS_gettid);
    CHECK_PAGE(empty, 0, "the TLS of a new thread");
    memset(empty, 1, sizeof empty);
    own.secret = salt;
    for (unsigned i = 0; i < TLS_PAGES; i++)
        page_fill(own.pages + i * PAGE_WORDS, key_of(salt, i));
    for (unsigned i = 0; i < STACK_PAGES; i++)
        page_fill(stack + i * PAGE_WORDS, key_of(salt, TLS_PAGES + i));
    int64_t end_ns = wl_now(CLOCK_MONOTONIC) + (int64_t)below(&random, life_us + 1) * 1000;
    do {
        check_own(salt, stack, tid);
        take_turn(below(&random, 2) == 0);
        if (below(&random, 4) == 0)
            wl_nap((int64_t)below(&random, MS));
    } while (wl_now(CLOCK_MONOTONIC) < end_ns);
    check_own(salt, stack, tid);
    must(pthread_mutex_lock(&lock), "lock");
    count.died++;
    life->done = true;
    must(pthread_cond_signal(&died_one), "signal");
    must(pthread_mutex_unlock(&lock), "unlock");
    return (void *)(uintptr_t)wl_mix(salt);
}

static void give_birth(struct life *life, uint64_t salt)
{
    pthread_attr_t attributes;
    must(pthread_attr_init(&attributes), "attr_init");
    *life = (struct life){.alive = true, .salt = salt, .detached = salt % 4 == 0};
    if (salt % 4 == 1) {
        life->stack =
            mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
        CHECK(life->stack != MAP_FAILED, "mmap: %s", strerror(errno));
        for (unsigned page = 0; page < STACK_BYTES / PAGE_BYTES; page += 8)
            CHECK_PAGE((char *)life->stack + page * PAGE_BYTES, 0, "page %u of a new stack", page);
        must(pthread_attr_setstack(&attributes, life->stack, STACK_BYTES), "setstack");
    } else
        must(pthread_attr_setstacksize(&attributes, STACK_BYTES << salt % 3), "setstacksize");
    if (life->detached)
        must(pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED), "setdetachstate");
    must(pthread_create(&life->thread, &attributes, live, life), "pthread_create");
    must(pthread_attr_destroy(&attributes), "attr_destroy");
}

static void bury(struct life *life)
{
    void *value;
    if (!life->detached) {
        must(pthread_join(life->thread, &value), "join");
        CHECK((uintptr_t)value == wl_mix(life->salt), "a thread returned a wrong value");
    }
    if (life->stack != NULL)
        CHECK(munmap(life->stack, STACK_BYTES) == 0, "munmap: %s", strerror(errno));
    life->alive = false;
}

/* Bury the dead, give birth to as many. */
static void renew(unsigned most, bool leave, uint64_t *random)
{
    for (struct life *life = lives; life < lives + most; life++) {
        must(pthread_mutex_lock(&lock), "lock");
        bool done = life->alive && life->done;
        count.born += !leave && (done || !life->alive);
        must(pthread_mutex_unlock(&lock), "unlock");
        if (done)
            bury(life);
        if (!leave && !life->alive)
            give_birth(life, dice(random));
    }
}

static bool anybody_died(uint64_t seen)
{
    struct timespec soon;
    clock_gettime(CLOCK_REALTIME, &soon);
    soon.tv_nsec += 10 * MS;
    soon.tv_sec += soon.tv_nsec / 1000000000;
    soon.tv_nsec %= 1000000000;
    must(pthread_mutex_lock(&lock), "lock");
    int error = 0;
    while (count.died == seen && error == 0)
        error = pthread_cond_timedwait(&died_one, &lock, &soon);
    CHECK(error == 0 || error == ETIMEDOUT, "timedwait: %s", strerror(error));
    bool died = count.died != seen;
    must(pthread_mutex_unlock(&lock), "unlock");
    return died;
}

int main(int argc, char **argv)
{
    wl_init(argc, argv);
    wl_marker(count.marker);
    unsigned most = (unsigned)wl_opt("threads", 12);
    life_us = (unsigned)wl_opt("life_us", 50000);
    CHECK(most >= 1 && most <= MOST_THREADS, "threads is out of range");
    uint64_t random = 1, buried = 0;
    while (!wl_beat()) {
        renew(most, false, &random);
        if (anybody_died(buried))
            buried = count.died;
    }
    while (count.died < count.born)
        (void)anybody_died(count.died);
    renew(most, true, &random);
    CHECK(count.died == count.born, "%" PRIu64 " born, %" PRIu64 " died", count.born, count.died);
    check_count();
    wl_ok("%" PRIu64 " threads, %" PRIu64 " turns", count.born, count.turns);
}

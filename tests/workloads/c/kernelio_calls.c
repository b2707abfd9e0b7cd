/* Calls that fill memory or read it. */
#define _GNU_SOURCE
#include "kernelio.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    BUFFER_PAGES = 64,
    BUFFER_BYTES = BUFFER_PAGES * PAGE_BYTES,
    FILE_PAGES = 512,
    ALT_PAGES = 16,
    RANDOM_PAGES = 4
};

static int to_child[2], to_parent[2];
static pid_t child;
static uint64_t written_bytes, read_bytes;

/* Byte n of the stream belongs to the word wl_mix(n / 8). */
static void stream_fill(uint64_t *words, size_t bytes, uint64_t at)
{
    for (size_t i = 0; i < bytes / 8; i++)
        words[i] = wl_mix(at / 8 + i);
}

static void stream_check(const uint64_t *words, size_t bytes, uint64_t at, const char *who)
{
    for (size_t i = 0; i < bytes / 8; i++)
        CHECK(words[i] == wl_mix(at / 8 + i), "%s: word %" PRIu64 " of the stream is %" PRIx64, who,
              at / 8 + i, words[i]);
}

static size_t some_bytes(uint64_t *random)
{
    return (1 + below(random, BUFFER_BYTES / 8)) * 8;
}

/* A write that is stopped half way, as by SIGSTOP, tells how far it came. */
static void write_all(int fd, const unsigned char *from, size_t bytes)
{
    while (bytes != 0) {
        ssize_t gave = write(fd, from, bytes);
        CHECK(gave > 0 && gave % 8 == 0, "write of %zu gave %zd: %s", bytes, gave, strerror(errno));
        from += gave;
        bytes -= (size_t)gave;
    }
}

static _Noreturn void pass_on(void)
{
    unsigned char *buffer = pages_of_own(BUFFER_PAGES);
    uint64_t random = 7, at = 0;
    close(to_child[1]);
    close(to_parent[0]);
    for (;;) {
        maybe_drop(buffer, BUFFER_PAGES, &random);
        ssize_t got = read(to_child[0], buffer, some_bytes(&random));
        CHECK(got >= 0 && got % 8 == 0, "the child's read gave %zd: %s", got, strerror(errno));
        if (got == 0)
            _exit(0);
        stream_check((uint64_t *)buffer, (size_t)got, at, "child");
        at += (uint64_t)got;
        write_all(to_parent[1], buffer, (size_t)got);
    }
}

void stream_start(void)
{
    CHECK(pipe2(to_child, O_CLOEXEC) == 0 && pipe2(to_parent, O_CLOEXEC) == 0, "pipe2: %s", strerror(errno));
    child = fork();
    CHECK(child >= 0, "fork: %s", strerror(errno));
    if (child == 0)
        pass_on();
    close(to_child[0]);
    close(to_parent[1]);
    signal(SIGPIPE, SIG_IGN); /* A child that is gone shall be noticed by EPIPE. */
}

void *stream_write(void *nothing)
{
    unsigned char *buffer = pages_of_own(BUFFER_PAGES);
    uint64_t random = 11;
    int64_t due_ns = 0;
    while (!leave) {
        size_t bytes = some_bytes(&random);
        maybe_drop(buffer, BUFFER_PAGES, &random);
        stream_fill((uint64_t *)buffer, bytes, written_bytes);
        write_all(to_child[1], buffer, bytes);
        written_bytes += bytes;
        wl_pace(&due_ns, 2 * MS);
    }
    CHECK(close(to_child[1]) == 0, "close: %s", strerror(errno));
    return nothing;
}

void *stream_read(void *nothing)
{
    unsigned char *buffer = pages_of_own(BUFFER_PAGES);
    uint64_t random = 13;
    for (;;) {
        /* Two parts with a piece between them that must stay as it is. */
        size_t first = 8 * below(&random, BUFFER_BYTES / 16), gap = 8, second = BUFFER_BYTES - first - gap;
        maybe_drop(buffer, BUFFER_PAGES, &random);
        uint64_t *kept = (uint64_t *)(buffer + first);
        *kept = wl_mix(random);
        struct iovec parts[] = {{buffer, first}, {buffer + first + gap, second}};
        ssize_t got = readv(to_parent[0], parts, 2);
        CHECK(got >= 0 && got % 8 == 0, "readv gave %zd: %s", got, strerror(errno));
        CHECK(*kept == wl_mix(random), "readv wrote between its parts");
        if (got == 0)
            return nothing;
        size_t in_first = (size_t)got < first ? (size_t)got : first;
        stream_check((uint64_t *)buffer, in_first, read_bytes, "first part");
        stream_check((uint64_t *)(buffer + first + gap), (size_t)got - in_first, read_bytes + in_first,
                     "second part");
        read_bytes += (uint64_t)got;
    }
}

void stream_end(void)
{
    int status = 0;
    CHECK(written_bytes == read_bytes, "%" PRIu64 " bytes written, %" PRIu64 " read", written_bytes,
          read_bytes);
    CHECK(waitpid(child, &status, 0) == child, "waitpid: %s", strerror(errno));
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with status %x", status);
}

void *read_file(void *nothing)
{
    unsigned char *buffer = pages_of_own(BUFFER_PAGES);
    uint64_t random = 17;
    int fd = open("read.data", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    CHECK(fd >= 0, "open: %s", strerror(errno));
    for (size_t page = 0; page < FILE_PAGES; page++) {
        page_fill(buffer, 2 * page + 1);
        write_all(fd, buffer, PAGE_BYTES);
    }
    for (int64_t due_ns = 0; !leave; wl_pace(&due_ns, MS)) {
        size_t first = below(&random, FILE_PAGES - BUFFER_PAGES), pages = 1 + below(&random, BUFFER_PAGES);
        maybe_drop(buffer, BUFFER_PAGES, &random);
        ssize_t got = pread(fd, buffer, pages * PAGE_BYTES, (off_t)(first * PAGE_BYTES));
        CHECK(got == (ssize_t)(pages * PAGE_BYTES), "pread gave %zd: %s", got, strerror(errno));
        for (size_t page = 0; page < pages; page++)
            CHECK_PAGE(buffer + page * PAGE_BYTES, 2 * (first + page) + 1, "page %zu of the file",
                       first + page);
    }
    close(fd);
    return nothing;
}

static uint64_t sum_of(const uint64_t *words, size_t count)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i++)
        sum = wl_mix(sum ^ words[i]);
    return sum;
}

/* Random bytes across page borders; nothing around them changes, and they stay as they came. */
void *get_random(void *nothing)
{
    uint64_t *words = (uint64_t *)pages_of_own(RANDOM_PAGES), random = 19;
    const size_t count = RANDOM_PAGES * PAGE_WORDS;
    for (int64_t due_ns = 0; !leave; wl_pace(&due_ns, 2 * MS)) {
        size_t first = below(&random, count / 2), length = 1 + below(&random, count / 2);
        uint64_t around = random;
        maybe_drop(words, RANDOM_PAGES, &random);
        words[0] = words[count - 1] = wl_mix(around);
        first += first == 0;
        length -= first + length == count;
        ssize_t gave = getrandom(words + first, length * 8, 0);
        CHECK(gave == (ssize_t)(length * 8), "getrandom of %zu gave %zd: %s", length * 8, gave,
              strerror(errno));
        CHECK(words[0] == wl_mix(around) && words[count - 1] == wl_mix(around), "getrandom wrote around");
        uint64_t sum = sum_of(words + first, length);
        wl_nap(MS);
        CHECK(sum_of(words + first, length) == sum, "random bytes changed later");
    }
    return nothing;
}

static unsigned char *alternate;
static volatile uint64_t handled;

static void __attribute__((noinline)) on_signal(int number)
{
    uint64_t page[PAGE_WORDS];
    uintptr_t here = (uintptr_t)page, low = (uintptr_t)alternate;
    CHECK(number == SIGUSR1, "signal %d", number);
    CHECK(here >= low && here < low + ALT_PAGES * PAGE_BYTES, "a signal was handled off the alternate stack");
    page_fill(page, 2 * handled + 1);
    CHECK_PAGE(page, 2 * handled + 1, "a page on the alternate stack");
    handled++;
}

void *take_signals(void *nothing)
{
    alternate = pages_of_own(ALT_PAGES);
    stack_t stack = {.ss_sp = alternate, .ss_size = ALT_PAGES * PAGE_BYTES}, seen;
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    uint64_t random = 23, sent = 0;
    CHECK(sigaltstack(&stack, NULL) == 0 && sigaction(SIGUSR1, &action, NULL) == 0, "sigaltstack: %s",
          strerror(errno));
    for (int64_t due_ns = 0; !leave; wl_pace(&due_ns, MS)) {
        maybe_drop(alternate, ALT_PAGES, &random);
        CHECK(pthread_kill(pthread_self(), SIGUSR1) == 0, "pthread_kill");
        sent++;
        CHECK(handled == sent, "%" PRIu64 " signals sent, %" PRIu64 " handled", sent, handled);
        CHECK(sigaltstack(NULL, &seen) == 0 && seen.ss_sp == alternate, "the alternate stack is another");
    }
    return nothing;
}

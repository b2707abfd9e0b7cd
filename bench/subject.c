/* The program that is moved: it holds what it was asked to hold, and waits for ever.
 *
 * usage: subject MIB VMAS FDS THREADS PROCESSES
 * MIB is touched memory; the others are numbers of things beyond what every program has.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

static void check(int fine, const char *what)
{
    if (fine)
        return;
    perror(what);
    exit(1);
}

static void *wait_for_ever(void *unused)
{
    for (;;)
        pause();
    return unused;
}

static void touch(size_t bytes)
{
    if (bytes == 0)
        return;
    volatile unsigned char *memory =
        mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(memory != MAP_FAILED, "mmap");
    for (size_t at = 0; at < bytes; at += 4096)
        *(volatile size_t *)(memory + at) = at | 1;
}

/* Neighbours of different protection stay two mappings. */
static void map(long count)
{
    if (count == 0)
        return;
    unsigned char *all = mmap(0, count * 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(all != MAP_FAILED, "mmap");
    for (long i = 0; i < count; i += 2)
        check(mprotect(all + i * 4096, 4096, PROT_READ | PROT_WRITE) == 0, "mprotect");
}

static void open_files(long count)
{
    struct rlimit limit;
    check(getrlimit(RLIMIT_NOFILE, &limit) == 0, "getrlimit");
    limit.rlim_cur = limit.rlim_max;
    check(setrlimit(RLIMIT_NOFILE, &limit) == 0, "setrlimit");
    while (count-- > 0)
        check(open("/dev/null", O_RDWR) >= 0, "open");
}

static void start_threads(long count)
{
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 65536);
    while (count-- > 0) {
        pthread_t thread;
        check(pthread_create(&thread, &small, wait_for_ever, 0) == 0, "pthread_create");
    }
}

static void fork_children(long count)
{
    while (count-- > 0) {
        pid_t child = fork();
        check(child >= 0, "fork");
        if (child == 0)
            wait_for_ever(0);
    }
}

int main(int argc, char **argv)
{
    if (argc != 6)
        return 2;
    touch((size_t)atol(argv[1]) << 20);
    map(atol(argv[2]));
    open_files(atol(argv[3]));
    fork_children(atol(argv[5]));
    start_threads(atol(argv[4]));
    check(write(1, "ready\n", 6) == 6, "write");
    wait_for_ever(0);
}

/* A child on the same shared memory: two semaphores and a counter that both advance in turn. */
#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <inttypes.h>
#include <semaphore.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static struct shared {
    sem_t to_child, to_parent;
    uint64_t counter;
    bool leave;
} *shared;
static pid_t child;
static uint64_t private_copy = 1;
static int64_t answer_ns;

static void wait_for(sem_t *semaphore)
{
    int64_t end_ns = wl_now(CLOCK_MONOTONIC) + answer_ns;
    struct timespec end = {.tv_sec = end_ns / 1000000000, .tv_nsec = end_ns % 1000000000};
    int gave = sem_clockwait(semaphore, CLOCK_MONOTONIC, &end);
    CHECK(gave == 0 || errno != ETIMEDOUT, "the other one does not answer");
    CHECK(gave == 0, "sem_clockwait: %s", strerror(errno));
}

static _Noreturn void be_the_child(pid_t parent)
{
    for (;;) {
        wait_for(&shared->to_child);
        if (shared->leave)
            _exit(42);
        CHECK(getppid() == parent, "the child's parent was %d, is %d", parent, getppid());
        CHECK(private_copy == 2 * 1, "private memory is shared after fork");
        shared->counter++;
        CHECK(sem_post(&shared->to_parent) == 0, "sem_post");
    }
}

void sharing_start(void)
{
    shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED, "mmap: %s", strerror(errno));
    CHECK(sem_init(&shared->to_child, 1, 0) == 0 && sem_init(&shared->to_parent, 1, 0) == 0, "sem_init");
    answer_ns = (int64_t)wl_opt("answer_ms", 60000) * MS;
    pid_t parent = getpid();
    private_copy = 2;
    child = fork();
    CHECK(child >= 0, "fork: %s", strerror(errno));
    if (child == 0)
        be_the_child(parent);
}

void sharing_step(void)
{
    uint64_t before = shared->counter;
    private_copy++;
    CHECK(sem_post(&shared->to_child) == 0, "sem_post");
    wait_for(&shared->to_parent);
    CHECK(shared->counter == before + 1, "the child counted from %" PRIu64 " to %" PRIu64, before, shared->counter);
}

void sharing_end(void)
{
    int status = 0;
    shared->leave = true;
    CHECK(sem_post(&shared->to_child) == 0, "sem_post");
    CHECK(waitpid(child, &status, 0) == child, "waitpid: %s", strerror(errno));
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 42, "the child ended with status %x", status);
}

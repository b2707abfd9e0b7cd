/* A parent that forks all the time and goes on writing: each child must see the memory of its birth, and says
   so in its exit status. Some write too, some have a child of their own, some execute this program anew.
   Options: mib, the region they inherit; children, how many at once; life_ms, how long each lives at most. */
#define _GNU_SOURCE
#include "pages.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MOST_CHILDREN = 32, WRITES = 64, CHECKS = 16, EXEC_PAGES = 64, STATUS_BITS = 0x7f };
enum { LOOKS_ON, WRITES_TOO, HAS_CHILD, EXECUTES, WAYS };

static unsigned char *region;
static uint64_t *keys, key_sum, last_key, randomness = 1;
static size_t page_count;
static unsigned life_ms;
static char **arguments;
static struct child {
    pid_t pid; /* 0: none */
    int64_t end_ns;
    int status;
} children[MOST_CHILDREN];

static uint64_t term(size_t page, uint64_t key)
{
    return key == 0 ? 0 : wl_mix(key + ((uint64_t)page << 32));
}

static unsigned char *address_of(size_t page)
{
    return region + page * PAGE_BYTES;
}

static void check(size_t page, const char *who)
{
    CHECK_PAGE(address_of(page), keys[page], "%s: page %zu", who, page);
}

static void change(size_t page)
{
    uint64_t key = ++last_key;
    key_sum += term(page, key) - term(page, keys[page]);
    keys[page] = key;
    page_fill(address_of(page), key);
}

static int status_of(uint64_t sum, uint64_t salt)
{
    return (int)(wl_mix(sum ^ salt) & STATUS_BITS);
}

/* What the memory itself says; the keys are compared on the way. */
static int status_of_memory(uint64_t salt, const char *who)
{
    uint64_t sum = 0;
    for (size_t page = 0; page < page_count; page++) {
        check(page, who);
        sum += term(page, *(uint64_t *)address_of(page));
    }
    return status_of(sum, salt);
}

static void live(int64_t until_ns, pid_t parent, const char *who)
{
    while (wl_now(CLOCK_MONOTONIC) < until_ns) {
        for (unsigned i = 0; i < CHECKS; i++)
            check(below(&randomness, page_count), who);
        CHECK(getppid() == parent, "%s: the parent was %d, is %d", who, parent, getppid());
        wl_nap(MS);
    }
}

static int wait_for(pid_t pid, const char *who)
{
    int status;
    CHECK(waitpid(pid, &status, 0) == pid, "waitpid: %s", strerror(errno));
    CHECK(WIFEXITED(status), "%s %d ended with status %x", who, pid, status);
    return WEXITSTATUS(status);
}

static pid_t forked(void)
{
    pid_t pid = fork();
    CHECK(pid >= 0, "fork: %s", strerror(errno));
    return pid;
}

static void have_child(int64_t until_ns, uint64_t salt)
{
    pid_t self = getpid(), pid = forked();
    if (pid == 0) {
        live(until_ns, self, "grandchild");
        _exit(status_of_memory(salt, "grandchild"));
    }
    /* It inherited what we had at its birth, however much we change now. */
    int wanted = status_of(key_sum, salt);
    for (unsigned i = 0; i < WRITES; i++)
        change(below(&randomness, page_count));
    live(until_ns, getppid(), "child with a child");
    int found = wait_for(pid, "grandchild");
    CHECK(found == wanted, "the grandchild ended with %d, not %d", found, wanted);
}

static _Noreturn void execute(uint64_t salt)
{
    char word[40];
    snprintf(word, sizeof word, "salt=%" PRIu64, salt);
    /* By its path: /proc/self/exe would hide a program that is not there. */
    char *words[] = {arguments[0], arguments[1], word, NULL};
    execv(arguments[0], words);
    wl_bad("execv: %s", strerror(errno));
}

/* The program that was executed by a child: memory that begins anew, known from the salt. */
static _Noreturn void be_executed(uint64_t salt)
{
    page_count = EXEC_PAGES;
    for (size_t page = 0; page < page_count; page++)
        change(page);
    live(wl_now(CLOCK_MONOTONIC) + (int64_t)(salt % 10) * MS, getppid(), "executed");
    _exit(status_of_memory(salt, "executed"));
}

static int status_of_executed(uint64_t salt)
{
    uint64_t sum = 0;
    for (size_t page = 0; page < EXEC_PAGES; page++)
        sum += term(page, page + 1);
    return status_of(sum, salt);
}

static _Noreturn void be_child(unsigned way, int64_t until_ns, uint64_t salt, pid_t parent)
{
    int status = status_of(key_sum, salt);
    if (way == WRITES_TOO)
        for (unsigned i = 0; i < WRITES; i++) {
            check(i, "child");
            change(below(&randomness, page_count));
        }
    if (way == HAS_CHILD)
        have_child(until_ns, salt);
    live(until_ns, parent, "child");
    if (way == EXECUTES)
        execute(salt);
    int found = status_of_memory(salt, "child");
    CHECK(found == status_of(key_sum, salt), "the pages do not have the sum of their keys");
    _exit(status);
}

static void give_birth(struct child *child)
{
    uint64_t salt = dice(&randomness) >> 1;
    unsigned way = (unsigned)below(&randomness, WAYS);
    int64_t life_ns = (int64_t)below(&randomness, life_ms + 1) * MS,
            until_ns = wl_now(CLOCK_MONOTONIC) + life_ns;
    pid_t self = getpid(), pid = forked();
    if (pid == 0)
        be_child(way, until_ns, salt, self);
    /* It is a zombie for a while. */
    *child = (struct child){.pid = pid, .end_ns = until_ns + (int64_t)below(&randomness, 20) * MS};
    child->status = way == EXECUTES ? status_of_executed(salt) : status_of(key_sum, salt);
}

static void reap(struct child *child)
{
    int found = wait_for(child->pid, "child");
    CHECK(found == child->status, "child %d ended with %d, not %d", child->pid, found, child->status);
    child->pid = 0;
}

static void *mapped(size_t bytes)
{
    void *where = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(where != MAP_FAILED, "mmap: %s", strerror(errno));
    return where;
}

int main(int argc, char **argv)
{
    uint64_t salt;
    arguments = argv;
    if (argc == 3 && sscanf(argv[2], "salt=%" SCNu64, &salt) == 1) {
        region = mapped(EXEC_PAGES * PAGE_BYTES);
        keys = mapped(EXEC_PAGES * sizeof *keys);
        be_executed(salt);
    }
    wl_init(argc, argv);
    page_count = (wl_opt("mib", 8) << 20) / PAGE_BYTES;
    life_ms = (unsigned)wl_opt("life_ms", 100);
    unsigned most = (unsigned)wl_opt("children", 4);
    CHECK(page_count >= WRITES && most >= 1 && most <= MOST_CHILDREN, "mib or children is out of range");
    region = mapped(page_count * PAGE_BYTES);
    keys = mapped(page_count * sizeof *keys);
    for (size_t page = 0; page < page_count; page++)
        change(page);
    uint64_t born = 0;
    int64_t due_ns = 0;
    for (unsigned turn = 0; !wl_beat(); turn = (turn + 1) % most) {
        struct child *child = &children[turn];
        if (child->pid != 0 && wl_now(CLOCK_MONOTONIC) >= child->end_ns)
            reap(child);
        if (child->pid == 0) {
            give_birth(child);
            born++;
        }
        for (unsigned i = 0; i < WRITES; i++) {
            size_t page = below(&randomness, page_count);
            check(page, "parent");
            change(page);
        }
        wl_pace(&due_ns, MS);
    }
    for (unsigned i = 0; i < most; i++)
        if (children[i].pid != 0)
            reap(&children[i]);
    (void)status_of_memory(0, "parent");
    wl_ok("%" PRIu64 " children", born);
}

/* Memory that is easily carried wrongly, one kind by name, checked all the time: NAME LOG MARKER.
   Writes 0, 1, 2, ... to LOG, a line each time that all was right; ends with a word on stderr when it was not. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 16384 };
static volatile sig_atomic_t ticks, wanted;
static unsigned char *memory;

static void wrong(const char *what)
{
    fprintf(stderr, "wrong: %s\n", what);
    exit(1);
}

static unsigned char *mapped(size_t pages, int flags, int fd)
{
    void *found = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | flags, fd, 0);
    if (found == MAP_FAILED)
        wrong("mmap");
    return found;
}

/* Pages over a memory object, some of them written over with zeroes. */
static void zeroed_setup(void)
{
    int fd = memfd_create("object", 0);
    static char page[PAGE];
    memset(page, 'A', sizeof page);
    for (int i = 0; i < 64; i++)
        if (write(fd, page, sizeof page) != sizeof page)
            wrong("write");
    memory = mapped(64, 0, fd);
    memset(memory + 3 * PAGE, 0, 2 * PAGE);
}

static void zeroed_check(void)
{
    for (int i = 0; i < 64; i++)
        if (memory[i * PAGE] != (i == 3 || i == 4 ? 0 : 'A'))
            wrong("a page over the object");
}

/* What a fork wipes: children find zeroes, the parent what it wrote. */
static void wiped_setup(void)
{
    memory = mapped(PAGES, MAP_ANONYMOUS, -1);
    if (madvise(memory, PAGES * PAGE, MADV_WIPEONFORK) != 0)
        wrong("madvise");
    for (int i = 0; i < PAGES; i++)
        memory[i * PAGE] = (unsigned char)(i | 1);
}

static void wiped_check(void)
{
    pid_t child = fork();
    int status = 0;
    if (child == 0) {
        for (int i = 0; i < PAGES; i++)
            if (memory[i * PAGE] != 0)
                _exit(1);
        _exit(0);
    }
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
        wrong("a child has seen what was to be wiped");
    for (int i = 0; i < PAGES; i++)
        if (memory[i * PAGE] != (unsigned char)(i | 1))
            wrong("the parent's page");
}

/* A signal for one thread whose frame goes to a stack that nobody touches otherwise. */
static void tick(int number)
{
    (void)number;
    ticks++;
}

static void altstack_setup(void)
{
    memory = mapped(PAGES, MAP_ANONYMOUS, -1);
    memset(memory, 7, PAGES * PAGE);
    stack_t stack = {.ss_sp = memory, .ss_size = PAGES * PAGE};
    struct sigaction action = {.sa_handler = tick, .sa_flags = SA_ONSTACK | SA_RESTART};
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGALRM};
    event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
    struct itimerspec every = {{0, 300000}, {0, 300000}};
    timer_t timer;
    if (sigaltstack(&stack, NULL) != 0 || sigaction(SIGALRM, &action, NULL) != 0 ||
        timer_create(CLOCK_MONOTONIC, &event, &timer) != 0 || timer_settime(timer, 0, &every, NULL) != 0)
        wrong("timer");
}

static void altstack_check(void)
{
    for (int i = 0; i < PAGES / 2; i++)
        if (memory[i * PAGE] != 7)
            wrong("the stack's untouched part");
}

/* Advice and locks given late to a mapping that stays otherwise as it is. */
static void want(int number)
{
    (void)number;
    wanted = 1;
}

static void late_setup(void)
{
    memory = mapped(PAGES, MAP_ANONYMOUS, -1);
    memset(memory, 5, PAGES * PAGE);
    signal(SIGUSR1, want);
}

static void late_check(void)
{
    if (wanted && (mlock(memory, PAGES * PAGE) != 0 || madvise(memory, PAGES * PAGE, MADV_DONTFORK) != 0))
        wrong("mlock");
    wanted = 0;
    if (memory[9 * PAGE] != 5)
        wrong("a page");
}

static const struct kind {
    const char *name;
    void (*setup)(void), (*check)(void);
} kinds[] = {
    {"zeroed", zeroed_setup, zeroed_check},
    {"wiped", wiped_setup, wiped_check},
    {"altstack", altstack_setup, altstack_check},
    {"late", late_setup, late_check},
};

int main(int count, char **words)
{
    const struct kind *kind = NULL;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (count == 4 && strcmp(words[1], kinds[i].name) == 0)
            kind = &kinds[i];
    int log = kind == NULL ? -1 : open(words[2], O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (log < 0)
        wrong("usage: KIND LOG MARKER");
    kind->setup();
    for (unsigned long done = 0;; done++) {
        kind->check();
        dprintf(log, "%lu\n", done);
        struct timespec pause = {0, 2000000};
        while (nanosleep(&pause, &pause) != 0)
            ;
    }
}

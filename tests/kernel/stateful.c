/* A program that holds one kind of state over a move and says afterwards whether it still has it.
 *
 *     stateful DIRECTORY MODE
 *
 * It writes "ready" into the directory, waits for a file "go", and then writes "verdict": "ok", or "bad"
 * and why, or "absent" where this kernel has no such thing. Run by the tests through stateful.py. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/rseq.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <linux/filter.h>
#include <linux/seccomp.h>

#define PAGE 4096
#define F_ADD_SEALS_ 1033
#define F_GET_SEALS_ 1034
#define SEAL_SHRINK_GROW_WRITE 14
#define GUARD_INSTALL 102
#define SET_MDWE 65

static char **words;

static void tell(const char *name, const char *text) {
    int fd = open("draft", O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (fd < 0 || write(fd, text, strlen(text)) < 0 || close(fd) || rename("draft", name)) _exit(9);
}

static void end(const char *format, ...) {
    char text[400];
    va_list rest;
    va_start(rest, format);
    vsnprintf(text, sizeof text, format, rest);
    va_end(rest);
    tell("verdict", text);
    _exit(0);
}

#define NEED(condition) \
    do { if (!(condition)) end("bad line %d: %s (errno %d)", __LINE__, #condition, errno); } while (0)

static int may_go(void) { return access("go", F_OK) == 0; }

static void nap(long ms) {
    struct timespec time = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&time, &time)) {}
}

static void hold(void) {
    tell("ready", "ready");
    while (!may_go()) nap(5);
}

static int make(const char *name, size_t length) {
    int fd = open(name, O_RDWR | O_CREAT, 0644);
    NEED(fd >= 0 && ftruncate(fd, length) == 0);
    return fd;
}

static char *map(int protection, int flags, int fd) {
    char *at = mmap(0, PAGE, protection, flags, fd, 0);
    NEED(at != MAP_FAILED);
    return at;
}

static void temporary_files(void) {
    char text[8] = "";
    FILE *stream = tmpfile();
    NEED(stream && fputs("hello", stream) >= 0 && fflush(stream) == 0);
    int fd = open(".", O_TMPFILE | O_RDWR, 0600);
    NEED(fd >= 0 && write(fd, "abc", 3) == 3);
    hold();
    NEED(pread(fd, text, 7, 0) == 3 && !strcmp(text, "abc") && lseek(fd, 0, SEEK_CUR) == 3);
    rewind(stream);
    NEED(fgets(text, 8, stream) && !strcmp(text, "hello"));
}

static void sealed_memory(void) {
    int fd = memfd_create("sealed", MFD_ALLOW_SEALING);
    NEED(ftruncate(fd, PAGE) == 0 && write(fd, "hi", 2) == 2);
    NEED(fcntl(fd, F_ADD_SEALS_, SEAL_SHRINK_GROW_WRITE) == 0);
    char *at = map(PROT_READ, MAP_SHARED, fd);
    hold();
    NEED(!memcmp(at, "hi", 2) && fcntl(fd, F_GET_SEALS_) == SEAL_SHRINK_GROW_WRITE);
    NEED(mprotect(at, PAGE, PROT_READ | PROT_WRITE) == -1);
}

static void right_to_write(void) {
    int memory = memfd_create("memory", 0), file = make("file", PAGE);
    char link[64];
    NEED(ftruncate(memory, PAGE) == 0);
    snprintf(link, sizeof link, "/proc/self/fd/%d", memory);
    int reading = open(link, O_RDONLY);
    close(memory);
    char *without = map(PROT_READ, MAP_SHARED, reading), *with = map(PROT_READ, MAP_SHARED, file);
    hold();
    NEED(mprotect(without, PAGE, PROT_READ | PROT_WRITE) == -1);
    NEED(mprotect(with, PAGE, PROT_READ | PROT_WRITE) == 0);
}

static void many_timers(void) {
    enum { COUNT = 600 };
    struct sigevent quiet = {.sigev_notify = SIGEV_NONE};
    static timer_t timers[COUNT];
    struct itimerspec found;
    for (int i = 0; i < COUNT; i++) {
        struct itimerspec wanted = {{100 + i, 0}, {100000 + i, 0}};
        NEED(timer_create(CLOCK_MONOTONIC, &quiet, &timers[i]) == 0);
        NEED(timer_settime(timers[i], 0, &wanted, 0) == 0);
    }
    hold();
    for (int i = 0; i < COUNT; i++)
        NEED(timer_gettime(timers[i], &found) == 0 && found.it_interval.tv_sec == 100 + i);
}

static void many_signals(void) {
    enum { COUNT = 1500 };
    sigset_t set;
    siginfo_t info;
    struct timespec now = {0, 0};
    sigemptyset(&set);
    sigaddset(&set, 40);
    sigprocmask(SIG_BLOCK, &set, 0);
    for (int i = 0; i < COUNT; i++) NEED(sigqueue(getpid(), 40, (union sigval){.sival_int = i}) == 0);
    hold();
    for (int i = 0; i < COUNT; i++)
        NEED(sigtimedwait(&set, &info, &now) == 40 && info.si_value.sival_int == i);
    NEED(sigtimedwait(&set, &info, &now) == -1);
}

static void many_mappings(void) {
    enum { COUNT = 1200 };
    static char *at[COUNT];
    char name[32];
    for (int i = 0; i < COUNT; i++) {
        snprintf(name, sizeof name, "mapped%d", i);
        int fd = make(name, PAGE);
        NEED(pwrite(fd, &i, sizeof i, 0) == sizeof i);
        at[i] = map(PROT_READ, MAP_PRIVATE, fd);
        close(fd);
    }
    hold();
    for (int i = 0; i < COUNT; i++) NEED(*(int *)at[i] == i);
}

static void many_descriptors(void) {
    enum { COUNT = 3000 };
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = COUNT + 50;
    NEED(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    int first = make("same", COUNT), last = first;
    for (int i = 1; i < COUNT; i++) {
        last = open("same", O_RDWR);
        NEED(last == first + i && lseek(last, i, SEEK_SET) == i);
    }
    hold();
    for (int i = 0; i < COUNT; i++) NEED(lseek(first + i, 0, SEEK_CUR) == i);
}

static void robust_mutex(void) {
    pthread_mutex_t *mutex = (void *)map(PROT_READ | PROT_WRITE, MAP_SHARED, make("lock", PAGE));
    pthread_mutexattr_t how;
    pthread_mutexattr_init(&how);
    pthread_mutexattr_setpshared(&how, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&how, PTHREAD_MUTEX_ROBUST);
    NEED(pthread_mutex_init(mutex, &how) == 0 && pthread_mutex_lock(mutex) == 0);
    hold();
    NEED(mutex->__data.__lock == gettid() && pthread_mutex_unlock(mutex) == 0);
}

static void odd_name(void) {
    int fd = make("data (deleted)", PAGE);
    char *at = map(PROT_READ | PROT_WRITE, MAP_SHARED, fd), text[8] = "";
    close(fd);
    hold();
    strcpy(at, "later");
    fd = open("data (deleted)", O_RDONLY);
    NEED(read(fd, text, 7) == 7 && !strcmp(text, "later"));
}

static void attributes(void) {
    char text[32] = "";
    int filter = open("/proc/self/coredump_filter", O_RDWR);
    NEED(filter >= 0 && write(filter, "0x7f", 4) == 4 && close(filter) == 0);
    NEED(personality(ADDR_NO_RANDOMIZE) != -1 && prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0);
    hold();
    NEED(personality(0xffffffff) == ADDR_NO_RANDOMIZE);
    NEED(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1);
    filter = open("/proc/self/coredump_filter", O_RDONLY);
    NEED(read(filter, text, 31) > 0 && strtol(text, 0, 16) == 0x7f);
}

static void pending_signals(void) {
    int numbers[] = {SIGURG, SIGUSR1, SIGTERM, SIGWINCH, 35};
    sigset_t set, found;
    siginfo_t info;
    struct timespec now = {0, 0};
    sigfillset(&set);
    sigprocmask(SIG_BLOCK, &set, 0);
    for (int i = 0; i < 5; i++)
        NEED(sigqueue(getpid(), numbers[i], (union sigval){.sival_int = i}) == 0);
    NEED(raise(SIGUSR2) == 0);
    hold();
    sigprocmask(SIG_BLOCK, 0, &found);
    for (int i = 1; i < 65; i++)
        NEED(i == SIGKILL || i == SIGSTOP || i == 32 || i == 33 || sigismember(&found, i));
    for (int i = 0; i < 5; i++) {
        sigemptyset(&set);
        sigaddset(&set, numbers[i]);
        NEED(sigtimedwait(&set, &info, &now) == numbers[i]);
        NEED(info.si_code == SI_QUEUE && info.si_value.sival_int == i);
    }
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    /* By the bare call: the C library's shows a signal of raise(3) as one of kill(2). */
    NEED(syscall(SYS_rt_sigtimedwait, &set, &info, &now, 8) == SIGUSR2 && info.si_code == SI_TKILL);
}

static void one_blocked(int pending) {
    sigset_t set, found;
    sigemptyset(&set);
    sigaddset(&set, SIGURG);
    sigprocmask(SIG_BLOCK, &set, 0);
    if (pending) raise(SIGURG);
    hold();
    NEED(sigpending(&found) == 0 && sigismember(&found, SIGURG) == pending);
    NEED(sigprocmask(SIG_BLOCK, 0, &found) == 0 && sigismember(&found, SIGURG));
}

static void urg_blocked(void) { one_blocked(0); }
static void urg_pending(void) { one_blocked(1); }

static void stopped_child(void) {
    int status;
    pid_t child = fork();
    if (!child) for (;;) pause();
    NEED(kill(child, SIGSTOP) == 0 && waitpid(child, &status, WUNTRACED) == child);
    NEED(kill(child, SIGTERM) == 0); /* waits, unblocked, for the child to go on */
    hold();
    NEED(waitpid(child, &status, WNOHANG) == 0 && kill(child, SIGCONT) == 0);
    NEED(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM);
}

static void limits_of_user(void) {
    struct rlimit files = {100, 200}, core = {0, 0}, found;
    NEED(chmod(".", 0777) == 0 && setrlimit(RLIMIT_NOFILE, &files) == 0 && setrlimit(RLIMIT_CORE, &core) == 0);
    NEED(setresgid(1000, 1000, 1000) == 0 && setresuid(1000, 1000, 1000) == 0);
    NEED(prctl(PR_SET_DUMPABLE, 1) == 0);
    hold();
    NEED(getrlimit(RLIMIT_NOFILE, &found) == 0 && found.rlim_cur == 100 && found.rlim_max == 200);
    NEED(getrlimit(RLIMIT_CORE, &found) == 0 && found.rlim_max == 0);
    NEED(getuid() == 1000 && geteuid() == 1000 && prctl(PR_GET_DUMPABLE) == 1);
}

static void every_cpu(void) {
    cpu_set_t before, after;
    sched_getaffinity(0, sizeof before, &before);
    hold();
    NEED(sched_getaffinity(0, sizeof after, &after) == 0 && CPU_EQUAL(&before, &after));
}

static void last_cpu(void) {
    cpu_set_t set;
    sched_getaffinity(0, sizeof set, &set);
    for (int i = 0; CPU_COUNT(&set) > 1; i++) CPU_CLR(i, &set);
    NEED(sched_setaffinity(0, sizeof set, &set) == 0);
    every_cpu();
}

/* Stays in a restartable sequence for a while. The kernel forgets it on the way into a stop, so who
 * moves the thread must abort it: otherwise the loop sees that it is inside of nothing. */
static void critical_section(void) {
    struct rseq *area = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
    static struct __attribute__((aligned(32))) { uint32_t version, flags; uint64_t start, length, abort; } section;
    NEED(__rseq_size > 0);
    tell("ready", "ready");
    while (!may_go()) {
        int lost = 0;
        long turns = 300000;
        __asm__ volatile(
            "lea 1f(%%rip),%%rax; mov %%rax,8(%[section]); lea 2f(%%rip),%%rcx; sub %%rax,%%rcx\n"
            "mov %%rcx,16(%[section]); lea 4f(%%rip),%%rax; mov %%rax,24(%[section])\n"
            "mov %[section],8(%[area])\n"
            "1: cmpq $0,8(%[area]); je 5f; dec %[turns]; jnz 1b; jmp 6f\n"
            "5: movl $1,%[lost]\n"
            "6: nop\n"
            "2: jmp 3f\n"
            ".byte 0x0f,0xb9,0x3d; .long 0x53053053\n" /* the signature before an abort handler */
            "4: nop\n"
            "3: movq $0,8(%[area])\n"
            : [lost] "+r"(lost), [turns] "+r"(turns)
            : [section] "r"(&section), [area] "r"(area)
            : "rax", "rcx", "memory");
        NEED(!lost);
    }
}

static void epoll_timeout(void) {
    struct timespec began, ended;
    struct epoll_event event;
    int watch = epoll_create1(0);
    tell("ready", "ready");
    clock_gettime(CLOCK_MONOTONIC, &began);
    NEED(epoll_wait(watch, &event, 1, 1500) == 0);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    long ms = (ended.tv_sec - began.tv_sec) * 1000 + (ended.tv_nsec - began.tv_nsec) / 1000000;
    NEED(ms >= 1499);
}

#include "stateful_refused.h"

static const struct { const char *name; void (*run)(void); } MODES[] = {
#define MODE(name) {#name, name}
    MODE(temporary_files), MODE(sealed_memory), MODE(right_to_write), MODE(many_timers), MODE(many_signals),
    MODE(many_mappings), MODE(many_descriptors), MODE(robust_mutex), MODE(odd_name), MODE(attributes),
    MODE(pending_signals), MODE(urg_blocked), MODE(urg_pending), MODE(stopped_child), MODE(limits_of_user),
    MODE(every_cpu), MODE(last_cpu), MODE(critical_section), MODE(epoll_timeout), MODE(leader_ended),
    MODE(child_leader_ended), MODE(thread_user), MODE(thread_sandbox), MODE(semaphores), MODE(queues),
    MODE(guard_pages), MODE(write_or_execute), MODE(removed_directory), MODE(shared_table), MODE(vforks),
    MODE(execs), MODE(ending_threads), MODE(forks), MODE(stops), MODE(server),
};

int main(int count, char **given) {
    words = given;
    if (count != 3 || chdir(given[1])) return 2;
    for (size_t i = 0; i < sizeof MODES / sizeof MODES[0]; i++)
        if (!strcmp(MODES[i].name, given[2])) {
            MODES[i].run();
            end("ok");
        }
    return 2;
}

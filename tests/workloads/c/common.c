#define _GNU_SOURCE
#include "common.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

bool wl_takes_signals;

static int alive_fd, log_fd, option_count;
static char **options;
static pid_t own_pid;
static uint64_t alive_count;
static atomic_flag verdict_given = ATOMIC_FLAG_INIT;
static sigjmp_buf after_fault;
static volatile sig_atomic_t fault_expected;

enum { BEAT_NS = 20 * MS, NAP_AT_LEAST_NS = MS, MOST_BEHIND_NS = 50 * MS };

void wl_init(int argc, char **argv)
{
    if (argc < 2 || chdir(argv[1]) != 0) {
        fprintf(stderr, "usage: %s DIR [name=number]...\n", argv[0]);
        exit(2);
    }
    options = argv + 2;
    option_count = argc - 2;
    own_pid = getpid();
    alive_fd = open("alive", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    /* No O_APPEND: a file offset that is lost shows as a gap or an overlap. */
    log_fd = open("log", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    CHECK(alive_fd >= 0 && log_fd >= 0, "open: %s", strerror(errno));
}

uint64_t wl_opt(const char *name, uint64_t otherwise)
{
    size_t length = strlen(name);
    for (int i = 0; i < option_count; i++)
        if (strncmp(options[i], name, length) == 0 && options[i][length] == '=')
            return strtoull(options[i] + length + 1, NULL, 10);
    return otherwise;
}

void wl_alive(void)
{
    char line[32];
    alive_count++;
    int length = snprintf(line, sizeof line, "%020llu\n", (unsigned long long)alive_count);
    ssize_t logged = write(log_fd, line, (size_t)length);
    CHECK(logged == length, "log: write gave %zd: %s", logged, strerror(errno));
    ssize_t shown = pwrite(alive_fd, line, (size_t)length, 0);
    CHECK(shown == length, "alive: pwrite gave %zd: %s", shown, strerror(errno));
    /* The system call, not a value that a library may have kept. */
    pid_t pid = (pid_t)syscall(SYS_getpid);
    CHECK(pid == own_pid, "pid was %d, is %d", own_pid, pid);
}

uint64_t wl_alive_count(void)
{
    return alive_count;
}

bool wl_stopping(void)
{
    return access("stop", F_OK) == 0;
}

static void give_verdict(const char *prefix, const char *format, va_list args)
{
    while (atomic_flag_test_and_set(&verdict_given))
        pause(); /* Another thread was first and ends the process. */
    char text[600], name[40];
    size_t used = (size_t)snprintf(text, sizeof text, "%s", prefix);
    vsnprintf(text + used, sizeof text - used - 1, format, args);
    strcat(text, "\n");
    snprintf(name, sizeof name, "result.%d", getpid());
    int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0 || write(fd, text, strlen(text)) < 0 || rename(name, "result") != 0)
        fprintf(stderr, "no verdict left: %s", text);
}

void wl_bad(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    give_verdict("bad: ", format, args);
    va_end(args);
    if (getsid(0) == getpgrp()) {
        /* Our session is ours alone: end the children too. */
        signal(SIGTERM, SIG_IGN);
        kill(0, SIGTERM);
    }
    _exit(1);
}

static void verify_log(void)
{
    CHECK(lseek(log_fd, 0, SEEK_SET) == 0, "log: lseek: %s", strerror(errno));
    FILE *log = fdopen(log_fd, "r");
    CHECK(log != NULL, "log: fdopen: %s", strerror(errno));
    char line[64], expected[64];
    uint64_t number = 0;
    while (fgets(line, sizeof line, log) != NULL) {
        number++;
        snprintf(expected, sizeof expected, "%020llu\n", (unsigned long long)number);
        CHECK(strcmp(line, expected) == 0, "log: line %llu is %.30s", (unsigned long long)number, line);
    }
    CHECK(number == alive_count, "log has %llu lines, %llu were written", (unsigned long long)number,
          (unsigned long long)alive_count);
}

void wl_ok(const char *format, ...)
{
    va_list args;
    verify_log();
    va_start(args, format);
    give_verdict("ok ", format, args);
    va_end(args);
    _exit(0);
}

int64_t wl_now(clockid_t clock)
{
    struct timespec now;
    CHECK(clock_gettime(clock, &now) == 0, "clock_gettime: %s", strerror(errno));
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

void wl_nap(int64_t length_ns)
{
    int64_t end = wl_now(CLOCK_MONOTONIC) + length_ns;
    struct timespec until = {.tv_sec = end / 1000000000, .tv_nsec = end % 1000000000};
    int error;
    while ((error = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL)) == EINTR)
        CHECK(wl_takes_signals, "clock_nanosleep was interrupted");
    CHECK(error == 0, "clock_nanosleep: %s", strerror(error));
    CHECK(wl_now(CLOCK_MONOTONIC) >= end, "clock_nanosleep came back early");
}

void wl_marker(volatile unsigned char *where)
{
    for (unsigned i = 0; i < WL_MARKER_BYTES; i++)
        where[i] = (unsigned char)(i * 37 + 11);
}

bool wl_beat(void)
{
    static int64_t due_ns;
    int64_t now_ns = wl_now(CLOCK_MONOTONIC);
    if (now_ns < due_ns)
        return false;
    due_ns = now_ns + BEAT_NS;
    wl_alive();
    return wl_stopping();
}

void wl_pace(int64_t *due_ns, int64_t interval_ns)
{
    int64_t now_ns = wl_now(CLOCK_MONOTONIC);
    if (*due_ns < now_ns - MOST_BEHIND_NS)
        *due_ns = now_ns;
    *due_ns += interval_ns;
    if (*due_ns - now_ns >= NAP_AT_LEAST_NS)
        wl_nap(*due_ns - now_ns);
}

static void on_fault(int signal, siginfo_t *info, void *context)
{
    (void)context;
    CHECK(fault_expected, "%s at %p", strsignal(signal), info->si_addr);
    siglongjmp(after_fault, 1);
}

void wl_faults_catch(void)
{
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    CHECK(sigaction(SIGSEGV, &action, NULL) == 0 && sigaction(SIGBUS, &action, NULL) == 0, "sigaction");
}

bool wl_faults(volatile unsigned char *address, bool write)
{
    bool faulted = sigsetjmp(after_fault, 1) != 0;
    if (!faulted) {
        fault_expected = 1;
        if (write)
            *address = *address;
        else
            (void)*address;
    }
    fault_expected = 0;
    return faulted;
}

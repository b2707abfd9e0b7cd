/* The calls of calls_c: system calls made raw where the C library would change how they block. */
#define _GNU_SOURCE
#include "calls.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <unistd.h>

/* One futex word lies behind a marker, so that a test can spoil what a thread waits on. */
unsigned char wait_marker[WL_MARKER_BYTES + 16] __attribute__((aligned(16)));

#define GAVE(call, value, wanted)                                                                            \
    do {                                                                                                     \
        long gave_ = (long)(value);                                                                          \
        CHECK(gave_ == (long)(wanted), "%s: gave %ld: %s", (call)->name, gave_, gave_ < 0 ? strerror(errno) : ""); \
    } while (0)

static void make_pipe(struct call *call)
{
    CHECK(pipe2(call->fd, O_CLOEXEC) == 0, "pipe2: %s", strerror(errno));
}

static void send_number(struct call *call)
{
    uint64_t number = call->sent;
    GAVE(call, write(call->fd[1], &number, sizeof number), sizeof number);
}

static void take_number(struct call *call)
{
    uint64_t number = 0;
    GAVE(call, read(call->fd[0], &number, sizeof number), sizeof number);
    call->seen++;
    CHECK(number == call->seen, "%s: read %" PRIu64 ", expected %" PRIu64, call->name, number, call->seen);
}

static void poll_pipe(struct call *call)
{
    struct pollfd wanted = {.fd = call->fd[0], .events = POLLIN};
    GAVE(call, poll(&wanted, 1, -1), 1);
    CHECK(wanted.revents == POLLIN, "%s: revents %x", call->name, wanted.revents);
    take_number(call);
}

static void poll_timeout(struct call *call)
{
    struct pollfd wanted = {.fd = call->fd[0], .events = POLLIN};
    GAVE(call, poll(&wanted, 1, (int)(hold_ns / MS)), 0);
}

static void ppoll_timeout(struct call *call)
{
    struct pollfd wanted = {.fd = call->fd[0], .events = POLLIN};
    struct timespec length = to_timespec(hold_ns);
    GAVE(call, ppoll(&wanted, 1, &length, NULL), 0);
}

static void select_timeout(struct call *call)
{
    fd_set set;
    FD_ZERO(&set);
    FD_SET(call->fd[0], &set);
    struct timeval length = {.tv_sec = hold_ns / 1000000000, .tv_usec = hold_ns % 1000000000 / 1000};
    GAVE(call, select(call->fd[0] + 1, &set, NULL, NULL, &length), 0);
    CHECK(!FD_ISSET(call->fd[0], &set), "select: marked a descriptor");
}

static void nanosleep_blind(struct call *call)
{
    struct timespec length = to_timespec(hold_ns);
    GAVE(call, syscall(SYS_nanosleep, &length, NULL), 0);
}

static void nanosleep_remaining(struct call *call)
{
    struct timespec length = to_timespec(hold_ns), rest = {.tv_sec = 77};
    GAVE(call, syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &length, &rest), 0);
}

static void nanosleep_absolute(struct call *call)
{
    struct timespec until = to_timespec(call->started_ns + hold_ns);
    GAVE(call, syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL), 0);
}

static void futex_timeout(struct call *call)
{
    struct timespec length = to_timespec(hold_ns);
    uint32_t *word = (uint32_t *)(wait_marker + WL_MARKER_BYTES);
    long gave = syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, 0, &length, NULL, 0);
    CHECK(gave == -1 && errno == ETIMEDOUT, "%s: gave %ld: %s", call->name, gave, strerror(errno));
}

static void futex_absolute(struct call *call)
{
    struct timespec until = to_timespec(call->started_ns + hold_ns);
    long gave = syscall(SYS_futex, &call->futex, FUTEX_WAIT_BITSET_PRIVATE, 0, &until, NULL, FUTEX_BITSET_MATCH_ANY);
    CHECK(gave == -1 && errno == ETIMEDOUT, "%s: gave %ld: %s", call->name, gave, strerror(errno));
}

static uint32_t *word_of(struct call *call)
{
    return &call->futex;
}

static void futex_forever(struct call *call)
{
    uint32_t before = (uint32_t)call->seen;
    long gave = syscall(SYS_futex, word_of(call), FUTEX_WAIT_PRIVATE, before, NULL, NULL, 0);
    CHECK(gave == 0 || errno == EAGAIN, "%s: gave %ld: %s", call->name, gave, strerror(errno));
    call->seen++;
    CHECK(__atomic_load_n(word_of(call), __ATOMIC_SEQ_CST) == before + 1, "%s: woken without cause", call->name);
}

static void futex_wake(struct call *call)
{
    __atomic_add_fetch(word_of(call), 1, __ATOMIC_SEQ_CST);
    CHECK(syscall(SYS_futex, word_of(call), FUTEX_WAKE_PRIVATE, 1) >= 0, "%s: wake", call->name);
}

static void make_epoll(struct call *call)
{
    make_pipe(call);
    call->epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = (uintptr_t)call};
    CHECK(call->epoll >= 0 && epoll_ctl(call->epoll, EPOLL_CTL_ADD, call->fd[0], &event) == 0, "epoll_ctl");
}

static void epoll_timeout(struct call *call)
{
    struct epoll_event event;
    GAVE(call, epoll_wait(call->epoll, &event, 1, (int)(hold_ns / MS)), 0);
}

static void epoll_forever(struct call *call)
{
    struct epoll_event event = {0};
    GAVE(call, epoll_wait(call->epoll, &event, 1, -1), 1);
    CHECK(event.events == EPOLLIN && event.data.u64 == (uintptr_t)call, "%s: wrong event", call->name);
    take_number(call);
}

static void sigtimedwait_timeout(struct call *call)
{
    sigset_t set;
    struct timespec length = to_timespec(hold_ns);
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 1);
    int gave = sigtimedwait(&set, NULL, &length);
    CHECK(gave == -1 && errno == EAGAIN, "%s: gave %d: %s", call->name, gave, strerror(errno));
}

static void sigwait_forever(struct call *call)
{
    sigset_t set;
    siginfo_t info;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 2);
    GAVE(call, sigwaitinfo(&set, &info), SIGRTMIN + 2);
    call->seen++;
    CHECK(info.si_value.sival_int == (int)call->seen && info.si_pid == getpid(), "%s: wrong siginfo", call->name);
}

static void sigwait_wake(struct call *call)
{
    union sigval value = {.sival_int = (int)call->sent};
    CHECK(sigqueue(getpid(), SIGRTMIN + 2, value) == 0, "sigqueue: %s", strerror(errno));
}

/* Counted by the handler in whichever thread asked for the signal. */
static __thread volatile uint64_t usr1_seen;

static void on_usr1(int signal)
{
    (void)signal;
    usr1_seen++;
}

void catch_usr1(void)
{
    struct sigaction action = {.sa_handler = on_usr1};
    sigset_t set;
    CHECK(sigaction(SIGUSR1, &action, NULL) == 0, "sigaction");
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGRTMIN + 1);
    sigaddset(&set, SIGRTMIN + 2);
    CHECK(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0, "sigmask");
}

static void suspended(struct call *call)
{
    sigset_t none;
    sigfillset(&none);
    sigdelset(&none, SIGUSR1);
    int gave = sigsuspend(&none);
    CHECK(gave == -1 && errno == EINTR, "%s: gave %d: %s", call->name, gave, strerror(errno));
    call->seen++;
    CHECK(usr1_seen == call->seen, "%s: %" PRIu64 " signals for %" PRIu64 " returns", call->name, usr1_seen, call->seen);
}

static void paused(struct call *call)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    CHECK(pthread_sigmask(SIG_UNBLOCK, &set, NULL) == 0, "sigmask");
    int gave = pause();
    CHECK(gave == -1 && errno == EINTR, "%s: gave %d: %s", call->name, gave, strerror(errno));
    call->seen++;
    CHECK(usr1_seen == call->seen, "%s: %" PRIu64 " signals for %" PRIu64 " returns", call->name, usr1_seen, call->seen);
}

static void usr1_wake(struct call *call)
{
    CHECK(pthread_kill(call->thread, SIGUSR1) == 0, "pthread_kill");
}

/* Raw calls only: this runs in the copy of one thread among many. */
static _Noreturn void be_a_child(pid_t parent, int code)
{
    struct timespec length = to_timespec(hold_ns + MS);
    long pid = syscall(SYS_getpid);
    if (syscall(SYS_nanosleep, &length, NULL) != 0)
        _exit(101);
    if (syscall(SYS_getpid) != pid)
        _exit(102);
    _exit(syscall(SYS_getppid) == parent ? code : 103);
}

static void wait_child(struct call *call)
{
    int status = 0, code = (int)(++call->seen % 64);
    pid_t parent = getpid(), child = fork();
    CHECK(child >= 0, "fork: %s", strerror(errno));
    if (child == 0)
        be_a_child(parent, code);
    GAVE(call, syscall(SYS_wait4, child, &status, 0, NULL), child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == code, "wait4: status %x, expected exit %d", status, code);
}

static void make_eventfd(struct call *call)
{
    call->fd[0] = call->fd[1] = eventfd(0, EFD_CLOEXEC);
    CHECK(call->fd[0] >= 0, "eventfd: %s", strerror(errno));
}

static void read_eventfd(struct call *call)
{
    uint64_t number = 0;
    GAVE(call, read(call->fd[0], &number, sizeof number), sizeof number);
    call->seen++;
    CHECK(number == call->seen, "%s: read %" PRIu64 ", expected %" PRIu64, call->name, number, call->seen);
}

static void make_timerfd(struct call *call)
{
    call->fd[0] = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    CHECK(call->fd[0] >= 0, "timerfd_create: %s", strerror(errno));
}

static void read_timerfd(struct call *call)
{
    uint64_t ticks = 0;
    struct itimerspec once = {.it_value = to_timespec(hold_ns)};
    CHECK(timerfd_settime(call->fd[0], 0, &once, NULL) == 0, "timerfd_settime: %s", strerror(errno));
    GAVE(call, read(call->fd[0], &ticks, sizeof ticks), sizeof ticks);
    CHECK(ticks == 1, "%s: %" PRIu64 " ticks", call->name, ticks);
}

static void make_socketpair(struct call *call)
{
    struct timeval length = {.tv_sec = hold_ns / 1000000000, .tv_usec = hold_ns % 1000000000 / 1000};
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, call->fd) == 0, "socketpair");
    CHECK(setsockopt(call->fd[0], SOL_SOCKET, SO_RCVTIMEO, &length, sizeof length) == 0, "SO_RCVTIMEO");
}

static void recv_timeout(struct call *call)
{
    char byte;
    /* The kernel rounds to jiffies; wait again for what is missing. */
    do {
        ssize_t gave = recv(call->fd[0], &byte, 1, 0);
        CHECK(gave == -1 && errno == EAGAIN, "%s: gave %zd: %s", call->name, gave, strerror(errno));
        CHECK(wl_now(CLOCK_MONOTONIC) - call->started_ns > hold_ns - 20 * MS, "%s: early", call->name);
    } while (wl_now(CLOCK_MONOTONIC) - call->started_ns < hold_ns);
}

struct call calls[] = {
    {.name = "read pipe", .prepare = make_pipe, .round = take_number, .wake = send_number},
    {.name = "poll", .prepare = make_pipe, .round = poll_pipe, .wake = send_number},
    {.name = "poll timeout", .prepare = make_pipe, .round = poll_timeout},
    {.name = "ppoll timeout", .prepare = make_pipe, .round = ppoll_timeout},
    {.name = "select timeout", .prepare = make_pipe, .round = select_timeout},
    {.name = "nanosleep", .round = nanosleep_blind},
    {.name = "clock_nanosleep rem", .round = nanosleep_remaining},
    {.name = "clock_nanosleep abs", .round = nanosleep_absolute},
    {.name = "futex timeout", .round = futex_timeout},
    {.name = "futex abs", .round = futex_absolute},
    {.name = "futex", .round = futex_forever, .wake = futex_wake},
    {.name = "epoll timeout", .prepare = make_epoll, .round = epoll_timeout},
    {.name = "epoll", .prepare = make_epoll, .round = epoll_forever, .wake = send_number},
    {.name = "sigtimedwait timeout", .round = sigtimedwait_timeout},
    {.name = "sigwaitinfo", .round = sigwait_forever, .wake = sigwait_wake},
    {.name = "sigsuspend", .round = suspended, .wake = usr1_wake},
    {.name = "pause", .round = paused, .wake = usr1_wake, .wake_asleep = true},
    {.name = "wait4", .round = wait_child},
    {.name = "read eventfd", .prepare = make_eventfd, .round = read_eventfd, .wake = send_number},
    {.name = "read timerfd", .prepare = make_timerfd, .round = read_timerfd},
    {.name = "recv timeout", .prepare = make_socketpair, .round = recv_timeout},
};
const unsigned call_count = sizeof calls / sizeof calls[0];

/* eventfd, timerfd, signalfd, and an epoll that watches several of them. */
#define _GNU_SOURCE
#include "fds.h"

#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum { SEMAPHORE_VALUE = 5, TICK = 10 * MS, HOUR_S = 3600 };
#define LARGE_COUNT 0x100000005ull

enum tag { TAG_SEMAPHORE = 1, TAG_EMPTY, TAG_SIGNAL, TAG_ONCE, TAG_INNER, TAG_ZERO };
static const uint64_t TAG_HIGH = 0xabcdef0100000000u;

static int semaphore_fd, counter_fd, empty_fd, ticks_fd, far_fd, signal_fd, epoll_fd, inner_fd, once_fd;
static uint64_t counter, ticks;
static int64_t started_ns, far_end_ns;
static int queued;

static void queue_signal(void)
{
    union sigval value = {.sival_int = ++queued};
    MUST(sigqueue(getpid(), SIGRTMIN + 4, value), 0);
}

static void watch(int epoll, int fd, uint32_t events, enum tag tag)
{
    struct epoll_event event = {.events = events, .data.u64 = TAG_HIGH + tag};
    MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event), 0);
}

static void start_epoll(void)
{
    epoll_fd = opened(epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
    inner_fd = opened(epoll_create1(0), "epoll_create1");
    once_fd = opened(eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC), "eventfd");
    watch(epoll_fd, semaphore_fd, EPOLLIN, TAG_SEMAPHORE);
    watch(epoll_fd, empty_fd, EPOLLIN, TAG_EMPTY);
    watch(epoll_fd, signal_fd, EPOLLIN, TAG_SIGNAL);
    watch(epoll_fd, once_fd, EPOLLIN | EPOLLONESHOT, TAG_ONCE);
    watch(inner_fd, counter_fd, EPOLLIN, TAG_ZERO);
    watch(epoll_fd, inner_fd, EPOLLIN, TAG_INNER);
}

void events_start(void)
{
    sigset_t set;
    semaphore_fd = opened(eventfd(SEMAPHORE_VALUE, EFD_SEMAPHORE | EFD_NONBLOCK), "eventfd");
    counter_fd = opened(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), "eventfd");
    counter = LARGE_COUNT;
    MUST(write(counter_fd, &counter, sizeof counter), sizeof counter);
    empty_fd = opened(eventfd(0, EFD_NONBLOCK), "eventfd");
    ticks_fd = opened(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC), "timerfd_create");
    far_fd = opened(timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK), "timerfd_create");
    struct itimerspec often = {{0, TICK}, {0, TICK}}, far = {.it_value = {.tv_sec = HOUR_S}};
    started_ns = wl_now(CLOCK_MONOTONIC);
    MUST(timerfd_settime(ticks_fd, 0, &often, NULL), 0);
    MUST(timerfd_settime(far_fd, 0, &far, NULL), 0);
    far_end_ns = started_ns + (int64_t)HOUR_S * 1000 * MS;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 4);
    MUST(sigprocmask(SIG_BLOCK, &set, NULL), 0);
    signal_fd = opened(signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC), "signalfd");
    queue_signal();
    queue_signal();
    start_epoll();
}

static void check_eventfds(uint64_t round)
{
    uint64_t value = 0, two = 2;
    MUST(write(semaphore_fd, &two, sizeof two), sizeof two);
    for (unsigned i = 0; i < 2; i++) {
        MUST(read(semaphore_fd, &value, sizeof value), sizeof value);
        CHECK(value == 1, "the semaphore gave %" PRIu64, value);
    }
    if (round % 16 == 15) {
        for (unsigned i = 0; i < SEMAPHORE_VALUE; i++)
            MUST(read(semaphore_fd, &value, sizeof value), sizeof value);
        CHECK(read(semaphore_fd, &value, sizeof value) == -1 && errno == EAGAIN, "the semaphore held more");
        value = SEMAPHORE_VALUE;
        MUST(write(semaphore_fd, &value, sizeof value), sizeof value);
    }
    MUST(read(counter_fd, &value, sizeof value), sizeof value);
    CHECK(value == counter, "the counter gave %" PRIx64 ", not %" PRIx64, value, counter);
    counter++;
    MUST(write(counter_fd, &counter, sizeof counter), sizeof counter);
    CHECK(read(empty_fd, &value, sizeof value) == -1 && errno == EAGAIN, "an empty eventfd gave %" PRIu64, value);
}

static void check_timerfds(void)
{
    uint64_t more = 0;
    struct itimerspec left;
    ssize_t gave = read(ticks_fd, &more, sizeof more);
    CHECK(gave == sizeof more || (gave == -1 && errno == EAGAIN), "timerfd: %s", strerror(errno));
    ticks += more;
    int64_t due = (wl_now(CLOCK_MONOTONIC) - started_ns) / TICK;
    CHECK((int64_t)ticks <= due, "timerfd: %" PRIu64 " ticks where %" PRId64 " were due", ticks, due);
    CHECK((int64_t)ticks >= due - late_ns / TICK - 1, "timerfd: %" PRIu64 " ticks where %" PRId64 " were due", ticks, due);
    MUST(timerfd_gettime(ticks_fd, &left), 0);
    CHECK(left.it_interval.tv_nsec == TICK && left.it_value.tv_nsec <= TICK, "the timerfd changed its interval");
    MUST(timerfd_gettime(far_fd, &left), 0);
    int64_t end = wl_now(CLOCK_MONOTONIC) + (int64_t)left.it_value.tv_sec * 1000 * MS + left.it_value.tv_nsec;
    CHECK(end - far_end_ns <= late_ns && far_end_ns - end <= late_ns, "the far timerfd moved by %" PRId64 " ns",
          end - far_end_ns);
}

static void check_signalfd(void)
{
    struct signalfd_siginfo info;
    MUST(read(signal_fd, &info, sizeof info), sizeof info);
    CHECK((int)info.ssi_signo == SIGRTMIN + 4 && info.ssi_int == queued - 1 && (pid_t)info.ssi_pid == getpid() &&
              info.ssi_code == SI_QUEUE,
          "signalfd gave signal %u value %d of pid %u, expected value %d", info.ssi_signo, info.ssi_int, info.ssi_pid,
          queued - 1);
    queue_signal();
}

static void check_epoll(uint64_t round)
{
    struct epoll_event events[8];
    unsigned found = 0, wanted = 1u << TAG_SEMAPHORE | 1u << TAG_SIGNAL | 1u << TAG_INNER;
    /* The one-shot watch fires once after it was set, then never again until it is set anew. */
    if (round % 8 == 0)
        wanted |= 1u << TAG_ONCE;
    int count = epoll_wait(epoll_fd, events, 8, 0);
    CHECK(count >= 0, "epoll_wait: %s", strerror(errno));
    for (int i = 0; i < count; i++) {
        uint64_t tag = events[i].data.u64 - TAG_HIGH;
        CHECK(tag < 32 && events[i].events == EPOLLIN, "epoll gave events %x with tag %" PRIx64, events[i].events, tag);
        found |= 1u << tag;
    }
    CHECK(found == wanted, "epoll found %x, not %x", found, wanted);
    MUST(epoll_wait(inner_fd, events, 8, 0), 1);
    CHECK(events[0].data.u64 == TAG_HIGH + TAG_ZERO, "the inner epoll gave a wrong tag");
    struct epoll_event again = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = TAG_HIGH + TAG_ONCE};
    if (round % 8 == 7)
        MUST(epoll_ctl(epoll_fd, EPOLL_CTL_MOD, once_fd, &again), 0);
}

void events_check(uint64_t round)
{
    check_eventfds(round);
    check_timerfds();
    check_signalfd();
    check_epoll(round);
}

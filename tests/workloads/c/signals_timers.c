/* Interval and POSIX timers, counted against the clock: never too many ticks, and none missing beyond late_ms. */
#define _GNU_SOURCE
#include "signals.h"

#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

enum { HOUR_S = 3600 };

struct ticker {
    const char *name;
    clockid_t clock;
    int signal, notify, value;
    int64_t interval_ns, started_ns, last_ns;
    timer_t timer;
    volatile _Atomic uint64_t ticks;
};

static struct ticker tickers[] = {
    {.name = "monotonic timer", .clock = CLOCK_MONOTONIC, .notify = SIGEV_SIGNAL, .value = 4711, .interval_ns = 10 * MS},
    {.name = "realtime timer", .clock = CLOCK_REALTIME, .notify = SIGEV_THREAD_ID, .value = -5, .interval_ns = 25 * MS},
};
static struct ticker alarm_ticker = {.name = "ITIMER_REAL", .interval_ns = 20 * MS};
static timer_t silent, far;
static int64_t far_end_ns;

static void on_timer(int signal, siginfo_t *info, void *context)
{
    (void)context;
    struct ticker *ticker = &tickers[signal == SIGNAL_TIMER_A ? 0 : 1];
    CHECK(info->si_code == SI_TIMER && info->si_value.sival_int == ticker->value, "%s: code %d value %d", ticker->name,
          info->si_code, info->si_value.sival_int);
    ticker->ticks += 1 + (uint64_t)info->si_overrun;
}

static void on_alarm(int signal)
{
    (void)signal;
    alarm_ticker.ticks++;
}

static struct itimerspec every(int64_t ns)
{
    struct timespec spec = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    return (struct itimerspec){.it_value = spec, .it_interval = spec};
}

static void start_ticker(struct ticker *ticker)
{
    struct sigevent event = {.sigev_notify = ticker->notify, .sigev_signo = ticker->signal};
    event.sigev_value.sival_int = ticker->value;
    if (ticker->notify == SIGEV_THREAD_ID)
        event.sigev_notify_thread_id = (pid_t)syscall(SYS_gettid);
    CHECK(timer_create(ticker->clock, &event, &ticker->timer) == 0, "timer_create: %s", strerror(errno));
    struct itimerspec interval = every(ticker->interval_ns);
    ticker->started_ns = ticker->last_ns = wl_now(CLOCK_MONOTONIC);
    CHECK(timer_settime(ticker->timer, 0, &interval, NULL) == 0, "timer_settime: %s", strerror(errno));
}

static void start_quiet_timers(void)
{
    struct sigevent event = {.sigev_notify = SIGEV_NONE};
    struct itimerspec interval = every(7 * MS), once = {.it_value = {.tv_sec = HOUR_S}};
    CHECK(timer_create(CLOCK_MONOTONIC, &event, &silent) == 0, "timer_create: %s", strerror(errno));
    CHECK(timer_settime(silent, 0, &interval, NULL) == 0, "timer_settime: %s", strerror(errno));
    event = (struct sigevent){.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGNAL_LONG_TIMER};
    CHECK(timer_create(CLOCK_MONOTONIC, &event, &far) == 0, "timer_create: %s", strerror(errno));
    far_end_ns = wl_now(CLOCK_MONOTONIC) + (int64_t)HOUR_S * 1000 * MS;
    CHECK(timer_settime(far, 0, &once, NULL) == 0, "timer_settime: %s", strerror(errno));
}

void timers_start(void)
{
    tickers[0].signal = SIGNAL_TIMER_A;
    tickers[1].signal = SIGNAL_TIMER_B;
    /* Timer signals may hit any thread that lets them through; the helpers of masks_start block them. */
    struct sigaction action = {.sa_sigaction = on_timer, .sa_flags = SA_SIGINFO | SA_RESTART};
    CHECK(sigaction(SIGNAL_TIMER_A, &action, NULL) == 0 && sigaction(SIGNAL_TIMER_B, &action, NULL) == 0, "sigaction");
    struct sigaction alarm_action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGALRM, &alarm_action, NULL) == 0 && sigaction(SIGPROF, &alarm_action, NULL) == 0, "sigaction");
    start_ticker(&tickers[0]);
    start_ticker(&tickers[1]);
    start_quiet_timers();
    struct itimerval interval = {{0, 20000}, {0, 20000}}, slow = {{1000, 0}, {1000, 0}};
    alarm_ticker.started_ns = alarm_ticker.last_ns = wl_now(CLOCK_MONOTONIC);
    CHECK(setitimer(ITIMER_REAL, &interval, NULL) == 0, "setitimer: %s", strerror(errno));
    /* CPU time: too slow to ever fire here, so that every SIGALRM counted is one of ITIMER_REAL. */
    CHECK(setitimer(ITIMER_PROF, &slow, NULL) == 0, "setitimer: %s", strerror(errno));
}

static void check_ticker(struct ticker *ticker)
{
    /* First the count, then the clock: a tick between the two must not look like one too many. */
    uint64_t ticks = ticker->ticks;
    int64_t now = wl_now(CLOCK_MONOTONIC);
    int64_t due = (now - ticker->started_ns) / ticker->interval_ns;
    CHECK((int64_t)ticks <= due + 1, "%s: %" PRIu64 " ticks where %" PRId64 " were due", ticker->name, ticks, due);
    if (ticker != &alarm_ticker) /* ITIMER_REAL has no overrun count: a busy machine loses ticks. */
        CHECK((int64_t)ticks >= due - late_ns / ticker->interval_ns, "%s: %" PRIu64 " ticks where %" PRId64 " were due",
              ticker->name, ticks, due);
    static uint64_t before[3];
    uint64_t *last = &before[ticker == &alarm_ticker ? 2 : ticker - tickers];
    if (ticks != *last)
        ticker->last_ns = now;
    *last = ticks;
    CHECK(now - ticker->last_ns <= late_ns, "%s: no tick for %" PRId64 " ns", ticker->name, now - ticker->last_ns);
}

void timers_check(void)
{
    struct itimerspec left;
    check_ticker(&tickers[0]);
    check_ticker(&tickers[1]);
    check_ticker(&alarm_ticker);
    CHECK(timer_gettime(silent, &left) == 0, "timer_gettime: %s", strerror(errno));
    CHECK(left.it_interval.tv_nsec == 7 * MS && left.it_value.tv_nsec <= 7 * MS, "the silent timer changed");
    CHECK(timer_gettime(far, &left) == 0, "timer_gettime: %s", strerror(errno));
    int64_t end = wl_now(CLOCK_MONOTONIC) + (int64_t)left.it_value.tv_sec * 1000 * MS + left.it_value.tv_nsec;
    CHECK(end - far_end_ns <= late_ns && far_end_ns - end <= late_ns, "the far timer moved by %" PRId64 " ns",
          end - far_end_ns);
    struct itimerval value;
    CHECK(getitimer(ITIMER_REAL, &value) == 0 && value.it_interval.tv_usec == 20000, "ITIMER_REAL changed");
    CHECK(getitimer(ITIMER_PROF, &value) == 0 && value.it_interval.tv_sec == 1000, "ITIMER_PROF changed");
}

void timers_end(void)
{
    struct itimerval none = {{0, 0}, {0, 0}};
    timers_check();
    CHECK(timer_delete(tickers[0].timer) == 0 && timer_delete(tickers[1].timer) == 0, "timer_delete");
    CHECK(timer_delete(silent) == 0 && timer_delete(far) == 0, "timer_delete");
    CHECK(setitimer(ITIMER_REAL, &none, NULL) == 0, "setitimer");
}

/* Each thread is blocked in another system call. None may return EINTR, early, very late, or without its cause.
   Options: hold_ms (how long a call blocks), late_ms (lateness allowed), skew_ms (between the two clocks). */
#define _GNU_SOURCE
#include "calls.h"

#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int64_t hold_ns, late_ns, skew_ns;
atomic_bool quit;

struct timespec to_timespec(int64_t ns)
{
    return (struct timespec){.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
}

static void verify_time(const struct call *call, int64_t monotonic_ns, int64_t real_ns)
{
    int64_t apart_ns = monotonic_ns - real_ns;
    CHECK(apart_ns < skew_ns && apart_ns > -skew_ns,
          "%s: CLOCK_MONOTONIC went %" PRId64 " ns, CLOCK_REALTIME %" PRId64 " ns", call->name, monotonic_ns, real_ns);
    if (call->wake != NULL)
        return;
    CHECK(monotonic_ns >= hold_ns, "%s: back after %" PRId64 " ns, early", call->name, monotonic_ns);
    CHECK(monotonic_ns <= hold_ns + late_ns, "%s: back after %" PRId64 " ns, late", call->name, monotonic_ns);
}

static void *run(void *argument)
{
    struct call *call = argument;
    call->tid = (pid_t)syscall(SYS_gettid);
    while (!quit || call->rounds < call->sent) {
        int64_t monotonic_ns = wl_now(CLOCK_MONOTONIC), real_ns = wl_now(CLOCK_REALTIME);
        if (call->wake == NULL)
            call->last_ns = monotonic_ns;
        call->started_ns = monotonic_ns;
        call->round(call);
        verify_time(call, wl_now(CLOCK_MONOTONIC) - monotonic_ns, wl_now(CLOCK_REALTIME) - real_ns);
        CHECK(call->tid == (pid_t)syscall(SYS_gettid), "%s: gettid changed", call->name);
        call->rounds++;
        CHECK(call->wake == NULL || call->rounds <= call->sent, "%s: returned unasked", call->name);
    }
    return NULL;
}

/* Tell whether a thread sleeps. One that is woken by a signal must not be just about to. */
static bool asleep(pid_t tid)
{
    char path[64], text[256];
    snprintf(path, sizeof path, "/proc/self/task/%d/stat", tid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    if (length <= 0)
        return false;
    text[length] = 0;
    const char *after_name = strrchr(text, ')');
    return after_name != NULL && after_name[1] == ' ' && after_name[2] == 'S';
}

/* Wake those that have waited long enough; notice those that did not come back. */
static void tend(struct call *call, bool last)
{
    int64_t now = wl_now(CLOCK_MONOTONIC), since_ns = now - call->last_ns;
    if (call->wake == NULL) {
        CHECK(since_ns < hold_ns + 2 * late_ns, "%s: has not returned for %" PRId64 " ns", call->name, since_ns);
    } else if (call->rounds < call->sent) {
        CHECK(since_ns < late_ns, "%s: was woken %" PRId64 " ns ago and sleeps on", call->name, since_ns);
    } else if (since_ns >= hold_ns && !last && (!call->wake_asleep || asleep(call->tid))) {
        call->last_ns = now;
        call->sent++;
        call->wake(call);
    }
}

static uint64_t total_rounds(void)
{
    uint64_t total = 0;
    for (unsigned i = 0; i < call_count; i++)
        total += calls[i].rounds;
    return total;
}

int main(int argc, char **argv)
{
    wl_init(argc, argv);
    hold_ns = (int64_t)wl_opt("hold_ms", 400) * MS;
    late_ns = (int64_t)wl_opt("late_ms", 3000) * MS;
    skew_ns = (int64_t)wl_opt("skew_ms", 1000) * MS;
    wl_marker(wait_marker);
    memset(wait_marker + WL_MARKER_BYTES, 0, 16);
    catch_usr1();
    for (unsigned i = 0; i < call_count; i++) {
        calls[i].last_ns = wl_now(CLOCK_MONOTONIC);
        if (calls[i].prepare != NULL)
            calls[i].prepare(&calls[i]);
        CHECK(pthread_create(&calls[i].thread, NULL, run, &calls[i]) == 0, "pthread_create");
    }
    uint64_t before = 0;
    while (!wl_stopping()) {
        wl_nap(10 * MS);
        for (unsigned i = 0; i < call_count; i++)
            tend(&calls[i], false);
        /* Alive is who sees all of them come back, not who waits for them. */
        uint64_t now = total_rounds();
        if (now > before)
            wl_alive();
        before = now;
    }
    /* A waiter that has answered all its wakes needs one more, after which it finds `quit`. */
    for (unsigned i = 0; i < call_count; i++)
        while (calls[i].wake != NULL && calls[i].rounds < calls[i].sent) {
            tend(&calls[i], true);
            wl_nap(MS);
        }
    for (unsigned i = 0; i < call_count; i++)
        calls[i].sent += calls[i].wake != NULL;
    quit = true; /* Only now, or a waiter could leave before its last wake is counted. */
    for (unsigned i = 0; i < call_count; i++)
        if (calls[i].wake != NULL) {
            while (calls[i].wake_asleep && !asleep(calls[i].tid))
                wl_nap(MS);
            calls[i].wake(&calls[i]);
        }
    for (unsigned i = 0; i < call_count; i++) {
        CHECK(pthread_join(calls[i].thread, NULL) == 0, "join");
        CHECK(calls[i].wake == NULL || calls[i].rounds == calls[i].sent, "%s: %" PRIu64 " rounds, %" PRIu64 " wakes",
              calls[i].name, calls[i].rounds, calls[i].sent);
        CHECK(calls[i].rounds > 0, "%s: never returned", calls[i].name);
    }
    wl_ok("%" PRIu64 " calls in %u threads", total_rounds(), call_count);
}

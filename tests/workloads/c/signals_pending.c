/* Signals that wait behind a mask, for the process and for one thread, and threads with masks of their own. */
#define _GNU_SOURCE
#include "signals.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { QUEUED = 5, KEEP_ROUNDS = 40, MASKED = 4 };

static int pending_rounds;
static uint64_t batch;

static int value_of(unsigned index)
{
    return (int)(wl_mix(batch * QUEUED + index) & 0x7fffffff);
}

static void queue_all(void)
{
    batch++;
    for (unsigned i = 0; i < QUEUED; i++) {
        union sigval value = {.sival_int = value_of(i)};
        CHECK(sigqueue(getpid(), SIGNAL_PENDING_A, value) == 0, "sigqueue: %s", strerror(errno));
        CHECK(pthread_sigqueue(pthread_self(), SIGNAL_PENDING_B, value) == 0, "pthread_sigqueue");
    }
    CHECK(kill(getpid(), SIGIO) == 0 && raise(SIGVTALRM) == 0, "kill: %s", strerror(errno));
}

static siginfo_t take(int signal)
{
    sigset_t set;
    siginfo_t info;
    struct timespec none = {0};
    sigemptyset(&set);
    sigaddset(&set, signal);
    /* Raw: sigtimedwait(3) of glibc turns SI_TKILL into SI_USER. */
    long gave = syscall(SYS_rt_sigtimedwait, &set, &info, &none, KERNEL_SIGSET_BYTES);
    CHECK(gave == signal, "signal %d is not pending: %s", signal, strerror(errno));
    CHECK(info.si_signo == signal && info.si_pid == getpid() && info.si_uid == getuid(), "signal %d: foreign siginfo",
          signal);
    return info;
}

static void take_all(void)
{
    for (unsigned i = 0; i < QUEUED; i++) {
        siginfo_t process = take(SIGNAL_PENDING_A), thread = take(SIGNAL_PENDING_B);
        CHECK(process.si_value.sival_int == value_of(i) && process.si_code == SI_QUEUE,
              "queued signal %u carries %d, code %d", i, process.si_value.sival_int, process.si_code);
        CHECK(thread.si_value.sival_int == value_of(i) && thread.si_code == SI_QUEUE,
              "thread signal %u carries %d, code %d", i, thread.si_value.sival_int, thread.si_code);
    }
    CHECK(take(SIGIO).si_code == SI_USER, "SIGIO lost its code");
    CHECK(take(SIGVTALRM).si_code == SI_TKILL, "SIGVTALRM lost its code");
    sigset_t left;
    CHECK(sigpending(&left) == 0 && sigisemptyset(&left), "more signals are pending than were sent");
}

void pending_start(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGNAL_PENDING_A);
    sigaddset(&set, SIGNAL_PENDING_B);
    sigaddset(&set, SIGIO);
    sigaddset(&set, SIGVTALRM);
    CHECK(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0, "sigmask");
    queue_all();
}

void pending_check(void)
{
    sigset_t pending;
    CHECK(sigpending(&pending) == 0, "sigpending: %s", strerror(errno));
    CHECK(sigismember(&pending, SIGNAL_PENDING_A) && sigismember(&pending, SIGNAL_PENDING_B) &&
              sigismember(&pending, SIGIO) && sigismember(&pending, SIGVTALRM) && !sigismember(&pending, SIGUSR1),
          "the set of pending signals changed");
    if (++pending_rounds % KEEP_ROUNDS == 0) {
        take_all();
        queue_all();
    }
}

static struct masked {
    pthread_t thread;
    sigset_t mask;
    _Atomic uint64_t sent, handled, checks;
    int last_value;
} masked[MASKED];
static __thread struct masked *own_mask;
static atomic_bool leave;

static void on_thread_signal(int signal, siginfo_t *info, void *context)
{
    (void)context;
    CHECK(own_mask != NULL, "signal %d hit a thread it was not sent to", signal);
    CHECK(info->si_value.sival_int == (int)(own_mask->handled + 1), "thread signal %d came for %" PRIu64,
          info->si_value.sival_int, own_mask->handled + 1);
    own_mask->handled++;
}

static void *live_masked(void *argument)
{
    struct masked *self = argument;
    sigset_t now;
    own_mask = self;
    CHECK(pthread_sigmask(SIG_SETMASK, &self->mask, NULL) == 0, "sigmask");
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &self->mask) == 0, "sigmask");
    stack_t stack = {.ss_size = 32768, .ss_sp = malloc(32768)}, there;
    CHECK(stack.ss_sp != NULL && sigaltstack(&stack, NULL) == 0, "sigaltstack");
    while (!leave || self->handled < self->sent) {
        CHECK(pthread_sigmask(SIG_SETMASK, NULL, &now) == 0, "sigmask");
        CHECK(memcmp(&now, &self->mask, KERNEL_SIGSET_BYTES) == 0, "thread %d lost its signal mask", (int)(self - masked));
        CHECK(sigaltstack(NULL, &there) == 0 && there.ss_sp == stack.ss_sp && there.ss_size == stack.ss_size,
              "thread %d lost its alternate stack", (int)(self - masked));
        self->checks++;
        wl_nap(7 * MS);
    }
    return NULL;
}

void masks_start(void)
{
    struct sigaction action = {.sa_sigaction = on_thread_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    CHECK(sigaction(SIGNAL_THREAD, &action, NULL) == 0, "sigaction");
    for (unsigned i = 0; i < MASKED; i++) {
        sigfillset(&masked[i].mask);
        sigdelset(&masked[i].mask, SIGNAL_THREAD);
        sigdelset(&masked[i].mask, SIGRTMIN + 10 + (int)i);
        CHECK(pthread_create(&masked[i].thread, NULL, live_masked, &masked[i]) == 0, "pthread_create");
    }
    /* The main thread must never take what is meant for one of these. */
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGNAL_THREAD);
    CHECK(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0, "sigmask");
}

void masks_check(void)
{
    for (unsigned i = 0; i < MASKED; i++) {
        if (masked[i].handled < masked[i].sent || masked[i].checks == 0)
            continue; /* It sleeps or has not begun; a signal lost for good shows as a hang at the end. */
        union sigval value = {.sival_int = (int)++masked[i].sent};
        CHECK(pthread_sigqueue(masked[i].thread, SIGNAL_THREAD, value) == 0, "pthread_sigqueue");
    }
}

void masks_end(void)
{
    int64_t end = wl_now(CLOCK_MONOTONIC) + late_ns;
    leave = true;
    for (unsigned i = 0; i < MASKED; i++) {
        while (masked[i].handled < masked[i].sent) {
            CHECK(wl_now(CLOCK_MONOTONIC) < end, "thread %u handled %" PRIu64 " signals of %" PRIu64, i,
                  masked[i].handled, masked[i].sent);
            wl_nap(MS);
        }
        CHECK(pthread_join(masked[i].thread, NULL) == 0, "join");
        CHECK(masked[i].checks > 0 && masked[i].sent > 0, "thread %u never ran", i);
    }
}

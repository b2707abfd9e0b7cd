/* Signal actions, masks, alternate stacks, pending signals with their siginfo, interval and POSIX timers.
   Option: late_ms, how much ticking time may be lost to being stopped, over the whole life. */
#define _GNU_SOURCE
#include "signals.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

int64_t late_ns;

enum { ALTSTACK_BYTES = 65536, PROBED = 8 };

static struct {
    unsigned char marker[WL_MARKER_BYTES];
    uint64_t on_altstack, elsewhere; /* how often each handler has run: kept twice to notice a change */
    uint64_t raised_on, raised_off;
} counts;
static char altstack[ALTSTACK_BYTES] __attribute__((aligned(64)));
static struct sigaction wanted[65];

static bool is_on_altstack(const volatile void *address)
{
    return (const volatile char *)address >= altstack && (const volatile char *)address < altstack + ALTSTACK_BYTES;
}

static void on_altstack(int signal, siginfo_t *info, void *context)
{
    volatile char here = 0;
    (void)context;
    CHECK(is_on_altstack(&here), "the handler of %d ran on the ordinary stack", signal);
    CHECK(info->si_pid == getpid() && info->si_code == SI_TKILL, "signal %d has a foreign siginfo", signal);
    counts.on_altstack++;
}

static void elsewhere(int signal)
{
    volatile char here = 0;
    CHECK(!is_on_altstack(&here), "the handler of %d ran on the alternate stack", signal);
    counts.elsewhere++;
}

static void install(int signal, struct sigaction action)
{
    CHECK(sigaction(signal, &action, NULL) == 0, "sigaction(%d): %s", signal, strerror(errno));
    CHECK(sigaction(signal, NULL, &wanted[signal]) == 0, "sigaction(%d): %s", signal, strerror(errno));
}

void actions_start(void)
{
    stack_t stack = {.ss_sp = altstack, .ss_size = ALTSTACK_BYTES};
    CHECK(sigaltstack(&stack, NULL) == 0, "sigaltstack: %s", strerror(errno));
    struct sigaction action = {.sa_sigaction = on_altstack, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};
    sigemptyset(&action.sa_mask);
    sigaddset(&action.sa_mask, SIGUSR1);
    sigaddset(&action.sa_mask, SIGRTMAX);
    install(SIGUSR1, action);
    install(SIGXCPU, action);
    struct sigaction plain = {.sa_handler = elsewhere, .sa_flags = SA_NODEFER};
    sigfillset(&plain.sa_mask);
    install(SIGUSR2, plain);
    install(SIGWINCH, plain);
    install(SIGRTMAX, plain);
    install(SIGPIPE, (struct sigaction){.sa_handler = SIG_IGN});
    install(SIGHUP, (struct sigaction){.sa_handler = SIG_IGN, .sa_flags = SA_RESTART});
    install(SIGCHLD, (struct sigaction){.sa_handler = SIG_DFL, .sa_flags = SA_NOCLDSTOP});
    wl_marker(counts.marker);
}

void actions_check(void)
{
    const int signals[PROBED] = {SIGUSR1, SIGXCPU, SIGUSR2, SIGWINCH, SIGRTMAX, SIGPIPE, SIGHUP, SIGCHLD};
    for (unsigned i = 0; i < PROBED; i++) {
        struct sigaction now, *then = &wanted[signals[i]];
        CHECK(sigaction(signals[i], NULL, &now) == 0, "sigaction: %s", strerror(errno));
        CHECK(now.sa_sigaction == then->sa_sigaction && now.sa_flags == then->sa_flags &&
                  memcmp(&now.sa_mask, &then->sa_mask, KERNEL_SIGSET_BYTES) == 0,
              "the action of signal %d changed", signals[i]);
    }
    stack_t stack;
    CHECK(sigaltstack(NULL, &stack) == 0 && stack.ss_sp == altstack && stack.ss_size == ALTSTACK_BYTES &&
              stack.ss_flags == 0,
          "the alternate stack changed");
    raise(SIGUSR1);
    raise(SIGXCPU);
    raise(SIGUSR2);
    raise(SIGRTMAX);
    raise(SIGPIPE);
    counts.raised_on += 2;
    counts.raised_off += 2;
    CHECK(counts.on_altstack == counts.raised_on, "%" PRIu64 " of %" PRIu64 " signals arrived on the altstack",
          counts.on_altstack, counts.raised_on);
    CHECK(counts.elsewhere == counts.raised_off, "%" PRIu64 " of %" PRIu64 " signals arrived", counts.elsewhere,
          counts.raised_off);
}

int main(int argc, char **argv)
{
    wl_init(argc, argv);
    wl_takes_signals = true;
    late_ns = (int64_t)wl_opt("late_ms", 5000) * MS;
    actions_start();
    pending_start();
    masks_start();
    timers_start();
    while (!wl_stopping()) {
        actions_check();
        pending_check();
        masks_check();
        timers_check();
        wl_alive();
        wl_nap(5 * MS);
    }
    timers_end();
    masks_end();
    wl_ok("%" PRIu64 " signals on the altstack", counts.on_altstack);
}

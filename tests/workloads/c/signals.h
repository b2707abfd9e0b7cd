/* The parts of signals_c: each has a start, a check that is called every few milliseconds, and an end check. */
#ifndef WORKLOAD_SIGNALS_H
#define WORKLOAD_SIGNALS_H

#include "common.h"

#include <signal.h>

extern int64_t late_ns;

void actions_start(void);
void actions_check(void);
void pending_start(void);
void pending_check(void);
void timers_start(void);
void timers_check(void);
void timers_end(void);
void masks_start(void);
void masks_check(void);
void masks_end(void);

/* Of the 128 bytes of a sigset_t the kernel fills eight; the rest is whatever was there. */
enum { KERNEL_SIGSET_BYTES = 8 };

/* Real-time signals, one use each. */
#define SIGNAL_PENDING_A (SIGRTMIN + 1)
#define SIGNAL_PENDING_B (SIGRTMIN + 2)
#define SIGNAL_TIMER_A (SIGRTMIN + 3)
#define SIGNAL_TIMER_B (SIGRTMIN + 4)
#define SIGNAL_THREAD (SIGRTMIN + 5)
#define SIGNAL_LONG_TIMER (SIGRTMIN + 6)

#endif

/* What every C workload shares: options, signs of life, the verdict. */
#ifndef WORKLOAD_COMMON_H
#define WORKLOAD_COMMON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

/* Enter the directory argv[1], take options from "name=number" arguments, open `alive` and `log`. */
void wl_init(int argc, char **argv);
uint64_t wl_opt(const char *name, uint64_t otherwise);

/* One more unit of work is done: count it in `alive`, append its number to `log`. One thread calls it. */
void wl_alive(void);
uint64_t wl_alive_count(void);
bool wl_stopping(void);

/* Write the verdict to `result` and end. wl_ok first reads `log` back: each number once, in order. */
_Noreturn void wl_bad(const char *format, ...) __attribute__((format(printf, 1, 2)));
_Noreturn void wl_ok(const char *format, ...) __attribute__((format(printf, 1, 2)));
#define CHECK(condition, ...)      \
    do {                           \
        if (!(condition))          \
            wl_bad(__VA_ARGS__);   \
    } while (0)

int64_t wl_now(clockid_t clock);
/* Sleep on CLOCK_MONOTONIC until a point in time. EINTR is a failure unless the program takes signals. */
extern bool wl_takes_signals;
void wl_nap(int64_t length_ns);

/* One thread calls it after each small step: every 20 ms a unit of work is done. True: it is time to stop. */
bool wl_beat(void);
/* Be called once in interval_ns on average, from *due_ns on, which begins as 0. Lost time is not made up for. */
void wl_pace(int64_t *due_ns, int64_t interval_ns);

/* Tell whether touching an address is answered with SIGSEGV or SIGBUS. Once caught, others are a verdict. */
void wl_faults_catch(void);
bool wl_faults(volatile unsigned char *address, bool write);

/* Sixteen bytes by which a test finds the state in memory from outside. Never a constant in the image. */
enum { WL_MARKER_BYTES = 16 };
void wl_marker(volatile unsigned char *where);

static inline uint64_t wl_mix(uint64_t x)
{
    /* splitmix64, Steele, Lea & Flood 2014: a bijection, so a changed word never hides. */
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

enum { MS = 1000000 };

#endif

/* A thread that is blocked in one kind of system call, over and over. */
#ifndef WORKLOAD_CALLS_H
#define WORKLOAD_CALLS_H

#include "common.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

struct call {
    const char *name;
    void (*round)(struct call *); /* Block once; return when the call has, after checking what it gave. */
    void (*wake)(struct call *);  /* Make `round` return; NULL for calls that end by their timeout. */
    void (*prepare)(struct call *);
    bool wake_asleep;             /* Wake it only while it sleeps: a signal before pause(2) is lost on it. */
    pthread_t thread;
    _Atomic pid_t tid;
    int fd[2], epoll;
    uint32_t futex;
    uint64_t seen;               /* for the thread alone: what it has counted or read so far */
    int64_t started_ns;          /* for the thread alone */
    _Atomic uint64_t rounds, sent;
    _Atomic int64_t last_ns;     /* when it was woken, or started its wait */
};

extern struct call calls[];
extern const unsigned call_count;
extern int64_t hold_ns, late_ns, skew_ns;
extern atomic_bool quit;
extern unsigned char wait_marker[WL_MARKER_BYTES + 16];

struct timespec to_timespec(int64_t ns);
void catch_usr1(void);

#endif

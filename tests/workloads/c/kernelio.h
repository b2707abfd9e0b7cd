/* The parts of kernelio_c: memory that the kernel itself reads and writes, missing or not. */
#ifndef WORKLOAD_KERNELIO_H
#define WORKLOAD_KERNELIO_H

#include "pages.h"

#include <stdatomic.h>

extern atomic_bool leave;

unsigned char *pages_of_own(size_t pages);
/* Give pages back, half of the time, so that the kernel finds none there. */
void maybe_drop(void *where, size_t pages, uint64_t *random);

/* A stream through a child: write(2) from here, checked there, readv(2) to here. */
void stream_start(void);
void *stream_write(void *nothing);
void *stream_read(void *nothing);
void stream_end(void);

void *read_file(void *nothing);
void *get_random(void *nothing);
void *take_signals(void *nothing);

/* A robust mutex and a condition variable, whose owner dies now and then. */
void locks_start(void);
void *take_turns(void *which);
void *die_with_lock(void *nothing);
uint64_t locks_end(void);

/* Threads that all touch the same page at the same moment, one of them by write(2). */
enum { CROWD = 4 };
void crowd_start(void);
void *be_crowd(void *which);

#endif

/* The parts of fds_c: each has a start and a check that leaves things as they were, but for what it counts. */
#ifndef WORKLOAD_FDS_H
#define WORKLOAD_FDS_H

#include "common.h"

#include <errno.h>
#include <string.h>
#include <sys/types.h>

extern int64_t late_ns;

void files_start(void);
void files_check(uint64_t round);
void sharing_start(void);
void sharing_check(uint64_t round);
void sharing_end(void);
void queues_start(void);
void queues_check(uint64_t round);
void events_start(void);
void events_check(uint64_t round);

/* Remember and compare flags and type of every open descriptor. */
void table_start(void);
void table_check(void);

#define MUST(call, wanted)                                                                                  \
    do {                                                                                                    \
        long gave_ = (long)(call);                                                                          \
        CHECK(gave_ == (long)(wanted), "%s gave %ld, not %ld: %s", #call, gave_, (long)(wanted),           \
              gave_ < 0 ? strerror(errno) : "no error");                                                   \
    } while (0)

static inline int opened(int fd, const char *what)
{
    CHECK(fd >= 0, "%s: %s", what, strerror(errno));
    return fd;
}

/* Byte number `at` of a stream of which every byte is known. */
static inline unsigned char stream_byte(uint64_t at)
{
    return (unsigned char)(wl_mix(at >> 3) >> (8 * (at & 7)));
}

static inline void stream_fill(unsigned char *bytes, size_t length, uint64_t at)
{
    for (size_t i = 0; i < length; i++)
        bytes[i] = stream_byte(at + i);
}

static inline void stream_verify(const char *name, const unsigned char *bytes, size_t length, uint64_t at)
{
    for (size_t i = 0; i < length; i++)
        CHECK(bytes[i] == stream_byte(at + i), "%s: byte %llu is %02x", name, (unsigned long long)(at + i), bytes[i]);
}

#endif

/* The parts of memory_c. */
#ifndef WORKLOAD_MEMORY_H
#define WORKLOAD_MEMORY_H

#include "common.h"

enum { PAGE = 4096, MOST_REGIONS = 16, PAGES_PER_STEP = 64 };

struct region {
    const char *name;
    unsigned char *start;
    size_t length;
    unsigned number;
    bool constant, hidden;   /* never rewritten; not readable most of the time */
    uint32_t *age;           /* how often each page was rewritten */
};

struct region *region_make(const char *name, void *where, size_t length, int protection, int flags, int fd);
void region_verify(const struct region *region);
/* Verify and rewrite a few pages of each region. */
void regions_step(uint64_t round);
void regions_verify(void);

void file_fill(int fd, size_t length);
/* What read(2) gives is what the mapping shows. */
void file_matches(int fd, const char *region_name, uint64_t round);
void cow_start(int fd);
void cow_step(int fd, uint64_t round);

void sparse_start(void);
void sparse_step(void);

void sharing_start(void);
void sharing_step(void);
void sharing_end(void);

#endif

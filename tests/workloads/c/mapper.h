/* The parts of mapper_c: regions with a model of what each of their pages holds, and what is done to them. */
#ifndef WORKLOAD_MAPPER_H
#define WORKLOAD_MAPPER_H

#include "pages.h"

enum kind { NOTHING, PRIVATE, HUGE, FILE_PRIVATE, MEMFD, SHARED, HEAP, GROWS_DOWN };
enum {
    PLACES = 12,
    HEAP_AT = PLACES,
    GROWING_AT,
    REGIONS,
    HEAP_PAGES = 1024,
    GROWN_LIMIT = 192,
    GROWN_AT_LEAST = 16
};

struct region {
    enum kind kind;       /* NOTHING: the place holds a reservation */
    unsigned char *start; /* of the first page, which is the highest one if it GROWS_DOWN */
    size_t pages, most;
    size_t offset;        /* FILE_PRIVATE: of the first page in the file, in pages */
    int fd;               /* MEMFD */
    uint64_t *keys;       /* what was written last, up to `most`; 0: nothing since it was mapped */
    unsigned char *access;
    uint64_t sum;         /* of all keys and their places */
};

extern struct region regions[REGIONS];
extern uint64_t randomness;
extern size_t place_pages; /* the room of one place */
extern const char *last_operation;

void regions_make(size_t room);
unsigned char *address_of(const struct region *region, size_t page);
void set_key(struct region *region, size_t page, uint64_t key);
void check(const struct region *region, size_t page);
void change(struct region *region, size_t page);
void check_all(void);
void audit(const struct region *region);
/* Pages are as if they had never been written. */
void forget(struct region *region, size_t first, size_t pages);
size_t pages_in_use(void);

/* Make room: a reservation that nobody can use, as runtimes with heaps of their own have. */
void reserve(unsigned char *start, size_t pages);
void map_at(struct region *region, size_t first, size_t pages, int how);
void protect(struct region *region, size_t first, size_t pages, int access);

void operate(size_t limit_pages);

#endif

/* Writes to each of many pages over and over, as fast as it can, and counts.
 *
 * usage: toucher FILE PAGES
 * FILE is mapped, shared: its first word is how many writes have been made.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, STRIDE = 7919, WRITES_IN_A_ROW = 1024 };

static void *map(size_t bytes, int flags, int fd)
{
    void *where = mmap(0, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (where == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return where;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    int fd = open(argv[1], O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        perror(argv[1]);
        return 1;
    }
    volatile uint64_t *written = map(PAGE, MAP_SHARED, fd);
    size_t pages = strtoull(argv[2], 0, 10), page = 0;
    unsigned char *array = map(pages * PAGE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    madvise(array, pages * PAGE, MADV_NOHUGEPAGE);
    /* The stride is a prime: every page comes once in each pass, and no page beside the one before. */
    for (uint64_t count = 0;;) {
        for (int i = 0; i < WRITES_IN_A_ROW; i++) {
            *(volatile uint64_t *)(array + page * PAGE) = count;
            page = (page + STRIDE) % pages;
        }
        count += WRITES_IN_A_ROW;
        *written = count;
    }
}

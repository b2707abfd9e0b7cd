/* Appends a numbered line every 2 ms, and checks 256 KiB of memory before each one.
   argv: FILE MARKER [MIB]. Two copies, or a lost or doubled line, show in the file.
   With MIB it also has so much more memory, of which each line checks and rewrites the next 128 KiB. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { WORDS = 32768, PART = 16384 };
static uint64_t words[WORDS];
static uint64_t *more;
static uint64_t parts;

static uint64_t wanted(uint64_t index, uint64_t line)
{
    return (index * 0x9E3779B97F4A7C15u) ^ (line * 0xBF58476D1CE4E5B9u);
}

static int turn(uint64_t *at, uint64_t count, uint64_t index, uint64_t was, uint64_t is)
{
    for (uint64_t i = 0; i < count && was > 0; i++)
        if (at[i] != wanted(index + i, was - 1))
            return 0;
    for (uint64_t i = 0; i < count; i++)
        at[i] = wanted(index + i, is);
    return 1;
}

/* The part of the memory whose turn it is; what it holds tells how often it has had its turn. */
static int turn_of_more(uint64_t line)
{
    uint64_t part = line % parts, times = line / parts;
    return turn(more + part * PART, PART, part * PART, times + 1, times + 1);
}

int main(int argc, char **argv)
{
    int fd = argc > 1 ? open(argv[1], O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
    if (fd < 0)
        return 2;
    parts = argc > 3 ? strtoull(argv[3], NULL, 10) * 8 : 0;
    if (parts) {
        more = mmap(NULL, parts * PART * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (more == MAP_FAILED)
            return 2;
        turn(more, parts * PART, 0, 0, 0);
    }
    const struct timespec nap = {0, 2000000};
    for (uint64_t line = 0;; line++) {
        if (!turn(words, WORDS, 0, line, line) || (parts && !turn_of_more(line))) {
            (void)!write(fd, "corrupt\n", 8);
            return 1;
        }
        char text[32];
        int length = snprintf(text, sizeof text, "%lu\n", (unsigned long)line);
        if (write(fd, text, (size_t)length) != length)
            return 3;
        nanosleep(&nap, NULL);
    }
}

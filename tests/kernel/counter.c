/* Appends a numbered line every 2 ms, and checks 256 KiB of memory before each one.
   argv: FILE MARKER. Two copies, or a lost or doubled line, show in the file. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { WORDS = 32768 };
static uint64_t words[WORDS];

static uint64_t wanted(uint64_t index, uint64_t line)
{
    return (index * 0x9E3779B97F4A7C15u) ^ (line * 0xBF58476D1CE4E5B9u);
}

int main(int argc, char **argv)
{
    int fd = argc > 1 ? open(argv[1], O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
    if (fd < 0)
        return 2;
    const struct timespec nap = {0, 2000000};
    for (uint64_t line = 0;; line++) {
        for (uint64_t i = 0; i < WORDS && line > 0; i++)
            if (words[i] != wanted(i, line - 1)) {
                (void)!write(fd, "corrupt\n", 8);
                return 1;
            }
        for (uint64_t i = 0; i < WORDS; i++)
            words[i] = wanted(i, line);
        char text[32];
        int length = snprintf(text, sizeof text, "%lu\n", (unsigned long)line);
        if (write(fd, text, (size_t)length) != length)
            return 3;
        nanosleep(&nap, NULL);
    }
}

/* The kernel reads and writes memory of this program, in every way: some of the pages may not be there yet.
   Option: mib, memory that a crowd of threads touches at once. */
#define _GNU_SOURCE
#include "kernelio.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

enum { FIXED_THREADS = 7, DEATH_EVERY = 5 };

atomic_bool leave;

unsigned char *pages_of_own(size_t pages)
{
    void *where = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(where != MAP_FAILED, "mmap: %s", strerror(errno));
    return where;
}

void maybe_drop(void *where, size_t pages, uint64_t *random)
{
    if (below(random, 2) == 0)
        CHECK(madvise(where, pages * PAGE_BYTES, MADV_DONTNEED) == 0, "madvise: %s", strerror(errno));
}

static pthread_t begin(void *(*what)(void *), uintptr_t argument)
{
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, what, (void *)argument) == 0, "pthread_create");
    return thread;
}

int main(int argc, char **argv)
{
    pthread_t threads[FIXED_THREADS + CROWD];
    unsigned count = 0;
    wl_init(argc, argv);
    stream_start(); /* It forks, so nobody else may be there. */
    locks_start();
    crowd_start();
    threads[count++] = begin(stream_write, 0);
    threads[count++] = begin(stream_read, 0);
    threads[count++] = begin(read_file, 0);
    threads[count++] = begin(get_random, 0);
    threads[count++] = begin(take_signals, 0);
    threads[count++] = begin(take_turns, 0);
    threads[count++] = begin(take_turns, 1);
    for (unsigned i = 0; i < CROWD; i++)
        threads[count++] = begin(be_crowd, i);
    for (uint64_t beat = 0; !wl_beat();) {
        wl_nap(MS);
        if (wl_alive_count() >= beat + DEATH_EVERY) {
            beat = wl_alive_count();
            CHECK(pthread_join(begin(die_with_lock, 0), NULL) == 0, "join");
        }
    }
    leave = true;
    for (unsigned i = 0; i < count; i++)
        CHECK(pthread_join(threads[i], NULL) == 0, "join");
    stream_end();
    wl_ok("%" PRIu64 " turns", locks_end());
}

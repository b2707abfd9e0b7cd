/* Mappings that change all the time, with a model of what each page must hold.
   Options: mib, how much is mapped at most; rate, operations per second (0: as fast as can be);
   seed, of another order of things. */
#define _GNU_SOURCE
#include "mapper.h"

#include <inttypes.h>

enum { SMALLEST_MIB = 16, PLACE_IS_PART = 4 };

int main(int argc, char **argv)
{
    wl_init(argc, argv);
    size_t limit = (wl_opt("mib", 64) << 20) / PAGE_BYTES;
    int64_t rate = (int64_t)wl_opt("rate", 1000), due_ns = 0;
    CHECK(limit >= (SMALLEST_MIB << 20) / PAGE_BYTES, "mib is less than %d", SMALLEST_MIB);
    randomness = wl_opt("seed", 1) << 32;
    wl_faults_catch();
    /* A multiple of a huge page. */
    regions_make(limit / PLACE_IS_PART / 512 * 512);
    uint64_t count = 0;
    for (; !wl_beat(); count++) {
        operate(limit);
        if (rate != 0)
            wl_pace(&due_ns, 1000000000 / rate);
    }
    check_all();
    wl_ok("%" PRIu64 " operations", count);
}

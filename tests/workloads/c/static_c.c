/* The simplest that can move: one thread, 4 MiB of state of which every word is known. */
#include "common.h"

#include <inttypes.h>

enum { WORDS = 512 * 1024, BLOCK_WORDS = 4096, BLOCKS = WORDS / BLOCK_WORDS };

static struct {
    unsigned char marker[WL_MARKER_BYTES];
    uint64_t words[WORDS];
} state __attribute__((aligned(4096)));

static uint64_t generation[BLOCKS];

static uint64_t expected(unsigned index, uint64_t age)
{
    return wl_mix(index + age * WORDS);
}

static void verify(unsigned block)
{
    for (unsigned i = block * BLOCK_WORDS; i < (block + 1) * BLOCK_WORDS; i++) {
        uint64_t wanted = expected(i, generation[block]);
        CHECK(state.words[i] == wanted, "word %u of generation %" PRIu64 " is %" PRIx64 ", not %" PRIx64, i,
              generation[block], state.words[i], wanted);
    }
}

static void age(unsigned block)
{
    generation[block]++;
    for (unsigned i = block * BLOCK_WORDS; i < (block + 1) * BLOCK_WORDS; i++)
        state.words[i] = expected(i, generation[block]);
}

int main(int argc, char **argv)
{
    wl_init(argc, argv);
    int64_t nap_ns = (int64_t)wl_opt("nap_us", 1000) * 1000;
    wl_marker(state.marker);
    for (unsigned block = 0; block < BLOCKS; block++)
        age(block);
    uint64_t round = 0;
    for (; !wl_stopping(); round++) {
        unsigned block = round % BLOCKS;
        verify(block);
        age(block);
        if (round % 4 == 0)
            wl_alive();
        if (nap_ns != 0)
            wl_nap(nap_ns);
    }
    for (unsigned block = 0; block < BLOCKS; block++) {
        verify(block);
        CHECK(generation[block] == 1 + round / BLOCKS + (block < round % BLOCKS), "block %u was aged %" PRIu64 " times",
              block, generation[block]);
    }
    wl_ok("%" PRIu64 " rounds", round);
}

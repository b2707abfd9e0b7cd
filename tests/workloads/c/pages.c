#include "pages.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>

void page_is_bad(const void *page, uint64_t key, int word, const char *format, ...)
{
    char name[200];
    const volatile uint64_t *words = page;
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    wl_bad("%s: word %d of key %" PRIx64 " is %" PRIx64 ", should be %" PRIx64 "; word 0 is %" PRIx64, name,
           word, key, words[word], key == 0 ? 0 : page_word(key, wl_mix(key), (unsigned)word), words[0]);
}

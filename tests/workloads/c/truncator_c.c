/* Two memfds that are cut, stretched, holed, spliced into each other, written and read by descriptor and by
   mapping, in two processes. What was cut off comes back as zero; what is behind the end cannot be touched.
   Options: mib, both files together at most; rate, operations per second (0: as fast as can be);
   seed, of another order of things. */
#define _GNU_SOURCE
#include "pages.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FILES = 2, LEFT_WELL = 42, MOST_HOLE_PAGES = 64, CHECKS = 8, RESIZE_EVERY = 32 };

/* The first `bytes` of the page are the key's, the rest is zero. */
struct content {
    uint64_t key;
    unsigned bytes;
};

/* How a page is written or read, here or by the child. */
enum way { MAPPED, CALLED, CALLED_AT_OFFSET, WAYS };
enum what { READ, WRITE, TOUCH_BEHIND, LEAVE };

struct order {
    enum what what;
    enum way way;
    unsigned file;
    size_t page;
    struct content content;
};

static struct file {
    int fd;
    unsigned char *mapping; /* as long as the file can get, also where it ends earlier */
    size_t bytes;
    struct content *pages;
    uint64_t sum; /* of all contents and their places */
} files[FILES];
static size_t most_pages;
static uint64_t randomness, last_key;
static int to_child[2], to_parent[2], between[2];
static pid_t child;

static uint64_t term(size_t page, struct content content)
{
    return content.key == 0 ? 0 : wl_mix(content.key + ((uint64_t)page << 32)) ^ content.bytes;
}

static void set(struct file *file, size_t page, struct content content)
{
    file->sum += term(page, content) - term(page, file->pages[page]);
    file->pages[page] = content;
}

static void audit(const struct file *file)
{
    uint64_t sum = 0;
    for (size_t page = 0; page < most_pages; page++)
        sum += term(page, file->pages[page]);
    CHECK(sum == file->sum, "the contents do not have their sum");
}

/* Parent and child do the same, each with its own mapping. */
static void obey(const struct order *order)
{
    const struct file *file = &files[order->file];
    unsigned char buffer[PAGE_BYTES], *at = file->mapping + order->page * PAGE_BYTES, *page = buffer;
    off_t offset = (off_t)(order->page * PAGE_BYTES);
    if (order->what == TOUCH_BEHIND) {
        CHECK(wl_faults(at, order->way == MAPPED), "page %zu behind the end can be touched", order->page);
        return;
    }
    if (order->way == CALLED_AT_OFFSET)
        CHECK(lseek(file->fd, offset, SEEK_SET) == offset, "lseek: %s", strerror(errno));
    if (order->what == WRITE) {
        page_fill(order->way == MAPPED ? at : buffer, order->content.key);
        ssize_t gave = order->way == MAPPED   ? PAGE_BYTES
                       : order->way == CALLED ? pwrite(file->fd, buffer, PAGE_BYTES, offset)
                                              : write(file->fd, buffer, PAGE_BYTES);
        CHECK(gave == PAGE_BYTES, "write gave %zd: %s", gave, strerror(errno));
        return;
    }
    if (order->way == MAPPED)
        page = at;
    else {
        ssize_t gave = order->way == CALLED ? pread(file->fd, buffer, PAGE_BYTES, offset)
                                            : read(file->fd, buffer, PAGE_BYTES);
        CHECK(gave == PAGE_BYTES, "read gave %zd: %s", gave, strerror(errno));
    }
    int wrong = page_wrong_within(page, order->content.key, order->content.bytes);
    if (wrong >= 0)
        page_is_bad(page, order->content.key, wrong,
                    "file %u page %zu of %zu bytes, %u filled, read in way %d by %s", order->file,
                    order->page, file->bytes, order->content.bytes, (int)order->way,
                    child == 0 ? "the child" : "the parent");
}

static void map_files(void)
{
    for (unsigned i = 0; i < FILES; i++) {
        files[i].mapping =
            mmap(NULL, most_pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, files[i].fd, 0);
        CHECK(files[i].mapping != MAP_FAILED, "mmap: %s", strerror(errno));
    }
}

static _Noreturn void be_child(void)
{
    struct order order;
    map_files(); /* Beside the parent's, which it inherited as well. */
    CHECK(close(to_child[1]) == 0 && close(to_parent[0]) == 0, "close: %s", strerror(errno));
    for (;;) {
        ssize_t got = read(to_child[0], &order, sizeof order);
        if (got == 0)
            _exit(0); /* The parent was killed. */
        CHECK(got == sizeof order, "the child read %zd: %s", got, strerror(errno));
        if (order.what == LEAVE)
            _exit(LEFT_WELL);
        obey(&order);
        CHECK(write(to_parent[1], "y", 1) == 1, "the child cannot answer: %s", strerror(errno));
    }
}

static void order_child(const struct order *order)
{
    char answer = 0;
    CHECK(write(to_child[1], order, sizeof *order) == sizeof *order, "order: %s", strerror(errno));
    CHECK(read(to_parent[0], &answer, 1) == 1 && answer == 'y', "the child does not answer");
}

static void give(const struct order *order)
{
    if (below(&randomness, 2) == 0)
        order_child(order);
    else
        obey(order);
}

static size_t whole_pages(const struct file *file)
{
    return file->bytes / PAGE_BYTES;
}

static void check(unsigned which, size_t page)
{
    struct file *file = &files[which];
    struct order order = {.what = READ, .file = which, .page = page, .content = file->pages[page]};
    /* A call would not give all of the last page. */
    order.way = page < whole_pages(file) ? (enum way)below(&randomness, WAYS) : MAPPED;
    give(&order);
}

static void check_some(unsigned which)
{
    size_t pages = (files[which].bytes + PAGE_BYTES - 1) / PAGE_BYTES;
    for (unsigned i = 0; i < CHECKS && pages != 0; i++)
        check(which, below(&randomness, pages));
    if (pages < most_pages && below(&randomness, 4) == 0) {
        size_t behind = pages + below(&randomness, most_pages - pages);
        struct order order = {
            .what = TOUCH_BEHIND, .way = (enum way)below(&randomness, 2), .file = which, .page = behind};
        give(&order);
    }
}

/* To any length, half of the time to whole pages. */
static size_t some_length(void)
{
    size_t bytes = below(&randomness, most_pages * PAGE_BYTES / 8 + 1) * 8;
    return below(&randomness, 2) == 0 ? bytes : bytes / PAGE_BYTES * PAGE_BYTES;
}

static void resize(struct file *file, size_t bytes)
{
    CHECK(ftruncate(file->fd, (off_t)bytes) == 0, "ftruncate: %s", strerror(errno));
    size_t cut = bytes / PAGE_BYTES;
    unsigned kept = bytes % PAGE_BYTES;
    for (size_t page = cut; page < most_pages; page++) {
        struct content left = file->pages[page];
        left.bytes = page > cut ? 0 : left.bytes < kept ? left.bytes : kept;
        set(file, page, left.bytes == 0 ? (struct content){0} : left);
    }
    file->bytes = bytes;
}

static void punch(struct file *file, size_t pages)
{
    size_t first = below(&randomness, pages), count = 1 + below(&randomness, MOST_HOLE_PAGES);
    if (count > pages - first)
        count = pages - first;
    const int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    CHECK(fallocate(file->fd, mode, (off_t)(first * PAGE_BYTES), (off_t)(count * PAGE_BYTES)) == 0,
          "punch: %s", strerror(errno));
    for (size_t page = first; page < first + count; page++)
        set(file, page, (struct content){0});
}

static void write_one(unsigned which, size_t page)
{
    struct content content = {.key = ++last_key, .bytes = PAGE_BYTES};
    struct order order = {.what = WRITE, .file = which, .page = page, .content = content};
    order.way = (enum way)below(&randomness, WAYS);
    check(which, page);
    give(&order);
    set(&files[which], page, content);
}

/* One page from here to there, without passing through a program. */
static void copy(struct file *from, size_t from_page, struct file *to, size_t to_page)
{
    off_t out = (off_t)(from_page * PAGE_BYTES), in = (off_t)(to_page * PAGE_BYTES);
    if (below(&randomness, 2) == 0) {
        CHECK(lseek(to->fd, in, SEEK_SET) == in, "lseek: %s", strerror(errno));
        CHECK(sendfile(to->fd, from->fd, &out, PAGE_BYTES) == PAGE_BYTES, "sendfile: %s", strerror(errno));
    } else {
        /* In between the pipe holds the very page of the file. */
        CHECK(splice(from->fd, &out, between[1], NULL, PAGE_BYTES, 0) == PAGE_BYTES, "splice out: %s",
              strerror(errno));
        CHECK(splice(between[0], NULL, to->fd, &in, PAGE_BYTES, 0) == PAGE_BYTES, "splice in: %s",
              strerror(errno));
    }
    set(to, to_page, from->pages[from_page]);
}

static void operate(void)
{
    unsigned which = (unsigned)below(&randomness, FILES);
    struct file *file = &files[which], *other = &files[1 - which];
    size_t pages = whole_pages(file), others = whole_pages(other), what = below(&randomness, 16);
    if (pages == 0 || below(&randomness, RESIZE_EVERY) == 0)
        resize(file, some_length());
    else if (what < 2)
        punch(file, pages);
    else if (what < 5 && others != 0)
        copy(file, below(&randomness, pages), other, below(&randomness, others));
    else
        write_one(which, below(&randomness, pages));
    check_some(which);
    check_some(1 - which);
    audit(&files[which]);
}

static void start(void)
{
    randomness = wl_opt("seed", 1) << 32;
    most_pages = (wl_opt("mib", 4) << 20) / PAGE_BYTES / FILES;
    for (unsigned i = 0; i < FILES; i++) {
        files[i].fd = memfd_create("truncated", MFD_CLOEXEC);
        files[i].pages = calloc(most_pages, sizeof *files[i].pages);
        CHECK(files[i].fd >= 0 && files[i].pages != NULL, "memfd_create: %s", strerror(errno));
        resize(&files[i], most_pages * PAGE_BYTES);
    }
    map_files();
    CHECK(pipe2(to_child, O_CLOEXEC) == 0 && pipe2(to_parent, O_CLOEXEC) == 0 &&
              pipe2(between, O_CLOEXEC) == 0,
          "pipe2");
    wl_faults_catch();
    child = fork();
    CHECK(child >= 0, "fork: %s", strerror(errno));
    if (child == 0)
        be_child();
    CHECK(close(to_child[0]) == 0 && close(to_parent[1]) == 0, "close: %s", strerror(errno));
    signal(SIGPIPE, SIG_IGN); /* A child that is gone shall be noticed by EPIPE. */
}

int main(int argc, char **argv)
{
    wl_init(argc, argv);
    start();
    int64_t rate = (int64_t)wl_opt("rate", 2000), due_ns = 0;
    uint64_t count = 0;
    for (unsigned i = 0; i < FILES; i++)
        for (size_t page = 0; page < most_pages; page++)
            write_one(i, page);
    for (; !wl_beat(); count++) {
        operate();
        if (rate != 0)
            wl_pace(&due_ns, 1000000000 / rate);
    }
    for (unsigned i = 0; i < FILES; i++)
        for (size_t page = 0; page * PAGE_BYTES < files[i].bytes; page++)
            check(i, page);
    struct order leave = {.what = LEAVE};
    int status = 0;
    CHECK(write(to_child[1], &leave, sizeof leave) == sizeof leave, "order: %s", strerror(errno));
    CHECK(waitpid(child, &status, 0) == child, "waitpid: %s", strerror(errno));
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == LEFT_WELL, "the child ended with status %x", status);
    wl_ok("%" PRIu64 " operations", count);
}

/* Descriptors of every kind that need no network, each with content in flight, verified round after round.
   Option: late_ms, how much ticking time of the timerfd may be lost to being stopped, over the whole life. */
#define _GNU_SOURCE
#include "fds.h"

#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

int64_t late_ns;

enum { TABLE_SIZE = 128 };

static struct slot {
    bool open;
    int descriptor_flags, status_flags;
    mode_t type;
} table[TABLE_SIZE];

static struct slot look_at(int fd)
{
    struct stat status;
    struct slot slot = {.descriptor_flags = fcntl(fd, F_GETFD)};
    if (slot.descriptor_flags < 0)
        return (struct slot){.open = false};
    MUST(fstat(fd, &status), 0);
    slot.open = true;
    slot.status_flags = fcntl(fd, F_GETFL);
    slot.type = status.st_mode & (S_IFMT | 07777);
    return slot;
}

void table_start(void)
{
    for (int fd = 0; fd < TABLE_SIZE; fd++)
        table[fd] = look_at(fd);
}

void table_check(void)
{
    for (int fd = 0; fd < TABLE_SIZE; fd++) {
        struct slot now = look_at(fd), *then = &table[fd];
        CHECK(now.open == then->open, "descriptor %d was %s", fd, then->open ? "closed" : "opened");
        CHECK(now.descriptor_flags == then->descriptor_flags && now.status_flags == then->status_flags &&
                  now.type == then->type,
              "descriptor %d: flags %x %x type %o, not %x %x %o", fd, (unsigned)now.descriptor_flags,
              (unsigned)now.status_flags, (unsigned)now.type, (unsigned)then->descriptor_flags,
              (unsigned)then->status_flags, (unsigned)then->type);
    }
}

int main(int argc, char **argv)
{
    wl_init(argc, argv);
    late_ns = (int64_t)wl_opt("late_ms", 5000) * MS;
    CHECK(signal(SIGPIPE, SIG_IGN) != SIG_ERR, "signal");
    files_start();
    sharing_start();
    queues_start();
    events_start();
    table_start();
    uint64_t round = 0;
    while (!wl_stopping()) {
        files_check(round);
        sharing_check(round);
        queues_check(round);
        events_check(round);
        table_check();
        wl_alive();
        wl_nap(5 * MS);
        round++;
    }
    sharing_end();
    wl_ok("%" PRIu64 " rounds", round);
}

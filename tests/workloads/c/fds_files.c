/* Regular files, directories and devices; and one description shared with a dup and with a child. */
#define _GNU_SOURCE
#include "fds.h"

#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

enum { ENTRIES = 200, LINE = 16, STREAM_BYTES = 1 << 20, GHOST_STEP = 100, SEALED_BYTES = 10000 };

static int append_fd, ghost_fd, dir_fd, path_fd, sealed_fd, null_fd, zero_fd, full_fd, random_fd;
static uint64_t appended, ghost_bytes;
static unsigned char seen[ENTRIES];
static unsigned seen_count, dots_seen;

static void make_directory(void)
{
    char name[64];
    MUST(mkdir("entries", 0755), 0);
    for (unsigned i = 0; i < ENTRIES; i++) {
        snprintf(name, sizeof name, "entries/e%03u", i);
        close(opened(open(name, O_WRONLY | O_CREAT, 0600), name));
    }
    dir_fd = opened(open("entries", O_RDONLY | O_DIRECTORY | O_CLOEXEC), "entries");
}

static void make_sealed(void)
{
    unsigned char bytes[SEALED_BYTES];
    sealed_fd = opened(memfd_create("sealed", MFD_ALLOW_SEALING | MFD_CLOEXEC), "memfd_create");
    stream_fill(bytes, sizeof bytes, 0);
    MUST(write(sealed_fd, bytes, sizeof bytes), sizeof bytes);
    MUST(fcntl(sealed_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE), 0);
    MUST(lseek(sealed_fd, 1234, SEEK_SET), 1234);
}

void files_start(void)
{
    append_fd = opened(open("append", O_RDWR | O_CREAT | O_TRUNC | O_APPEND, 0640), "append");
    ghost_fd = opened(open("ghost", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600), "ghost");
    MUST(unlink("ghost"), 0);
    path_fd = opened(open(".", O_PATH | O_CLOEXEC), ".");
    null_fd = opened(open("/dev/null", O_WRONLY), "/dev/null");
    zero_fd = opened(open("/dev/zero", O_RDONLY), "/dev/zero");
    full_fd = opened(open("/dev/full", O_WRONLY), "/dev/full");
    random_fd = opened(open("/dev/urandom", O_RDONLY | O_CLOEXEC), "/dev/urandom");
    make_directory();
    make_sealed();
}

static void check_append(void)
{
    char line[LINE + 1], back[LINE];
    struct stat status;
    snprintf(line, sizeof line, "line %010" PRIu64 "\n", appended);
    MUST(lseek(append_fd, 3, SEEK_SET), 3); /* O_APPEND must not care. */
    MUST(write(append_fd, line, LINE), LINE);
    appended++;
    MUST(fstat(append_fd, &status), 0);
    MUST(status.st_size, appended * LINE);
    MUST(pread(append_fd, back, LINE, (off_t)((appended - 1) * LINE)), LINE);
    CHECK(memcmp(line, back, LINE) == 0, "the appended line is not the last one");
}

static void check_ghost(void)
{
    unsigned char bytes[GHOST_STEP];
    struct stat status;
    MUST(fstat(ghost_fd, &status), 0);
    MUST(status.st_nlink, 0);
    MUST(status.st_size, ghost_bytes);
    MUST(lseek(ghost_fd, 0, SEEK_CUR), ghost_bytes);
    if (ghost_bytes >= GHOST_STEP) {
        uint64_t at = wl_mix(ghost_bytes) % (ghost_bytes - GHOST_STEP + 1);
        MUST(pread(ghost_fd, bytes, GHOST_STEP, (off_t)at), GHOST_STEP);
        stream_verify("deleted file", bytes, GHOST_STEP, at);
    }
    stream_fill(bytes, GHOST_STEP, ghost_bytes);
    MUST(write(ghost_fd, bytes, GHOST_STEP), GHOST_STEP);
    ghost_bytes += GHOST_STEP;
}

static void note_entry(const char *name)
{
    unsigned number;
    if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0) {
        dots_seen++;
        return;
    }
    CHECK(sscanf(name, "e%u", &number) == 1 && number < ENTRIES, "a strange entry: %s", name);
    CHECK(!seen[number], "readdir gave entry %s twice", name);
    seen[number] = 1;
    seen_count++;
}

/* A few entries a round, by the system call: its place is in the kernel, not in a library's buffer. */
static void check_directory(void)
{
    struct entry {
        uint64_t inode, offset;
        unsigned short length;
        unsigned char type;
        char name[];
    };
    char buffer[160] __attribute__((aligned(8)));
    long length = syscall(SYS_getdents64, dir_fd, buffer, sizeof buffer);
    CHECK(length >= 0, "getdents64: %s", strerror(errno));
    for (long at = 0; at < length; at += ((struct entry *)(buffer + at))->length)
        note_entry(((struct entry *)(buffer + at))->name);
    if (length > 0)
        return;
    CHECK(seen_count == ENTRIES && dots_seen == 2, "readdir gave %u entries of %d", seen_count, ENTRIES);
    memset(seen, 0, sizeof seen);
    seen_count = dots_seen = 0;
    MUST(lseek(dir_fd, 0, SEEK_SET), 0);
}

static void check_sealed(uint64_t round)
{
    unsigned char bytes[100];
    char link[64] = "", path[64];
    uint64_t at = round * 100 % SEALED_BYTES;
    MUST(pread(sealed_fd, bytes, sizeof bytes, (off_t)at), sizeof bytes);
    stream_verify("memfd", bytes, sizeof bytes, at);
    MUST(lseek(sealed_fd, 0, SEEK_CUR), 1234);
    MUST(fcntl(sealed_fd, F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE);
    CHECK(pwrite(sealed_fd, bytes, 1, 0) == -1 && errno == EPERM, "a sealed memfd was written");
    snprintf(path, sizeof path, "/proc/self/fd/%d", sealed_fd);
    CHECK(readlink(path, link, sizeof link - 1) > 0 && strncmp(link, "/memfd:sealed", 13) == 0, "memfd is now %s", link);
}

static void check_devices(void)
{
    char bytes[64] = "anything";
    MUST(write(null_fd, bytes, sizeof bytes), sizeof bytes);
    MUST(read(zero_fd, bytes, sizeof bytes), sizeof bytes);
    for (unsigned i = 0; i < sizeof bytes; i++)
        CHECK(bytes[i] == 0, "/dev/zero gave %d", bytes[i]);
    CHECK(write(full_fd, bytes, 1) == -1 && errno == ENOSPC, "/dev/full took a byte");
    MUST(read(random_fd, bytes, sizeof bytes), sizeof bytes);
    struct stat status;
    MUST(fstat(0, &status), 0);
    CHECK(S_ISCHR(status.st_mode) && status.st_rdev == makedev(1, 3), "descriptor 0 is not /dev/null");
}

void files_check(uint64_t round)
{
    struct stat here, there;
    check_append();
    check_ghost();
    check_directory();
    check_sealed(round);
    check_devices();
    MUST(fstat(path_fd, &here), 0);
    MUST(stat(".", &there), 0);
    CHECK(here.st_ino == there.st_ino, "the O_PATH descriptor shows another directory");
}

/* One open file description behind three descriptors in two processes. */
enum { STEP = 7 };

static int stream_fd, twin_fd, talk[2];
static pid_t child, parent;

static _Noreturn void be_the_child(void)
{
    uint64_t expected;
    while (read(talk[1], &expected, sizeof expected) == sizeof expected) {
        unsigned char bytes[STEP];
        MUST(getppid(), parent);
        MUST(lseek(stream_fd, 0, SEEK_CUR), expected);
        MUST(read(stream_fd, bytes, STEP), STEP);
        stream_verify("shared description, child", bytes, STEP, expected);
        expected += STEP;
        MUST(write(talk[1], &expected, sizeof expected), sizeof expected);
    }
    _exit(7);
}

void sharing_start(void)
{
    static unsigned char bytes[STREAM_BYTES];
    int fd = opened(open("offset", O_RDWR | O_CREAT | O_TRUNC, 0600), "offset");
    stream_fill(bytes, sizeof bytes, 0);
    MUST(write(fd, bytes, sizeof bytes), sizeof bytes);
    close(fd);
    stream_fd = opened(open("offset", O_RDONLY), "offset");
    twin_fd = opened(fcntl(stream_fd, F_DUPFD_CLOEXEC, 90), "F_DUPFD_CLOEXEC");
    MUST(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, talk), 0);
    parent = getpid();
    child = fork();
    CHECK(child >= 0, "fork: %s", strerror(errno));
    if (child == 0) {
        close(talk[0]);
        be_the_child();
    }
    close(talk[1]);
}

void sharing_check(uint64_t round)
{
    static uint64_t at;
    unsigned char bytes[STEP];
    MUST(lseek(twin_fd, 0, SEEK_CUR), at);
    MUST(read(round % 2 ? twin_fd : stream_fd, bytes, STEP), STEP);
    stream_verify("shared description", bytes, STEP, at);
    at += STEP;
    MUST(write(talk[0], &at, sizeof at), sizeof at);
    MUST(read(talk[0], &at, sizeof at), sizeof at);
    MUST(lseek(stream_fd, 0, SEEK_CUR), at);
    if (at + 3 * STEP > STREAM_BYTES)
        MUST(lseek(stream_fd, 0, SEEK_SET), at = 0);
}

void sharing_end(void)
{
    int status;
    close(talk[0]);
    MUST(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7, "the child ended with status %x", status);
}

/* Pipes, fifos and socket pairs that are never empty: what lies in them must come out whole and in order. */
#define _GNU_SOURCE
#include "fds.h"

#include <fcntl.h>
#include <inttypes.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MOST = 4000, PIPE_BYTES = 131072, MESSAGES_AHEAD = 5, LAST_WORDS = 300 };

/* Both ends of something that queues: a stream of known bytes, or messages of known length. */
struct queue {
    const char *name;
    int in, out;
    bool messages;
    uint64_t written, taken;               /* bytes */
    uint64_t messages_written, messages_taken;
};

enum { PIPE, PACKETS, FIFO, STREAM_A, STREAM_B, DGRAM_A, DGRAM_B, SEQ_A, SEQ_B, QUEUES };

static struct queue queues[QUEUES] = {
    [PIPE] = {.name = "pipe"},
    [PACKETS] = {.name = "packet pipe", .messages = true},
    [FIFO] = {.name = "fifo"},
    [STREAM_A] = {.name = "stream there"},
    [STREAM_B] = {.name = "stream back"},
    [DGRAM_A] = {.name = "dgram there", .messages = true},
    [DGRAM_B] = {.name = "dgram back", .messages = true},
    [SEQ_A] = {.name = "seqpacket there", .messages = true},
    [SEQ_B] = {.name = "seqpacket back", .messages = true},
};
static int writer_gone, reader_gone, half_shut[2];

/* Lengths that differ from message to message: a lost boundary cannot hide. */
static size_t length_of(const struct queue *queue, uint64_t number)
{
    return queue->messages ? 1 + wl_mix(number) % 700 : 1 + wl_mix(number) % MOST;
}

static void put(struct queue *queue)
{
    unsigned char bytes[MOST];
    size_t length = length_of(queue, queue->messages_written);
    stream_fill(bytes, length, queue->written);
    ssize_t gave = write(queue->in, bytes, length);
    CHECK(gave == (ssize_t)length, "%s: write gave %zd of %zu: %s", queue->name, gave, length, strerror(errno));
    queue->written += length;
    queue->messages_written++;
}

static void take(struct queue *queue)
{
    unsigned char bytes[MOST];
    size_t length = length_of(queue, queue->messages_taken);
    ssize_t gave = read(queue->out, bytes, queue->messages ? sizeof bytes : length);
    CHECK(gave == (ssize_t)length, "%s: read gave %zd of %zu: %s", queue->name, gave, length, strerror(errno));
    stream_verify(queue->name, bytes, length, queue->taken);
    queue->taken += length;
    queue->messages_taken++;
}

static void connect_pair(int type, struct queue *there, struct queue *back)
{
    int pair[2];
    MUST(socketpair(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair), 0);
    there->in = back->out = pair[0];
    there->out = back->in = pair[1];
}

/* Ends of which the other one is gone, with something left to read. */
static void make_widows(void)
{
    unsigned char bytes[LAST_WORDS];
    int pair[2];
    stream_fill(bytes, sizeof bytes, 0);
    MUST(pipe2(pair, O_CLOEXEC | O_NONBLOCK), 0);
    MUST(write(pair[1], bytes, sizeof bytes), sizeof bytes);
    close(pair[1]);
    writer_gone = pair[0];
    MUST(pipe2(pair, O_CLOEXEC | O_NONBLOCK), 0);
    close(pair[0]);
    reader_gone = pair[1];
    MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, half_shut), 0);
    MUST(write(half_shut[0], bytes, sizeof bytes), sizeof bytes);
    MUST(shutdown(half_shut[0], SHUT_WR), 0);
}

void queues_start(void)
{
    int pair[2];
    MUST(pipe2(pair, O_NONBLOCK), 0);
    queues[PIPE].out = pair[0];
    queues[PIPE].in = pair[1];
    MUST(fcntl(pair[1], F_SETPIPE_SZ, PIPE_BYTES), PIPE_BYTES);
    MUST(pipe2(pair, O_DIRECT | O_NONBLOCK | O_CLOEXEC), 0);
    queues[PACKETS].out = pair[0];
    queues[PACKETS].in = pair[1];
    MUST(mkfifo("fifo", 0600), 0);
    queues[FIFO].out = opened(open("fifo", O_RDONLY | O_NONBLOCK), "fifo");
    queues[FIFO].in = opened(open("fifo", O_WRONLY | O_NONBLOCK), "fifo");
    connect_pair(SOCK_STREAM, &queues[STREAM_A], &queues[STREAM_B]);
    connect_pair(SOCK_DGRAM, &queues[DGRAM_A], &queues[DGRAM_B]);
    connect_pair(SOCK_SEQPACKET, &queues[SEQ_A], &queues[SEQ_B]);
    make_widows();
    for (unsigned q = 0; q < QUEUES; q++)
        for (unsigned i = 0; i < MESSAGES_AHEAD; i++)
            put(&queues[q]);
}

/* The last words are heard only every 64th round, and said again by a new pair on the same numbers. */
static void check_widows(uint64_t round)
{
    unsigned char bytes[LAST_WORDS] = {0};
    CHECK(write(reader_gone, bytes, 1) == -1 && errno == EPIPE, "a pipe without a reader took a byte");
    CHECK(write(half_shut[0], bytes, 1) == -1 && errno == EPIPE, "a shut socket took a byte");
    MUST(recv(half_shut[1], bytes, sizeof bytes, MSG_PEEK), sizeof bytes);
    stream_verify("shut socket", bytes, sizeof bytes, 0);
    if (round % 64 != 63)
        return;
    MUST(read(writer_gone, bytes, sizeof bytes), sizeof bytes);
    stream_verify("pipe without a writer", bytes, sizeof bytes, 0);
    MUST(read(writer_gone, bytes, sizeof bytes), 0);
    MUST(read(half_shut[1], bytes, sizeof bytes), sizeof bytes);
    MUST(read(half_shut[1], bytes, sizeof bytes), 0);
    close(writer_gone);
    close(reader_gone);
    close(half_shut[0]);
    close(half_shut[1]);
    make_widows();
}

void queues_check(uint64_t round)
{
    for (unsigned q = 0; q < QUEUES; q++) {
        take(&queues[q]);
        put(&queues[q]);
    }
    MUST(fcntl(queues[PIPE].out, F_GETPIPE_SZ), PIPE_BYTES);
    check_widows(round);
}

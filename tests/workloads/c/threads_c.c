/* Fifty threads that meet at a barrier, hand parcels on, and move money; every thread keeps its own secrets. */
#define _GNU_SOURCE
#include "common.h"

#include <dirent.h>
#include <errno.h>
#include <fenv.h>
#include <inttypes.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { THREADS = 50, ACCOUNTS = 64, PER_ACCOUNT = 1000, STACK_WORDS = 1024 };

struct box {
    pthread_mutex_t lock;
    pthread_cond_t filled, emptied;
    bool full;
    unsigned sender;
    uint64_t round;
};

static struct {
    unsigned char marker[WL_MARKER_BYTES];
    int64_t balance[ACCOUNTS];
} bank;
static pthread_mutex_t account_lock[ACCOUNTS];
static struct box boxes[THREADS];
static pthread_barrier_t barrier;
static pthread_rwlock_t rwlock = PTHREAD_RWLOCK_INITIALIZER;
static sem_t four_at_a_time;
static atomic_int inside;
static const int rounding[4] = {FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO};
static _Atomic uint64_t arrivals, transfers, rounds_done, written_twice[2];
static atomic_bool leave;

static __thread struct {
    unsigned id;
    pid_t tid;
    pthread_t self;
    uint64_t secret, turns;
} own;

static void must(int error, const char *what)
{
    CHECK(error == 0, "%s: %s (thread %u)", what, strerror(error), own.id);
}

static void send_parcel(unsigned to, uint64_t round)
{
    struct box *box = &boxes[to];
    must(pthread_mutex_lock(&box->lock), "lock");
    while (box->full)
        must(pthread_cond_wait(&box->emptied, &box->lock), "cond_wait");
    box->full = true;
    box->sender = own.id;
    box->round = round;
    must(pthread_cond_signal(&box->filled), "cond_signal");
    must(pthread_mutex_unlock(&box->lock), "unlock");
}

static void receive_parcel(uint64_t round)
{
    struct box *box = &boxes[own.id];
    must(pthread_mutex_lock(&box->lock), "lock");
    while (!box->full)
        must(pthread_cond_wait(&box->filled, &box->lock), "cond_wait");
    CHECK(box->sender == (own.id + THREADS - 1) % THREADS && box->round == round,
          "thread %u in round %" PRIu64 " got a parcel of %u, round %" PRIu64, own.id, round, box->sender, box->round);
    box->full = false;
    must(pthread_cond_signal(&box->emptied), "cond_signal");
    must(pthread_mutex_unlock(&box->lock), "unlock");
}

static void move_money(uint64_t round)
{
    uint64_t dice = wl_mix(round * THREADS + own.id);
    unsigned from = dice % ACCOUNTS, to = (from + 1 + (dice >> 8) % (ACCOUNTS - 1)) % ACCOUNTS;
    unsigned first = from < to ? from : to, second = from < to ? to : from;
    int64_t amount = (int64_t)(dice >> 32 & 63);
    must(pthread_mutex_lock(&account_lock[first]), "lock account");
    must(pthread_mutex_lock(&account_lock[second]), "lock account");
    bank.balance[from] -= amount;
    bank.balance[to] += amount;
    must(pthread_mutex_unlock(&account_lock[second]), "unlock account");
    must(pthread_mutex_unlock(&account_lock[first]), "unlock account");
    atomic_fetch_add(&transfers, 1);
}

static void verify_bank(void)
{
    int64_t total = 0;
    for (unsigned i = 0; i < ACCOUNTS; i++)
        must(pthread_mutex_lock(&account_lock[i]), "lock account");
    for (unsigned i = 0; i < ACCOUNTS; i++)
        total += bank.balance[i];
    for (unsigned i = 0; i < ACCOUNTS; i++)
        must(pthread_mutex_unlock(&account_lock[i]), "unlock account");
    CHECK(total == ACCOUNTS * PER_ACCOUNT, "the bank holds %" PRId64, total);
}

static void share_locks(void)
{
    while (sem_wait(&four_at_a_time) != 0)
        wl_bad("sem_wait: %s", strerror(errno));
    int now = atomic_fetch_add(&inside, 1) + 1;
    CHECK(now >= 1 && now <= 4, "%d threads passed a semaphore of 4", now);
    atomic_fetch_sub(&inside, 1);
    must(sem_post(&four_at_a_time) == 0 ? 0 : errno, "sem_post");
    if (own.turns % 16 == own.id % 16) {
        must(pthread_rwlock_wrlock(&rwlock), "wrlock");
        uint64_t value = atomic_fetch_add(&written_twice[0], 1);
        uint64_t twin = atomic_fetch_add(&written_twice[1], 1);
        CHECK(value == twin, "two writers at once");
    } else {
        must(pthread_rwlock_rdlock(&rwlock), "rdlock");
        CHECK(written_twice[0] == written_twice[1], "a reader beside a writer");
    }
    must(pthread_rwlock_unlock(&rwlock), "rwlock unlock");
}

/* Sums that come out differently under each rounding mode and for each lost bit of a vector register. */
static double sum_up(unsigned id)
{
    volatile double one = 1.0, three = 3.0;
    double lanes[8] = {0};
    for (unsigned i = 0; i < 400; i++)
        for (unsigned lane = 0; lane < 8; lane++)
            lanes[lane] += one / (three + id + lane + i);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3] + lanes[4] + lanes[5] + lanes[6] + lanes[7];
}

static void verify_own(unsigned id, const volatile uint64_t *stack, double sum)
{
    CHECK(own.id == id && own.secret == wl_mix(id), "thread %u lost its TLS", id);
    CHECK(own.tid == (pid_t)syscall(SYS_gettid), "thread %u had tid %d, has %ld", id, own.tid, syscall(SYS_gettid));
    CHECK(pthread_equal(own.self, pthread_self()), "thread %u has another pthread_self", id);
    CHECK(fegetround() == rounding[id % 4], "thread %u lost its rounding mode", id);
    for (unsigned i = 0; i < STACK_WORDS; i++)
        CHECK(stack[i] == wl_mix(id * STACK_WORDS + i), "thread %u: stack word %u changed", id, i);
    double again = sum_up(id);
    CHECK(memcmp(&again, &sum, sizeof sum) == 0, "thread %u computes %.17g, not %.17g", id, again, sum);
}

static void *live(void *argument)
{
    unsigned id = (unsigned)(uintptr_t)argument;
    volatile uint64_t stack[STACK_WORDS];
    own.id = id;
    own.tid = (pid_t)syscall(SYS_gettid);
    own.self = pthread_self();
    own.secret = wl_mix(id);
    for (unsigned i = 0; i < STACK_WORDS; i++)
        stack[i] = wl_mix(id * STACK_WORDS + i);
    CHECK(fesetround(rounding[id % 4]) == 0, "fesetround");
    double sum = sum_up(id);
    for (uint64_t round = 1;; round++) {
        send_parcel((id + 1) % THREADS, round);
        move_money(round);
        share_locks();
        verify_own(id, stack, sum);
        receive_parcel(round);
        own.turns++;
        atomic_fetch_add(&arrivals, 1);
        int serial = pthread_barrier_wait(&barrier);
        CHECK(arrivals == round * THREADS, "%" PRIu64 " arrivals in round %" PRIu64, arrivals, round);
        if (serial == PTHREAD_BARRIER_SERIAL_THREAD) {
            verify_bank();
            wl_alive();
            rounds_done = round;
            leave = wl_stopping();
            wl_nap(2 * MS);
        }
        pthread_barrier_wait(&barrier); /* Nobody starts round N+1 before all have seen the verdict on N. */
        if (leave) {
            CHECK(own.turns == round, "thread %u took %" PRIu64 " turns of %" PRIu64, id, own.turns, round);
            return (void *)(uintptr_t)wl_mix(id ^ round);
        }
    }
}

static unsigned count_threads(void)
{
    DIR *dir = opendir("/proc/self/task");
    CHECK(dir != NULL, "/proc/self/task: %s", strerror(errno));
    unsigned count = 0;
    while (readdir(dir) != NULL)
        count++;
    closedir(dir);
    return count - 2; /* . and .. */
}

static void prepare(void)
{
    wl_marker(bank.marker);
    must(pthread_barrier_init(&barrier, NULL, THREADS), "barrier_init");
    must(sem_init(&four_at_a_time, 0, 4) == 0 ? 0 : errno, "sem_init");
    pthread_mutexattr_t robust;
    must(pthread_mutexattr_init(&robust), "mutexattr_init");
    must(pthread_mutexattr_setrobust(&robust, PTHREAD_MUTEX_ROBUST), "setrobust");
    for (unsigned i = 0; i < ACCOUNTS; i++) {
        bank.balance[i] = PER_ACCOUNT;
        must(pthread_mutex_init(&account_lock[i], i % 2 ? &robust : NULL), "mutex_init");
    }
    for (unsigned i = 0; i < THREADS; i++) {
        must(pthread_mutex_init(&boxes[i].lock, NULL), "mutex_init");
        must(pthread_cond_init(&boxes[i].filled, NULL), "cond_init");
        must(pthread_cond_init(&boxes[i].emptied, NULL), "cond_init");
    }
}

int main(int argc, char **argv)
{
    pthread_t threads[THREADS];
    wl_init(argc, argv);
    prepare();
    for (uintptr_t i = 0; i < THREADS; i++)
        must(pthread_create(&threads[i], NULL, live, (void *)i), "pthread_create");
    while (!wl_stopping()) {
        unsigned count = count_threads();
        /* A stop seen by the workers first lets them leave while we count. */
        CHECK(count == THREADS + 1 || wl_stopping(), "%u threads left of %d", count, THREADS + 1);
        wl_nap(20 * MS);
    }
    for (uintptr_t i = 0; i < THREADS; i++) {
        void *value;
        must(pthread_join(threads[i], &value), "join");
        CHECK((uintptr_t)value == wl_mix(i ^ rounds_done), "thread %d returned a wrong value", (int)i);
    }
    verify_bank();
    CHECK(transfers == rounds_done * THREADS, "%" PRIu64 " transfers in %" PRIu64 " rounds", transfers, rounds_done);
    wl_ok("%" PRIu64 " rounds of %d threads", rounds_done, THREADS);
}

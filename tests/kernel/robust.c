/* Holds a robust mutex and a tid address in shared memory, in a thread; or looks what became of them. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

struct shared {
	pthread_mutex_t mutex;
	int tid;
};

static struct shared *shared;

static void *hold(void *unused)
{
	pthread_mutex_lock(&shared->mutex);
	shared->tid = 4711;
	syscall(SYS_set_tid_address, &shared->tid);
	puts("ready");
	fflush(stdout);
	for (;;)
		pause();
}

static void *idle(void *unused)
{
	for (;;)
		pause();
}

int main(int argc, char **argv)
{
	int fd = open(argv[1], O_RDWR | O_CREAT, 0600);

	ftruncate(fd, sizeof *shared);
	shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (!strcmp(argv[2], "hold")) {
		pthread_mutexattr_t attr;
		pthread_t thread;

		pthread_mutexattr_init(&attr);
		pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
		pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
		pthread_mutex_init(&shared->mutex, &attr);
		for (int i = 0; i < 20; i++)
			pthread_create(&thread, NULL, idle, NULL);
		pthread_create(&thread, NULL, hold, NULL);
		idle(NULL);
	}
	printf("%s %d\n", strerrorname_np(pthread_mutex_trylock(&shared->mutex)), shared->tid);
	return 0;
}

/* The modes of stateful.c that cannot move, and those that never stand still. */

static void *leading_on(void *unused) {
    (void)unused;
    hold();
    end("ok");
    return 0;
}

static void leader_ended(void) {
    pthread_t thread;
    NEED(pthread_create(&thread, 0, leading_on, 0) == 0);
    pthread_exit(0);
}

static void *waiting(void *unused) {
    for (;;) pause();
    return unused;
}

static void child_leader_ended(void) {
    pid_t child = fork();
    pthread_t thread;
    if (!child) {
        pthread_create(&thread, 0, waiting, 0);
        pthread_exit(0);
    }
    siginfo_t info = {0};
    char name[64], text[400] = "";
    snprintf(name, sizeof name, "/proc/%d/stat", child);
    do { /* until its first thread shows as a zombie */
        int fd = open(name, O_RDONLY);
        NEED(read(fd, text, 399) > 0 && close(fd) == 0);
    } while (strrchr(text, ')')[2] != 'Z');
    hold();
    NEED(waitid(P_PID, child, &info, WEXITED | WNOHANG) == 0 && info.si_pid == 0);
    NEED(kill(child, SIGKILL) == 0 && waitpid(child, 0, 0) == child);
}

static volatile int changed;

static void *other_user(void *unused) {
    (void)unused;
    changed = syscall(SYS_setresuid, 1000, 1000, 1000) ? -1 : 1;
    while (!may_go()) nap(5);
    changed = syscall(SYS_getuid) == 1000 ? 2 : -1;
    return 0;
}

static void *sandboxed(void *unused) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 77), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog program = {4, filter};
    (void)unused;
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    changed = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) ? -1 : 1;
    while (!may_go()) nap(5);
    changed = syscall(SYS_getppid) == -1 && errno == 77 ? 2 : -1;
    return 0;
}

static void with_thread(void *(*body)(void *)) {
    pthread_t thread;
    NEED(chmod(".", 0777) == 0 && pthread_create(&thread, 0, body, 0) == 0);
    while (!changed) nap(1);
    NEED(changed == 1);
    hold();
    NEED(pthread_join(thread, 0) == 0 && changed == 2);
}

static void thread_user(void) { with_thread(other_user); }
static void thread_sandbox(void) { with_thread(sandboxed); }

static void semaphores(void) {
    int set = semget(IPC_PRIVATE, 1, 0600);
    struct sembuf up = {0, 3, SEM_UNDO};
    NEED(set >= 0 && semop(set, &up, 1) == 0);
    hold();
    int value = semctl(set, 0, GETVAL), removed = semctl(set, 0, IPC_RMID);
    NEED(value == 3 && removed == 0);
}

static void queues(void) {
    int queue = msgget(IPC_PRIVATE, 0600);
    struct { long type; char text[4]; } message = {1, "abc"};
    NEED(queue >= 0 && msgsnd(queue, &message, 4, 0) == 0);
    hold();
    long length = msgrcv(queue, &message, 4, 0, IPC_NOWAIT), removed = msgctl(queue, IPC_RMID, 0);
    NEED(length == 4 && removed == 0);
}

static void guard_pages(void) {
    char *at = mmap(0, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(at, 1, 4 * PAGE);
    if (madvise(at + PAGE, PAGE, GUARD_INSTALL) && errno == EINVAL) end("absent");
    hold();
    NEED(at[0] == 1 && at[2 * PAGE] == 1);
    NEED(write(open("scratch", O_RDWR | O_CREAT, 0600), at + PAGE, 1) == -1 && errno == EFAULT);
}

static void write_or_execute(void) {
    if (prctl(SET_MDWE, 1, 0, 0, 0) && errno == EINVAL) end("absent");
    hold();
    NEED(mmap(0, PAGE, PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED);
}

static void removed_directory(void) {
    NEED(mkdir("removed", 0755) == 0 && chdir("removed") == 0 && rmdir("../removed") == 0);
    int above = open(words[1], O_RDONLY | O_DIRECTORY);
    char name[300];
    snprintf(name, sizeof name, "%s/go", words[1]);
    NEED(above >= 0);
    int fd = openat(above, "ready", O_WRONLY | O_CREAT, 0666);
    NEED(fd >= 0 && write(fd, "ready", 5) == 5);
    close(fd);
    while (access(name, F_OK)) nap(5);
    NEED(fchdir(above) == 0);
}

static int sharing(void *unused) {
    waiting(unused);
    return 0;
}

static void shared_table(void) {
    static char stack[65536] __attribute__((aligned(16)));
    pid_t child = clone(sharing, stack + sizeof stack, CLONE_FILES | SIGCHLD, 0);
    NEED(child > 0);
    hold();
    NEED(kill(child, SIGKILL) == 0 && waitpid(child, 0, 0) == child);
}

static void vforks(void) {
    int status;
    tell("ready", "ready");
    for (int i = 0; !may_go(); i = (i + 1) & 127) {
        pid_t child = vfork();
        if (!child) {
            struct timespec time = {0, 4000000};
            syscall(SYS_nanosleep, &time, 0);
            _exit(i);
        }
        NEED(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == i);
        nap(4); /* a parent that waits for its child cannot be stopped */
    }
}

static void *executing(void *unused) {
    nap(1);
    execv("/proc/self/exe", words);
    end("bad exec: errno %d", errno);
    return unused;
}

static void execs(void) {
    pthread_t thread;
    if (may_go()) return;
    if (access("ready", F_OK)) tell("ready", "ready");
    NEED(pthread_create(&thread, 0, executing, 0) == 0);
    waiting(0);
}

static void *ending(void *number) { return number; }

static void ending_threads(void) {
    pthread_t threads[8];
    void *result;
    tell("ready", "ready");
    while (!may_go()) {
        for (long i = 0; i < 8; i++) NEED(pthread_create(&threads[i], 0, ending, (void *)i) == 0);
        for (long i = 0; i < 8; i++) NEED(pthread_join(threads[i], &result) == 0 && result == (void *)i);
    }
}

static void forks(void) {
    int status;
    tell("ready", "ready");
    for (int i = 0; !may_go(); i = (i + 1) & 127) {
        pid_t child = fork();
        if (!child) {
            nap(1);
            _exit(i);
        }
        NEED(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == i);
    }
}

static void stops(void) {
    int status;
    pid_t child = fork();
    if (!child) for (;;) nap(1);
    tell("ready", "ready");
    while (!may_go()) {
        NEED(kill(child, SIGSTOP) == 0 && waitpid(child, &status, WUNTRACED) == child && WIFSTOPPED(status));
        nap(1);
        NEED(kill(child, SIGCONT) == 0 && waitpid(child, &status, WCONTINUED) == child && WIFCONTINUED(status));
    }
    NEED(kill(child, SIGKILL) == 0 && waitpid(child, &status, 0) == child && WTERMSIG(status) == SIGKILL);
}

/* Has a client when it is moved; afterwards it has lost him, and takes the next. */
static void server(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    char text[16] = "";
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    NEED(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0);
    NEED(bind(listener, (void *)&address, length) == 0 && listen(listener, 5) == 0);
    NEED(getsockname(listener, (void *)&address, &length) == 0);
    snprintf(text, sizeof text, "%d", ntohs(address.sin_port));
    tell("port", text);
    int client = accept(listener, 0, 0);
    NEED(client >= 0 && read(client, text, 1) == 1);
    hold();
    if (access("kept", F_OK) == 0) { /* it was not moved */
        NEED(write(client, "here", 4) == 4);
        return;
    }
    NEED(read(client, text, 16) == -1 && errno == ECONNRESET);
    NEED(read(client, text, 16) == 0);
    tell("accepting", "now");
    client = accept(listener, 0, 0);
    NEED(client >= 0 && read(client, text, 1) == 1 && write(client, "here", 4) == 4);
}

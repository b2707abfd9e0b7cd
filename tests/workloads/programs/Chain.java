import java.io.IOException;
import java.io.RandomAccessFile;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.CyclicBarrier;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;

/** Hash chains in threads that meet at a barrier, garbage for the collector, a scheduled task, a log. */
public final class Chain {
    static final int THREADS = 8;
    static final int LINKS_PER_ROUND = 20;
    static final int STATE_BYTES = 1 << 20;
    static Path directory;
    static volatile boolean leave;

    static final class Bad extends RuntimeException {
        Bad(String message) {
            super(message);
        }
    }

    static void check(boolean condition, String message) {
        if (!condition) {
            throw new Bad(message);
        }
    }

    /** Write the verdict and end at once; the first caller's counts. */
    static synchronized void conclude(String text) {
        try {
            Path fresh = directory.resolve("result." + ProcessHandle.current().pid());
            Files.writeString(fresh, text + "\n");
            Files.move(fresh, directory.resolve("result"), StandardCopyOption.ATOMIC_MOVE);
        } catch (IOException error) {
            error.printStackTrace();
        }
        Runtime.getRuntime().halt(text.startsWith("ok") ? 0 : 1);
    }

    static byte stateByte(int index) {
        return (byte) (index * 7 + (index >> 8));
    }

    /** One thread's chain: link n is the hash of link n-1, the thread and n. */
    static final class Links {
        final MessageDigest digest;
        final int thread;
        byte[] link = new byte[32];
        long count;

        Links(int thread) throws Exception {
            this.thread = thread;
            digest = MessageDigest.getInstance("SHA-256");
        }

        void add() {
            digest.update(link);
            count++;
            link = digest.digest((thread + " " + count).getBytes(StandardCharsets.US_ASCII));
        }
    }

    final byte[] state = new byte[STATE_BYTES];
    final Links[] links = new Links[THREADS];
    final AtomicLong rounds = new AtomicLong();
    final AtomicLong ticks = new AtomicLong();
    final long startedNs = System.nanoTime();
    final long pid = Long.parseLong(Path.of("/proc/self").toRealPath().getFileName().toString());
    final RandomAccessFile alive;
    final RandomAccessFile log;
    final CyclicBarrier barrier = new CyclicBarrier(THREADS, this::roundDone);
    final ThreadLocal<Integer> identity = new ThreadLocal<>();

    Chain() throws Exception {
        alive = new RandomAccessFile(directory.resolve("alive").toFile(), "rw");
        log = new RandomAccessFile(directory.resolve("log").toFile(), "rw");
        for (int i = 0; i < 16; i++) {
            state[i] = (byte) (i * 37 + 11);
        }
        for (int i = 16; i < STATE_BYTES; i++) {
            state[i] = stateByte(i);
        }
        for (int i = 0; i < THREADS; i++) {
            links[i] = new Links(i);
        }
    }

    void verifyState() {
        for (int i = 16; i < STATE_BYTES; i++) {
            if (state[i] != stateByte(i)) {
                throw new Bad("byte " + i + " of the state is " + state[i]);
            }
        }
    }

    /** Run by the last thread to arrive at the barrier, while all the others wait. */
    void roundDone() {
        try {
            long round = rounds.incrementAndGet();
            for (Links one : links) {
                check(one.count == round * LINKS_PER_ROUND, "thread " + one.thread + " has " + one.count + " links");
            }
            byte[] line = String.format("%020d\n", round).getBytes(StandardCharsets.US_ASCII);
            log.write(line);
            alive.seek(0);
            alive.write(line);
            if (round % 8 == 0) {
                verifyState();
            }
            check(Path.of("/proc/self").toRealPath().endsWith(Long.toString(pid)), "the pid changed");
            leave = Files.exists(directory.resolve("stop"));
        } catch (Bad bad) {
            conclude("bad: " + bad.getMessage());
        } catch (IOException error) {
            conclude("bad: " + error);
        }
    }

    void work(Links own) {
        try {
            identity.set(own.thread);
            List<byte[]> garbage = new ArrayList<>();
            while (!leave) {
                for (int i = 0; i < LINKS_PER_ROUND; i++) {
                    own.add();
                    garbage.add(own.link.clone());
                }
                check(java.util.Arrays.equals(garbage.get(garbage.size() - 1), own.link), "the heap changed");
                if (garbage.size() > 4000) {
                    garbage = new ArrayList<>();
                }
                check(identity.get() == own.thread, "thread local state changed");
                long before = System.nanoTime();
                Thread.sleep(10);
                check(System.nanoTime() - before >= 9_000_000L, "Thread.sleep came back early");
                barrier.await();
            }
        } catch (Exception error) {
            conclude("bad: thread " + own.thread + ": " + error);
        }
    }

    void tick() {
        long count = ticks.incrementAndGet();
        long elapsedNs = System.nanoTime() - startedNs;
        if (count > elapsedNs / 20_000_000L + 1) {
            conclude("bad: " + count + " ticks in " + elapsedNs + " ns");
        }
    }

    void verifyLog() throws IOException {
        List<String> lines = Files.readAllLines(directory.resolve("log"));
        for (int i = 0; i < lines.size(); i++) {
            check(lines.get(i).equals(String.format("%020d", i + 1)), "log: line " + (i + 1) + " is " + lines.get(i));
        }
        check(lines.size() == rounds.get(), "log has " + lines.size() + " lines, " + rounds.get() + " were written");
    }

    String live() throws Exception {
        ScheduledExecutorService scheduler = Executors.newScheduledThreadPool(1);
        scheduler.scheduleAtFixedRate(this::tick, 20, 20, TimeUnit.MILLISECONDS);
        List<Thread> threads = new ArrayList<>();
        for (Links own : links) {
            Thread thread = new Thread(() -> work(own));
            threads.add(thread);
            thread.start();
        }
        for (Thread thread : threads) {
            thread.join();
        }
        scheduler.shutdown();
        check(ticks.get() > 0, "the scheduled task never ran");
        for (Links one : links) {
            Links again = new Links(one.thread);
            while (again.count < one.count) {
                again.add();
            }
            check(java.util.Arrays.equals(again.link, one.link), "chain " + one.thread + " ends in a wrong link");
        }
        verifyState();
        verifyLog();
        return rounds + " rounds, " + ticks + " ticks";
    }

    public static void main(String[] args) {
        directory = Path.of(args[0]);
        try {
            conclude("ok " + new Chain().live());
        } catch (Exception error) {
            conclude("bad: " + error);
        }
    }
}

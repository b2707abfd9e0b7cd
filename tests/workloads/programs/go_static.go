// Sixty-four goroutines pass numbered tokens round a ring of channels, with timers, locks and garbage.
package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

const (
	members    = 64
	stateBytes = 1 << 20
)

type token struct {
	lap  uint64
	hops int
	hash [32]byte
}

var (
	directory string
	verdict   sync.Mutex
	pid       = os.Getpid()
)

// conclude writes the verdict and ends; the lock is never given back, so the first verdict counts.
func conclude(code int, text string) {
	verdict.Lock()
	fresh := filepath.Join(directory, fmt.Sprintf("result.%d", pid))
	if err := os.WriteFile(fresh, []byte(text+"\n"), 0o644); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	if err := os.Rename(fresh, filepath.Join(directory, "result")); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

func check(condition bool, format string, args ...any) {
	if !condition {
		conclude(1, "bad: "+fmt.Sprintf(format, args...))
	}
}

func stateByte(i int) byte { return byte(i*7 + i>>8) }

func verifyState(state []byte) {
	for i := 16; i < len(state); i++ {
		check(state[i] == stateByte(i), "byte %d of the state is %d", i, state[i])
	}
}

// hop is what a member does to a token. It is the same everywhere, so a lap can be checked by doing it again.
func hop(t token, member int) token {
	t.hash = sha256.Sum256(append(t.hash[:], byte(member), byte(t.lap)))
	t.hops++
	return t
}

type money struct {
	sync.Mutex
	amount int64
}

// pass moves one coin between two accounts, locked in order.
func pass(accounts []money, from, to int) {
	first, second := from, to
	if first > second {
		first, second = second, first
	}
	accounts[first].Lock()
	accounts[second].Lock()
	accounts[from].amount--
	accounts[to].amount++
	accounts[second].Unlock()
	accounts[first].Unlock()
}

func member(number int, in <-chan token, out chan<- token, accounts []money, done *sync.WaitGroup) {
	defer done.Done()
	var laps uint64
	var garbage [][]byte
	for t := range in {
		laps++
		check(t.lap == laps && t.hops == number, "member %d got lap %d hop %d, expected lap %d", number, t.lap, t.hops, laps)
		t = hop(t, number)
		kept := append([]byte(nil), t.hash[:]...)
		garbage = append(garbage, make([]byte, 512), kept)
		check(bytes.Equal(garbage[len(garbage)-1], t.hash[:]), "member %d: the heap changed", number)
		if len(garbage) > 200 {
			garbage = nil
		}
		pass(accounts, number, (number*5+int(laps))%members/2*2+1-number%2)
		out <- t
	}
	close(out)
}

// ticker counts a periodic timer against the monotonic clock.
func ticker(started time.Time, ticks *atomic.Int64, quit <-chan struct{}) {
	periodic := time.NewTicker(10 * time.Millisecond)
	defer periodic.Stop()
	for {
		select {
		case <-periodic.C:
			count, elapsed := ticks.Add(1), time.Since(started)
			check(count <= int64(elapsed/(10*time.Millisecond))+1, "%d ticks in %v", count, elapsed)
		case <-quit:
			return
		}
	}
}

func verifyLog(log *os.File, laps uint64) {
	content, err := os.ReadFile(log.Name())
	check(err == nil, "log: %v", err)
	lines := bytes.SplitAfter(content, []byte("\n"))
	for i, line := range lines[:len(lines)-1] {
		check(string(line) == fmt.Sprintf("%020d\n", i+1), "log: line %d is %q", i+1, line)
	}
	check(uint64(len(lines)-1) == laps, "log has %d lines, %d were written", len(lines)-1, laps)
}

func total(accounts []money) (sum int64) {
	for i := range accounts {
		accounts[i].Lock()
	}
	for i := range accounts {
		sum += accounts[i].amount
	}
	for i := range accounts {
		accounts[i].Unlock()
	}
	return sum
}

// lap sends one token round the ring and checks what comes back.
func lap(number uint64, first chan<- token, last <-chan token) {
	first <- token{lap: number}
	got := <-last
	want := token{lap: number}
	for i := 0; i < members; i++ {
		want = hop(want, i)
	}
	check(got == want, "lap %d came back different after %d hops", number, got.hops)
}

func create(name string) *os.File {
	file, err := os.Create(filepath.Join(directory, name))
	check(err == nil, "%v", err)
	return file
}

func main() {
	directory = os.Args[1]
	alive, log := create("alive"), create("log")
	state := make([]byte, stateBytes)
	for i := range state {
		state[i] = stateByte(i)
		if i < 16 {
			state[i] = byte(i*37 + 11)
		}
	}
	accounts := make([]money, members)
	ring := make([]chan token, members+1)
	for i := range ring {
		ring[i] = make(chan token)
	}
	var done sync.WaitGroup
	for i := 0; i < members; i++ {
		done.Add(1)
		go member(i, ring[i], ring[i+1], accounts, &done)
	}
	var ticks atomic.Int64
	quit := make(chan struct{})
	go ticker(time.Now(), &ticks, quit)
	laps := uint64(0)
	for {
		laps++
		lap(laps, ring[0], ring[members])
		if laps%16 == 0 {
			verifyState(state)
			check(total(accounts) == 0, "the accounts hold %d", total(accounts))
		}
		line := fmt.Sprintf("%020d\n", laps)
		_, err := log.WriteString(line)
		check(err == nil, "log: %v", err)
		_, err = alive.WriteAt([]byte(line), 0)
		check(err == nil, "alive: %v", err)
		check(os.Getpid() == pid, "pid was %d, is %d", pid, os.Getpid())
		before := time.Now()
		<-time.After(3 * time.Millisecond)
		check(time.Since(before) >= 3*time.Millisecond, "a timer fired early")
		if _, err := os.Stat(filepath.Join(directory, "stop")); err == nil {
			break
		}
	}
	close(ring[0])
	done.Wait()
	close(quit)
	verifyState(state)
	check(total(accounts) == 0, "the accounts hold %d", total(accounts))
	check(ticks.Load() > 0, "the ticker never ticked")
	verifyLog(log, laps)
	conclude(0, fmt.Sprintf("ok %d laps, %d ticks", laps, ticks.Load()))
}

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// lifelineVariable, when set, holds the process id of the owner. The owner also holds the other end of
// our standard input.
const lifelineVariable = "DISAGGSERVE_LIFELINE"

// watchLifeline calls gone, once, when the owner has died or has closed our standard input.
//
// Why not PR_SET_PDEATHSIG: it is bound to the thread that forked, not to the process, and Python forks
// from any thread. (Between us and the command it will do: we hold the thread.) Why two signs: a process that the owner forked without exec (a fork server) inherits the
// pipe's other end, which would hide the owner's death; the pidfd does not have that hole, and the pipe
// lets a living owner say "stop" and covers kernels without pidfd_open.
func watchLifeline(gone func()) error {
	value, set := os.LookupEnv(lifelineVariable)
	if !set {
		return nil
	}
	owner, err := strconv.Atoi(value)
	if err != nil {
		return fmt.Errorf("supervise: %s=%q is not a process id", lifelineVariable, value)
	}
	// Not for what we start ourselves: its standard input is something else.
	if err := os.Unsetenv(lifelineVariable); err != nil {
		return err
	}
	var once sync.Once
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		once.Do(gone)
	}()
	go func() {
		pidfd, err := unix.PidfdOpen(owner, 0)
		if errors.Is(err, unix.ESRCH) {
			once.Do(gone)
			return
		}
		if err != nil {
			return
		}
		if os.Getppid() != owner { // it died before we looked, and its number may be another's by now
			once.Do(gone)
			return
		}
		for {
			ready, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, -1)
			if ready > 0 || (err != nil && !errors.Is(err, unix.EINTR)) {
				break
			}
		}
		if !alive(owner) {
			once.Do(gone)
		}
	}()
	return nil
}

// alive keeps a failing poll from being taken for the owner's death. An owner that is a zombie is dead.
func alive(owner int) bool {
	return os.Getppid() == owner
}

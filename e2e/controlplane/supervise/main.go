// supervise -- COMMAND ARGUMENTS runs the command in a process group of its own and ends the whole group with
// itself, with the owner, or with the command, whichever is first. It exits as the command did (128 + the
// signal's number if a signal ended it).
//
// SIGTERM, SIGINT, SIGHUP and the owner's end: SIGTERM to the group, after a grace period SIGKILL.
// SIGQUIT: SIGKILL at once.
//
// A program of its own, not a mode of the control plane: it must be there within seconds also where ready
// binaries make building the rest unnecessary.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// graceVariable: seconds between SIGTERM and SIGKILL when the owner is gone.
const graceVariable = "DISAGGSERVE_GRACE_S"

func main() {
	os.Exit(run())
}

func run() int {
	arguments := os.Args[1:]
	if len(arguments) > 0 && arguments[0] == "--" {
		arguments = arguments[1:]
	}
	if len(arguments) == 0 {
		fmt.Fprintln(os.Stderr, "supervise: give -- COMMAND ARGUMENTS")
		return 2
	}
	grace := 5 * time.Second
	if value, set := os.LookupEnv(graceVariable); set {
		seconds, err := strconv.ParseFloat(value, 64)
		if err != nil {
			fmt.Fprintf(os.Stderr, "supervise: %s=%q is not a number\n", graceVariable, value)
			return 2
		}
		grace = time.Duration(seconds * float64(time.Second))
		_ = os.Unsetenv(graceVariable)
	}

	stop := make(chan os.Signal, 4)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT)
	if err := watchLifeline(func() { stop <- syscall.SIGTERM }); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	// Orphans of the command become our children, so that one that left the group is still found.
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	died := make(chan os.Signal, 1)
	signal.Notify(died, syscall.SIGCHLD)
	// Pdeathsig is bound to this thread: the main goroutine keeps it until we exit.
	runtime.LockOSThread()

	command := exec.Command(arguments[0], arguments[1:]...)
	command.Stdout, command.Stderr = os.Stdout, os.Stderr
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := command.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "supervise:", err)
		if errors.Is(err, os.ErrNotExist) {
			return 127
		}
		return 126
	}
	group := command.Process.Pid
	ended := make(chan error, 1)
	go func() { ended <- command.Wait() }()

	var insist <-chan time.Time
	for {
		select {
		case received := <-stop:
			if received == syscall.SIGQUIT {
				_ = syscall.Kill(-group, syscall.SIGKILL)
				continue
			}
			_ = syscall.Kill(-group, syscall.SIGTERM)
			if insist == nil {
				insist = time.After(grace)
			}
		case <-insist:
			_ = syscall.Kill(-group, syscall.SIGKILL)
		case <-died:
			buryOrphans(group)
		case <-ended:
			_ = syscall.Kill(-group, syscall.SIGKILL)
			killOrphans()
			return exitStatus(command.ProcessState)
		}
	}
}

// killOrphans ends what the command left behind, also what had made a group of its own. Each killed
// process hands us its own children, so we look until there are none.
func killOrphans() {
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); {
		children := children()
		if len(children) == 0 {
			return
		}
		for _, child := range children {
			_ = syscall.Kill(child, syscall.SIGKILL)
		}
		_, _ = syscall.Wait4(-1, nil, 0, nil)
	}
}

// buryOrphans keeps a long-lived command's dead grandchildren from staying zombies. The command itself is
// not ours to wait for here: command.Wait does that.
func buryOrphans(command int) {
	for _, child := range children() {
		if child != command {
			_, _ = syscall.Wait4(child, nil, syscall.WNOHANG, nil)
		}
	}
}

func children() []int {
	var found []int
	threads, _ := os.ReadDir("/proc/self/task")
	for _, thread := range threads {
		line, err := os.ReadFile("/proc/self/task/" + thread.Name() + "/children")
		if err != nil {
			continue
		}
		for _, field := range strings.Fields(string(line)) {
			if child, err := strconv.Atoi(field); err == nil {
				found = append(found, child)
			}
		}
	}
	return found
}

func exitStatus(state *os.ProcessState) int {
	status, isWait := state.Sys().(syscall.WaitStatus)
	if isWait && status.Signaled() {
		return 128 + int(status.Signal())
	}
	return state.ExitCode()
}

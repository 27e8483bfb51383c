"""Nobody is taken for ended who still runs: what it changes next would be put down to the next trial."""

from __future__ import annotations

import subprocess
import sys

from tests.crash import processes

FIRST_THREAD_ENDS = """
import ctypes, sys, threading, time

def rest():
    while open("/proc/self/stat").read().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    print("alone", flush=True)
    sys.stdin.read()

threading.Thread(target=rest).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_whose_first_thread_alone_has_ended_still_runs() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FIRST_THREAD_ENDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout
            assert child.stdout.readline() == "alone\n"
            assert child.pid in processes.children()
            assert child.pid in processes.attached(())
        finally:
            processes.end([child.pid])
    assert child.pid not in processes.children()

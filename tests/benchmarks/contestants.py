"""Stand-ins that `test_contest.py` races: a quick one with a counter that never rests, and a slow one."""

import threading
import time

counted = 0


def build_quick(options, dtype):
    def count():
        global counted
        while True:
            counted += 1
            time.sleep(0.001)

    threading.Thread(target=count, daemon=True).start()

    def step():
        time.sleep(0.02)
        print(f"ANSWERS may be {options.batch} and {dtype}, among other things", flush=True)
        return float(counted)  # "waited for data": what the counter says

    return step, 4e9


def build_slow(options, dtype):
    return lambda: time.sleep(0.4), 4e9


def build_broken(options, dtype):
    raise ValueError("this one does not begin")

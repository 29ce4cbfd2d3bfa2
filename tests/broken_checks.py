"""Checks for test_gpu_check.py that pass, break, hang and die. The process of each imports this module."""

import dataclasses
import os
import signal
import subprocess
import time
from unittest import mock

from processes import FOREVER_S

from famba.gpu_check import Outcome, Skipped


def passes(setting, say):
    return Outcome(f"{setting.device}\nit is", {"steps": [{"x": 1}]})


def has_a_wrong_scan(setting, say, change=lambda out: out * 1.001):
    from famba.gpu_check import accuracy
    from famba.kernels import scan

    right = scan._BACKENDS["native"]
    wrong = dataclasses.replace(right, run=lambda *given: change(right.run(*given)))
    with mock.patch.dict(scan._BACKENDS, native=wrong):
        return accuracy.operators(setting, say)


def has_a_scan_that_raises(setting, say):
    return has_a_wrong_scan(setting, say, mock.Mock(side_effect=RuntimeError("no such chip")))


def forgets_its_optimiser(setting, say):
    from famba.gpu_check import checks
    from famba.training import trainer

    restore, folders = trainer.Trainer.restore, []

    def forgetful(self):
        restore(self)
        self.optimiser.state.clear()
        folders.append(self.folder)

    try:
        with mock.patch.object(trainer.Trainer, "restore", forgetful):
            return checks.training(setting, say)
    finally:
        assert len(folders) == 2
        say(f"checkpoints left: {[folder.name for folder in folders if folder.exists()]}")


def hangs(setting, say):
    say(f"waiting for {subprocess.Popen(['sleep', str(FOREVER_S)]).pid}")
    time.sleep(FOREVER_S)


def is_killed(setting, say):
    say("reading nowhere")
    os.kill(os.getpid(), signal.SIGSEGV)


def exits(setting, say):
    os._exit(3)


def cannot_run(setting, say):
    raise Skipped("no such program")


def lacks_a_package(setting, say):
    import nowhere.at_all  # noqa: F401 # pyright: ignore


def raises(setting, say):
    print("what the compiler printed")
    raise RuntimeError("no such device\nat all")

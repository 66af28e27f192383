"""The commands `fit`, `validate`, `test` and `predict`."""

import logging
import os
import shlex
import signal
import sys
from functools import partial

from lightning.pytorch.utilities.exceptions import SIGTERMException

from scalablevit_pl.callbacks.preemption import REQUEUE, PreemptedError, requeue_job
from scalablevit_pl.commands.console import fail, is_first_process
from scalablevit_pl.experiment.invocation import Invocation
from scalablevit_pl.experiment.run import run_experiment

logger = logging.getLogger(__name__)


def run_command(command: str, options: list[str]) -> int:
    """Run one of the commands and return the exit status."""
    invocation = Invocation.parse([command, *options])
    if command == "predict" and not (invocation.run or invocation.configs or "--help-all" in options):
        from scalablevit_pl.commands.predict import predict_files

        return predict_files(options)
    invocation = invocation.resolve()
    before = sys.argv
    try:
        sys.argv = [before[0], *invocation.render()]  # with which Lightning starts the processes of further devices
        run_experiment(invocation, shlex.join(["scalablevit", command, *options]))
    except PreemptedError as stop:
        return end_preempted(stop)
    except SIGTERMException:  # Lightning's own end would have status 0, as if everything were done
        fail("stopped by SIGTERM")
        return 128 + signal.SIGTERM
    finally:
        sys.argv = before
    return 0


fit = partial(run_command, "fit")
validate = partial(run_command, "validate")
test = partial(run_command, "test")
predict = partial(run_command, "predict")


def end_preempted(stop: PreemptedError) -> int:
    """Report how to resume a stopped run, have SLURM requeue it if its signal asked for that, and return the status."""
    first = is_first_process()
    job = requeue_job() if first and stop.signum == REQUEUE else None
    if job is not None:
        logger.info("%s: job %s is requeued and will resume", stop, job)
    if stop.signum == REQUEUE and "SLURM_JOB_ID" in os.environ:
        return 0  # on all tasks: if one ended with an error, SLURM might end the first one before it has asked
    if first:
        fail(f"{stop}: continue with --resume auto")
    return 128 + stop.signum

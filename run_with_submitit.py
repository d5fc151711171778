"""Train on a SLURM cluster, with all options of main.py::

    python run_with_submitit.py --nodes 2 --ngpus 8 --shared-dir DIR --model deit_small …

The job saves and is requeued before its time limit and on preemption, as often as needed, and goes
on from its newest checkpoint; ``scancel`` ends it with a checkpoint. docs/cluster.md has the rest.

Everything heavy is imported late: ``--help`` and a misspelled option answer at once.
"""

import logging
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Config, Parser, get_parser, resolve, section_options, to_yaml
from config.job import SHARED_DIR, JobOptions
from errors import OptionError, Stopped, UserError, os_errors_in_words
from outputs.console import console
from training.options import options_of_checkpoint

if TYPE_CHECKING:
    import submitit

ROOT = Path(__file__).resolve().parent
# Where --print-config says that an implied option comes from.
ORIGIN = "run_with_submitit.py"
# What submitit counts down at each time limit; a run of months mustn't reach the end of it.
REQUEUES = 1_000_000
# Below the range from which Linux hands out ports to whoever asks (32768 and up).
PORTS = (15_000, 32_000)
POLL_SECONDS = 2.0
# States of a job that won't run again; a requeued one is PENDING.
FAILED = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

LAUNCHER = section_options(JobOptions, "launcher")


def get_args_parser() -> Parser:
    """main.py's command line, and the cluster's options before it."""
    parser = get_parser(defaults=False, launcher=LAUNCHER)
    parser.prog = "run_with_submitit.py"
    parser.usage = "run_with_submitit.py [--nodes N] [--ngpus N] [main.py's options]"
    parser.description = "Train on a SLURM cluster: the cluster's options, then those of main.py."
    parser.epilog = (
        "Example: run_with_submitit.py --nodes 2 --ngpus 8 --shared-dir DIR --config "
        "configs/deit_small.yaml --data-path imagenet"
    )
    return parser


def load(argv: Sequence[str] | None = None) -> tuple[JobOptions, list[Config]]:
    """The cluster's options and the runs', one of them for each task of the array."""
    given = vars(get_args_parser().parse_args(argv))
    names = {opt.name for opt in LAUNCHER}
    job = JobOptions(**{name: value for name, value in given.items() if name in names})
    run = {name: value for name, value in given.items() if name not in names}
    _check(job, run)
    each = [run | {"config": file} for file in job.array_of_configs] or [run]
    configs = [resolve(values, options_of_checkpoint) for values in each]
    return job, [_for_cluster(job, config) for config in configs]


def _check(job: JobOptions, run: Mapping[str, Any]) -> None:
    """Raise OptionError for options that contradict each other."""
    if job.ngpus > 0 and job.tasks_per_node not in (None, job.ngpus):
        raise OptionError(
            "tasks_per_node",
            f"{job.tasks_per_node}, but a GPU has one process: leave it out, or --ngpus 0",
        )
    if job.warning >= job.timeout * 60:
        raise OptionError(
            "warning",
            f"{job.warning} seconds before the end is before the start of --timeout {job.timeout} "
            "(minutes): lower it",
        )
    if job.array_of_configs and "config" in run:
        raise OptionError(
            "config",
            "and --array-of-configs both name YAML files: leave one out (base: in a file shares "
            "them)",
        )
    if len(job.array_of_configs) > 1 and "%j" not in run.get("output_dir", "%j"):
        raise OptionError(
            "output_dir",
            "would be shared by all runs of the array: put %j, the job's id, into it",
        )
    if job.local and job.nodes > 1:
        raise OptionError("local", f"is one machine: leave out --nodes {job.nodes}")


def _for_cluster(job: JobOptions, config: Config) -> Config:
    """``config`` with what the cluster's options imply."""
    implied: dict[str, Any] = {}
    if job.ngpus == 0:
        if config.run.device.startswith("cuda"):
            raise OptionError("ngpus", f"0, but --device {config.run.device}: leave one out")
        if config.run.device == "auto":
            implied["device"] = "cpu"
    if not config.run.output_dir:
        # Beside the logs; without %j in the folder's name its jobs still keep apart.
        folder = job_dir(job)
        implied["output_dir"] = str(folder / ("output" if "%j" in str(folder) else "output-%j"))
    return config.replace(ORIGIN, **implied)


def job_dir(job: JobOptions) -> Path:
    """Where logs and, by default, results are written; ``%j`` stands for the job's id."""
    if job.job_dir:
        return Path(job.job_dir).expanduser().absolute()
    shared = job.shared_dir or os.environ.get(SHARED_DIR)
    if not shared and not job.local:
        raise OptionError(
            "shared_dir",
            f"name a folder that all nodes see (or set {SHARED_DIR}), or give --job-dir",
        )
    return Path(shared or "output").expanduser().absolute() / "jobs" / "%j"


# --- on the cluster -------------------------------------------------------------------------------


class TrainingJob:
    """One process of a run, as SLURM starts it: at first, and again after each requeue."""

    def __init__(self, config: Config, requeued: bool = False) -> None:
        self.config = config
        self.requeued = requeued

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """What submitit is to run after a requeue."""
        import submitit

        return submitit.helpers.DelayedSubmission(TrainingJob(self.config, requeued=True))

    def __call__(self) -> int:
        import submitit

        # Not said twice: main.py's messages come from the root logger.
        logging.getLogger("submitit").propagate = False
        env = submitit.JobEnvironment()
        # submitit's own handler writes the pickle anew and requeues the job. It runs once training
        # has stopped and saved, not in the middle of a step.
        warning = getattr(signal, f"SIG{env.USR_SIG}")
        requeue = partial(signal.getsignal(warning), warning)
        leave = partial(_leave, is_main=env.global_rank == 0, requeue=requeue)
        _until_training(leave, is_main=env.global_rank == 0)
        _export_environment(env)
        output = self.config.run.output_dir.replace("%j", env.job_id)
        config = self.config.replace(ORIGIN, output_dir=output)
        # Plain "scontrol requeue" reruns the first pickle; SLURM counts those as well.
        requeued = self.requeued or int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
        try:
            with os_errors_in_words():
                code = _train(config, requeued=requeued)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = error.exit_code
        except Stopped as stopped:
            # Before there was anything to save, or out of a wait for images without the others.
            print(stopped, file=sys.stderr, flush=True)
            code = stopped.exit_code
        if code:
            leave(code)
        return code


def _train(config: Config, *, requeued: bool) -> int:
    """Start the run, or go on with it from its newest checkpoint."""
    from checkpointing.folder import checkpoints_in
    from training.resume import output_folder
    from training.run import run

    if not config.run.eval:
        # Whatever it was first started from, it has got further since.
        further = requeued and checkpoints_in(output_folder(config))
        if further or not config.run.resume:
            config = config.replace(ORIGIN, resume="auto", start_epoch=0)
    return run(config)


def _until_training(leave: Callable[[int], None], *, is_main: bool) -> None:
    """Set what signals do until training has its own handlers (training.signals.StopRequest).

    The main process leaves; the others wait to be ended with it, for it may be waiting for them
    where no handler runs, in the rendezvous.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: leave(128 + number) if is_main else None)
    # It comes with SIGTERM, and submitit would tell of it.
    signal.signal(signal.SIGCONT, signal.SIG_DFL)


def _export_environment(env: "submitit.JobEnvironment") -> None:
    """Tell torch.distributed who takes part. Every process sees all GPUs of its node."""
    import submitit

    # submitit would draw a port at which the kernel may have put somebody else's connection.
    start = f"{env.job_id}/{os.environ.get('SLURM_RESTART_COUNT', 0)}"
    os.environ["MASTER_PORT"] = str(random.Random(start).randint(*PORTS))
    submitit.helpers.TorchDistributedEnvironment().export(
        set_cuda_visible_devices=False, overwrite=True
    )


def _leave(code: int, *, is_main: bool, requeue: Callable[[None], None]) -> None:
    """End this process of a run that stopped with exit ``code``; requeue the job if it goes on."""
    # Both cancelling and requeueing send more signals, while Python is already on its way out.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if not is_main and code > 128:
        # An error code would make SLURM end the main process before it has requeued the job.
        sys.exit(0)
    if _goes_on(code - 128):
        print("requeued: the job goes on from its newest checkpoint by itself", flush=True)
        requeue(None)
    sys.exit(code)


def _goes_on(number: int) -> bool:
    """Whether a job that was stopped by signal ``number`` is to be requeued.

    USR1 and USR2 announce a time limit or preemption, and so may TERM, which is scancel's as well.
    A job that doesn't run any more was cancelled, or requeued already, since the signal came.
    """
    warned = number in (signal.SIGUSR1, signal.SIGUSR2)
    if "SLURM_JOB_ID" not in os.environ or not (warned or number == signal.SIGTERM):
        return warned
    job = _show_job(os.environ["SLURM_JOB_ID"])
    preempted = job.get("PreemptTime", "None") != "None"
    return job.get("JobState", "RUNNING") == "RUNNING" and (warned or preempted)


def _show_job(job_id: str) -> dict[str, str]:
    """SLURM's account of a job; empty when it has forgotten it (or doesn't answer)."""
    try:
        answer = subprocess.run(
            ["scontrol", "show", "job", "-o", job_id], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(re.findall(r"(\w+)=(\S*)", answer.stdout))


# --- submission -----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Submit what the command line says; returns the exit code."""
    with console():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    try:
        with os_errors_in_words():
            return _submit(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("no longer following; what was submitted goes on", file=sys.stderr)
        return 130


def _submit(argv: Sequence[str] | None) -> int:
    job, configs = load(argv)
    if configs[0].run.print_config:
        for config in configs:
            print(to_yaml(config, origins=True, everything=True), end="")
        return 0
    for config in configs:
        _refuse_other_runs(config)
    executor = build_executor(job, configs[0])
    if job.local:
        return max(_try_out(executor, config) for config in configs)
    submitted = submit(executor, configs)
    for each, config in zip(submitted, configs, strict=True):
        introduce(job, each, config)
    return follow(submitted) if job.follow else 0


def _refuse_other_runs(config: Config) -> None:
    """The job itself can't tell its own earlier checkpoints from those of another run."""
    folder = Path(config.run.output_dir).expanduser()
    if config.run.resume or not folder.exists():
        return
    from training.resume import refuse_other_run

    refuse_other_run(config, folder)


def build_executor(job: JobOptions, config: Config) -> "submitit.Executor":
    """submitit's executor with the resources of ``job``."""
    if not job.local and shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch here: submit from a machine of the cluster, or try the run out on "
            "this one with --local"
        )
    import submitit

    folder = job_dir(job)
    try:
        executor = submitit.AutoExecutor(
            folder, cluster="local" if job.local else "slurm", slurm_max_num_timeout=REQUEUES
        )
    except OSError as error:
        raise OptionError(
            "job_dir", f"{folder} can't be written: {error.strerror}; choose another"
        ) from None
    # The job imports this project wherever it was submitted from.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ["PYTHONPATH"] = path
    named = {name: getattr(job, name) for name in ("partition", "account", "qos", "constraint")}
    parameters = dict(
        name=f"{config.model.model}-{config.data.data_set}".replace("/", "-"),
        timeout_min=job.timeout,
        nodes=job.nodes,
        tasks_per_node=job.processes,
        gpus_per_node=job.ngpus or None,
        cpus_per_task=job.cpus_per_task,
        slurm_mem=None if job.mem_gb is None else f"{round(job.mem_gb * 1024)}M",
        slurm_comment=job.comment or None,
        slurm_signal_delay_s=job.warning,
        # Where one process fails the others would wait for it, and hold their nodes.
        slurm_srun_args=["--kill-on-bad-exit=1"],
        slurm_additional_parameters={"requeue": True},
        slurm_setup=[f"export PYTHONPATH={shlex.quote(path)}"],
        **{f"slurm_{name}": value or None for name, value in named.items()},
    )
    executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None})
    return executor


def submit(executor: "submitit.Executor", configs: Sequence[Config]) -> list["submitit.Job[int]"]:
    """Hand the runs to SLURM, several as an array."""
    from submitit.core.utils import FailedJobError

    try:
        return executor.submit_array([TrainingJob(config) for config in configs])
    except FailedJobError as error:
        lines = [line for line in str(error).splitlines() if "error:" in line]
        reason = lines[-1].partition("error: ")[2] if lines else str(error)
        raise UserError(f"SLURM refused the job: {reason}") from None


def introduce(job: JobOptions, submitted: "submitit.Job[int]", config: Config) -> None:
    """Say where the job is to be found, and how to follow and end it."""
    number, paths = submitted.job_id, submitted.paths
    size = f"{job.nodes} node(s) × {job.processes} process(es)"
    print(f"job      {number}: {size}, at most {job.timeout} minutes at a time")
    print(f"output   {config.run.output_dir.replace('%j', number)}")
    print(f"log      {paths.stdout}")
    print(f"errors   {paths.stderr}")
    log, errors = shlex.quote(str(paths.stdout)), shlex.quote(str(paths.stderr))
    print(f"follow   tail -F {log} {errors}    state: squeue -j {number}")
    print(f"cancel   scancel {number}    (it saves first)", flush=True)


def _try_out(executor: "submitit.Executor", config: Config) -> int:
    """Run on this machine and show the log; Ctrl-C makes the run save and end."""
    # The terminal sends Ctrl-C to all processes. The run knows what to do with it; submitit's
    # controller would kill it.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked: list[int] = []
    try:
        job = executor.submit(TrainingJob(config))
        signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
        print(f"output   {config.run.output_dir.replace('%j', job.job_id)}")
        print(f"log      {job.paths.stdout}", flush=True)
        code = follow([job])
        # submitit's own account knows no exit codes.
        return 128 + asked[0] if code and asked else code
    finally:
        signal.signal(signal.SIGINT, before)


def follow(jobs: Sequence["submitit.Job[int]"]) -> int:
    """Show the main process's log and everybody's errors until all jobs have ended.

    Returns 0 if all went well, else the exit code of one that didn't.
    """
    files = [path for job in jobs for path in _logs(job)]
    shown = dict.fromkeys(files, 0)
    codes: dict[str, int] = {}
    while len(codes) < len(jobs):
        time.sleep(POLL_SECONDS)
        for job in jobs:
            code = _exit_code(job)
            if code is not None:
                codes[job.job_id] = code
        for path in files:
            if path.exists():
                with open(path, encoding="utf-8", errors="replace") as file:
                    file.seek(shown[path])
                    print(file.read(), end="", flush=True)
                    shown[path] = file.tell()
    for number, code in codes.items():
        print(f"job {number} ended {'well' if code == 0 else f'with exit code {code}'}")
    return max(codes.values())


def _logs(job: "submitit.Job[int]") -> list[Path]:
    return [job.paths.stdout, *(task.paths.stderr for task in _tasks(job))]


def _tasks(job: "submitit.Job[int]") -> list["submitit.Job[int]"]:
    return [job.task(number) for number in range(job.num_tasks)]


def _exit_code(job: "submitit.Job[int]") -> int | None:
    """The exit code of a job, None while it waits or runs."""
    import submitit

    if isinstance(job, submitit.LocalJob):
        if not job.done():
            return None
        return 0 if all(task.paths.result_pickle.exists() for task in _tasks(job)) else 1
    shown = _show_job(job.job_id)
    state = shown.get("JobState")
    if state == "COMPLETED":
        return 0
    if state in FAILED:
        return int(shown.get("ExitCode", "1:0").partition(":")[0]) or 1
    return None


if __name__ == "__main__":
    # By its own name, so that the pickled job names a module that can be imported.
    import run_with_submitit

    sys.exit(run_with_submitit.main())

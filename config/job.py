"""The options of a SLURM job, which ``run_with_submitit.py`` takes before those of a run."""

from dataclasses import dataclass

from config.options import option

SHARED_DIR = "TRAIN_SHARED_DIR"  # environment variable


@dataclass(frozen=True)
class JobOptions:
    """Cluster"""

    nodes: int = option(1, "machines", low=1)
    ngpus: int = option(1, "GPUs per node, one process each; 0: CPU nodes", low=0)
    tasks_per_node: int | None = option(
        None, "processes per node on CPU nodes (default: 1); with GPUs it is --ngpus", low=1
    )
    timeout: int = option(
        1440, "minutes a job may last; a longer run is requeued and goes on", low=1
    )
    warning: int = option(
        120, "seconds before the time limit at which the job saves and is requeued", low=1
    )
    partition: str = option("", "SLURM partition")
    account: str = option("", "SLURM account")
    qos: str = option("", "SLURM quality of service")
    constraint: str = option("", "node features, e.g. 'a100' or 'a100|h100'")
    mem_gb: float | None = option(None, "memory per node, GB (default: the cluster's)", above=0)
    cpus_per_task: int = option(10, "cores per process; its workers run on them", low=1)
    comment: str = option("", "comment that SLURM shows with the job")
    job_dir: str = option(
        "", "folder of logs and results, %j is the job's id (default: SHARED_DIR/jobs/%j)"
    )
    shared_dir: str = option(
        "", f"folder that all nodes see (default: the environment variable {SHARED_DIR})"
    )
    array_of_configs: tuple[str, ...] = option(
        (), "YAML files: a job array with one run each, in place of --config"
    )
    local: bool = option(
        False, "try it out on this machine, without SLURM; shows the log until the run ends"
    )
    follow: bool = option(
        False, "show the log until the job ends; the exit code tells whether it went well"
    )

    @property
    def processes(self) -> int:
        """Processes per node."""
        return self.ngpus or self.tasks_per_node or 1

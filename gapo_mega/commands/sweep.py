"""``gapo-mega sweep``: runs that differ in method, preference, seed or any setting, and their front."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from gapo_mega.commands import launch
from gapo_mega.commands.options import Processes
from gapo_mega.files import local

if TYPE_CHECKING:
    from gapo_mega.config.sweep import SweepConfig
    from gapo_mega.runs.sweep_points import Point
    from gapo_mega.runs.sweep_states import State, StateName
    from gapo_mega.runs.sweep_tasks import Task

UNFINISHED = 1  # exit code where points have failed or are left


def sweep(
    config: Annotated[
        Path, typer.Option("--config", "-c", parser=local, metavar="PATH", help="YAML file of the sweep.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings on top of the file, such as jobs=2."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at once. [as many as GPUs, or else cores, have room for]"),
    ] = None,
    nproc: Processes = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every point as its run would; list them; stop.")
    ] = False,
    point: Annotated[
        str | None,
        typer.Option(metavar="I", help="Run this point alone, by number or name; or warm_start."),
    ] = None,
    collect: Annotated[
        bool, typer.Option("--collect", help="Write the results of what has ended; run nothing.")
    ] = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Print a Slurm array job whose tasks run one point each; stop.")
    ] = False,
) -> None:
    """Train every point of a grid of methods, preferences, seeds and settings, and compare them.

    A killed sweep goes on with the same command: finished points stay, others resume.
    """
    _one_of({"--dry-run": dry_run, "--point": point is not None, "--collect": collect, "--slurm": slurm})
    if launch.under_torchrun():
        raise ValueError("sweep: found a process of torchrun, accepted: one process (nproc starts a run's)")
    from gapo_mega.config.loading import load
    from gapo_mega.config.sweep import SweepConfig

    settings = load(config, overrides or [], kind=SweepConfig)
    changes = {name: value for name, value in (("jobs", jobs), ("nproc", nproc)) if value is not None}
    settings = settings.model_copy(update=changes)
    plan = _Plan(settings, config)
    if slurm:
        again = ["--config", str(config), *(overrides or [])]
        again += [] if nproc is None else ["--nproc", str(nproc)]
        print(plan.slurm_script(again), end="")
    elif point is not None:
        plan.run_point(point)
    elif collect:
        plan.collect()
    elif dry_run:
        plan.show(plan.check())
    else:
        plan.run()


def _one_of(options: dict[str, bool]) -> None:
    given = [name for name, is_given in options.items() if is_given]
    if len(given) > 1:
        raise ValueError(f"{given[1]}: found beside {given[0]}, accepted: one of them")


class _Plan:
    """A sweep's tasks, and what the command's options do with them."""

    def __init__(self, settings: SweepConfig, file: Path) -> None:
        from gapo_mega.runs.sweep_points import points_of
        from gapo_mega.runs.sweep_results import check_front
        from gapo_mega.runs.sweep_tasks import point_task, warm_start_task

        self.settings = settings
        self.points: list[Point]
        self.points, self.notes = points_of(settings, file)
        check_front(settings, self.points)
        self.warm_start: Task | None = warm_start_task(settings, file)
        self.tasks: list[Task] = [point_task(settings, file, point) for point in self.points]

    @property
    def _all(self) -> list[Task]:
        return ([] if self.warm_start is None else [self.warm_start]) + self.tasks

    def check(self) -> dict[str, State]:
        """The state of every task, by name. Raises ``ValueError`` for what a run would refuse."""
        from gapo_mega.runs.sweep_tasks import Checks, check_all

        for note in self.notes:
            print(note)
        points, warm = self.tasks, self.warm_start
        checks = Checks(self.settings.nproc, warm)
        found = {} if warm is None else {warm.name: check_all([warm], checks)[0]}
        return found | dict(zip((task.name for task in points), check_all(points, checks), strict=True))

    def show(self, states: dict[str, State]) -> None:
        """Print the points and their states."""
        from gapo_mega.evaluation.sweep_tables import points_table, print_tables

        warm = {} if self.warm_start is None else {self.warm_start.name: states[self.warm_start.name].name}
        rows = [
            (point.index, point.name, states[point.name].name, states[point.name].steps)
            for point in self.points
        ]
        print_tables([points_table(rows, warm)])
        print(self._counted({name: state.name for name, state in states.items()}))
        if any(not point.config.checkpoint.every_steps for point in self.points):
            print("checkpoint.every_steps is 0: a point that is killed (not stopped) begins anew")

    def run(self) -> None:
        """Run what has not ended; write results and pictures; exit with 1 where points are left."""
        from gapo_mega.runs.lock import DirectoryLock
        from gapo_mega.runs.sweep import Pool, room
        from gapo_mega.runs.sweep_results import results_file, write_results
        from gapo_mega.runs.sweep_tasks import log_file

        found = self.check()
        with DirectoryLock(local(self.settings.output_dir), "gapo-mega sweep"):
            space = room(self.settings.jobs, self.settings.nproc, launch.available_cores())
            states: dict[str, StateName] = {name: state.name for name, state in found.items()}
            print(f"{self._counted(states)}; {space.jobs} at once")

            if results_file(self.settings).is_file():  # points may go on to more steps than these
                write_results(self.settings, self.points, states, final=False)

            def ended(task: Task) -> None:
                if task in self.tasks:
                    write_results(self.settings, self.points, pool.states, final=False)

            pool = Pool(space, lambda name: log_file(self.settings, name), ended, states)
            if self.warm_start is not None:
                pool.run([self.warm_start])
            if self.warm_start is None or pool.states[self.warm_start.name] == "finished":
                pool.run(self.tasks)
            self._report(pool.states, final=not pool.stopped)
        if any(state != "finished" for state in pool.states.values()):
            if pool.stopped:
                print("stopped by a signal; the same command goes on from there", file=sys.stderr)
            raise typer.Exit(UNFINISHED)

    def collect(self) -> None:
        """Write the results of what has ended. Raises ``ValueError`` for a run of other settings."""
        from gapo_mega.runs.sweep_states import check_same

        states = {task.name: task.state().name for task in self._all}
        for task in self.tasks:
            if states[task.name] == "finished":
                check_same(task.directory, task.config)
        self._report(states, final=False)

    def run_point(self, wanted: str) -> None:
        """Become the run of one point, or return where it has ended."""
        from gapo_mega.runs.sweep_tasks import Checks, check_all

        task = self._task(wanted)
        warm = self.warm_start
        if warm is not None and task is not warm and warm.state().name != "finished":
            raise ValueError(
                f"--point: found {wanted}, but the warm start has not ended; accepted: warm_start first"
            )
        (state,) = check_all([task], Checks(self.settings.nproc, warm))
        if state.name == "finished":
            print(f"{task.name} has ended: {task.directory}")
            return
        _become(task.arguments(self.settings.nproc))

    def slurm_script(self, arguments: list[str]) -> str:
        """An array job with a task for every point."""
        from gapo_mega.runs.sweep_slurm import script
        from gapo_mega.runs.sweep_tasks import LOGS_FOLDER

        return script(
            name=Path(self.settings.output_dir).name,
            logs=local(self.settings.output_dir) / LOGS_FOLDER,
            arguments=shlex.join(arguments),
            points=len(self.points),
            nproc=self.settings.nproc,
            warm_start=self.warm_start is not None,
        )

    def _task(self, wanted: str) -> Task:
        for index, task in enumerate(self.tasks):
            if wanted in (str(index), task.name):
                return task
        if self.warm_start is not None and wanted == self.warm_start.name:
            return self.warm_start
        raise ValueError(
            f"--point: found {wanted}, accepted: 0 to {len(self.tasks) - 1}, or a point's name"
            + ("" if self.warm_start is None else ", or warm_start")
        )

    def _report(self, states: dict[str, StateName], *, final: bool) -> None:
        from gapo_mega.evaluation.sweep_tables import front_table, points_table, print_tables
        from gapo_mega.runs.checkpoints import set_aside
        from gapo_mega.runs.sweep_results import results_file, write_results

        results = write_results(self.settings, self.points, states, final=final)
        warm = {} if self.warm_start is None else {self.warm_start.name: states[self.warm_start.name]}
        rows = [(point.index, point.name, states[point.name], None) for point in self.points]
        tables = [points_table(rows, warm)]
        print_tables(tables if results["front"] is None else [*tables, *front_table(results)])
        if results["front"] is not None:
            self._compare(states)
        elif self._pictures.is_dir():  # of fewer steps than points have now
            print(f"{self._pictures} is now {set_aside(self._pictures, 'earlier').name}: no point has ended")
        print(self._counted(states))
        print(f"results: {results_file(self.settings)}")

    def _compare(self, states: dict[str, StateName]) -> None:
        """Tables and pictures of the points that have ended, as ``gapo-mega compare`` writes them."""
        from gapo_mega.evaluation.compare import compare
        from gapo_mega.evaluation.compare_files import write_comparison
        from gapo_mega.evaluation.finished_run import read_run

        ended = [point.directory for point in self.points if states[point.name] == "finished"]
        folder = self._pictures
        folder.mkdir(exist_ok=True)
        for path in write_comparison(folder, compare([read_run(directory) for directory in ended])):
            print(f"written: {path}")

    @property
    def _pictures(self) -> Path:
        return local(self.settings.output_dir) / "compare"

    def _counted(self, states: dict[str, StateName]) -> str:
        names = [states[point.name] for point in self.points]
        counts = {name: names.count(name) for name in ("finished", "running", "part", "failed", "new")}
        shown = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        return f"{len(names)} points: {shown}"


def _become(arguments: list[str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "gapo_mega.cli", *arguments])

"""Reports of a run: a progress bar or lines on rank 0, JSON lines, TensorBoard scalars."""

import json
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress


class Report:
    """Reports steps and validations on rank 0, and does nothing on other ranks. Use it as a context manager."""

    def __init__(self, args, first_step):
        self.args, self.active = args, dist.get_rank() == 0
        self.bar = self.file = self.writer = None
        if not self.active:
            return
        self.console = Console(highlight=False, soft_wrap=True)
        if self.console.is_terminal:
            self.bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=self.console)
            self.task = self.bar.add_task("training", total=args.train_iters, completed=first_step)
        if args.log_file:
            keep_steps(Path(args.log_file), first_step)
            self.file = open(args.log_file, "a", encoding="utf-8")
        if args.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self.writer = SummaryWriter(args.tensorboard_dir)

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *failure):
        for part, close in ((self.bar, "stop"), (self.file, "close"), (self.writer, "close")):
            if part:
                getattr(part, close)()

    def step(self, record, figures=None):
        """Report a finished step.

        Args:
            record: the step's record for --log-file.
            figures: IntervalFigures of --cp-log at the end of an interval, else None.
        """
        if not self.active:
            return
        text = (
            f"loss {record['loss']:.4f}  grad norm {record['grad_norm']:.3f}  "
            f"{record['tokens_per_second']:,.0f} tokens/s"
        )
        if self.bar:
            self.bar.update(self.task, completed=record["iteration"], description=text)
        elif record["iteration"] % self.args.log_interval == 0:
            self.console.print(f"step {record['iteration']:>4}/{self.args.train_iters}  {text}")
        scalars = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "cp_bytes_per_rank")
        if figures is not None:
            self.console.print(f"step {record['iteration']:>4}  {figures.line()}")
        more = figures.scalars() if figures is not None else {}
        self._keep(record, {name: record[name] for name in scalars} | more)

    def validation(self, iteration, loss):
        if self.active:
            self.console.print(f"step {iteration:>4}  validation loss {loss:.4f}")
            self._keep({"iteration": iteration, "validation_loss": loss}, {"validation_loss": loss})

    def _keep(self, record, scalars):
        if self.file:
            try:
                self.file.write(json.dumps(record) + "\n")
                self.file.flush()
            except OSError as error:  # do not end a long job because of its log
                self.console.print(f"note: --log-file {self.args.log_file} is no longer written ({error.strerror}).")
                self.file = None
        if self.writer:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, record["iteration"])


def keep_steps(path, last):
    """Truncate the log at ``path`` after step ``last``; a run that resumes there reports later steps again."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if last and path.is_file() else []
    path.write_text("".join(line + "\n" for line in lines if 0 < _step_of(line) <= last), encoding="utf-8")


def _step_of(line):
    """The step of a line of the log; 0 for a line that was cut off when its run was killed."""
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return 0

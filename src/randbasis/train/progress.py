"""What a person sees while a run goes on, on the error stream; answers own the output stream."""

from typing import Any

from rich.console import Console
from rich.progress import TaskID
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from randbasis.progress import progress_bar
from randbasis.train.task import Task


class ProgressReport(TrainerCallback):
    """A bar of steps with the latest loss, and a line for each evaluation.

    Args:
        task: names the metrics that are evaluated.
        console: where to write.
    """

    def __init__(self, task: Task, console: Console):
        self.task = task
        self.console = console
        self.bar = progress_bar(console)
        self.steps: TaskID | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar."""
        self.steps = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self.steps is not None:
            self.bar.update(self.steps, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the latest loss."""
        if self.steps is not None and logs and "loss" in logs:
            self.bar.update(self.steps, description=f"loss {logs['loss']:.4f}")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """A line of metrics."""
        known = {name: (metrics or {}).get(f"eval_{name}") for name in self.task.metric_names}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in known.items() if value is not None)
        self.console.print(f"step {state.global_step}: {shown}", soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the bar as it stands."""
        self.stop()

    def stop(self) -> None:
        """Leave the bar as it stands, also when the run failed."""
        self.bar.stop()

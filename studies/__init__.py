"""Methods side by side: budgets become configurations, a sweep chooses each row's learning rate, runs become tables.

``study`` says what is compared; ``budgets`` gives every row its rank or basis; ``runs`` makes one run; ``pool`` makes
all that are missing.
"""

from studies.budgets import adapted_shapes, configure
from studies.pool import read_records, run_study
from studies.runs import run_job
from studies.study import Job, Record, Row, Setting, Study, chosen_rate, ready_jobs

__all__ = [
    "Job",
    "Record",
    "Row",
    "Setting",
    "Study",
    "adapted_shapes",
    "chosen_rate",
    "configure",
    "read_records",
    "ready_jobs",
    "run_job",
    "run_study",
]

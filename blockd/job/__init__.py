"""Jobs: what they have in common, whatever they copy. Knows no other package of the daemon."""

from blockd.job.failure import JobError
from blockd.job.group import Group
from blockd.job.job import Job
from blockd.job.jobs import Jobs
from blockd.job.once import OneStepJob
from blockd.job.rate import RateLimit
from blockd.job.states import (
    MAY,
    NEXT,
    ErrorAction,
    IoStatus,
    OnError,
    Status,
    Verb,
    action_on_error,
)

__all__ = [
    "MAY",
    "NEXT",
    "ErrorAction",
    "Group",
    "IoStatus",
    "Job",
    "JobError",
    "Jobs",
    "OnError",
    "OneStepJob",
    "RateLimit",
    "Status",
    "Verb",
    "action_on_error",
]

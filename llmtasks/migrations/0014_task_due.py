"""The waiting room by time: who became due is found at once, however many others wait. And the index
on deadlines holds for the sweep alone."""

from datetime import UTC, datetime

from django.contrib.postgres.operations import AddIndexConcurrently, RemoveIndexConcurrently
from django.db import migrations, models

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Migration(migrations.Migration):
    # An index is built beside the writes, and so outside of a transaction.
    atomic = False

    dependencies = [("llmtasks", "0013_workflows")]

    operations = [
        AddIndexConcurrently(
            model_name="task",
            index=models.Index(
                condition=models.Q(("not_before__gt", EPOCH), ("status", "waiting")),
                fields=["not_before"],
                name="task_due",
            ),
        ),
        AddIndexConcurrently(
            model_name="task",
            index=models.Index(
                condition=models.Q(
                    ("deadline__gt", EPOCH), ("status__in", ("waiting", "queued", "blocked"))
                ),
                fields=["deadline"],
                name="task_late",
            ),
        ),
        RemoveIndexConcurrently(model_name="task", name="task_deadline"),
    ]

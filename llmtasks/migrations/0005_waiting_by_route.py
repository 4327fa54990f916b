"""The waiting room by route: what has no room is passed over without being read."""

from django.contrib.postgres.operations import AddIndexConcurrently, RemoveIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    # An index is built beside the writes, and so outside of a transaction.
    atomic = False

    dependencies = [("llmtasks", "0004_limits")]

    operations = [
        AddIndexConcurrently(
            model_name="task",
            index=models.Index(
                condition=models.Q(("status", "waiting")),
                fields=["provider", "lane", "route", "tenant", "not_before"],
                name="task_waiting_room",
            ),
        ),
        RemoveIndexConcurrently(model_name="task", name="task_waiting"),
    ]

"""The waiting room by time: who became due is found at once, however many others wait."""

from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    # An index is built beside the writes, and so outside of a transaction.
    atomic = False

    dependencies = [("llmtasks", "0013_workflows")]

    operations = [
        AddIndexConcurrently(
            model_name="task",
            index=models.Index(
                condition=models.Q(("status", "waiting")),
                fields=["provider", "lane", "not_before"],
                name="task_due",
            ),
        ),
    ]

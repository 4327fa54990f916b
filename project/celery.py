"""The Celery application. Settings come from Django's, prefixed `CELERY_`."""

import os

from celery import Celery

from project import transport

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")

transport.install()
app = Celery("llmtasks")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()

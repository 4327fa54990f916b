from django.apps import AppConfig


class LLMTasksConfig(AppConfig):
    name = "llmtasks"
    verbose_name = "LLM tasks"

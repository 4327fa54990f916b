from django.apps import AppConfig


class LLMTasksConfig(AppConfig):
    name = "llmtasks"
    verbose_name = "LLM tasks"

    def ready(self) -> None:
        # Registers the system checks.
        from llmtasks import checks  # noqa: F401

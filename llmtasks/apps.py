from django.apps import AppConfig


class LLMTasksConfig(AppConfig):
    name = "llmtasks"
    verbose_name = "LLM tasks"

    def ready(self) -> None:
        # Registers the system checks; refuses an unknown crash point at the start.
        from llmtasks import checks, crash  # noqa: F401
        from llmtasks.tools import stored
        from llmtasks.tools.registry import discover, registry

        discover()
        registry.stored = stored.tools

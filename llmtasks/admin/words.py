"""Lists of words, edited as a line of text."""

from typing import Any

from django import forms
from unfold.widgets import UnfoldAdminTextInputWidget


class Words(forms.CharField):
    """Words with commas between them; each is checked by the validators."""

    widget = UnfoldAdminTextInputWidget

    def prepare_value(self, value: Any) -> Any:
        return ", ".join(value) if isinstance(value, list) else value

    def to_python(self, value: Any) -> Any:
        found = value if isinstance(value, list) else str(value or "").split(",")
        return list(dict.fromkeys(word.strip() for word in found if word.strip()))

    def run_validators(self, value: Any) -> None:
        for word in value:
            super().run_validators(word)

    def has_changed(self, initial: Any, data: Any) -> bool:
        return bool(self.to_python(initial) != self.to_python(data))


def words(model: Any, name: str) -> Words:
    """The field of a model's column of words."""
    column = model._meta.get_field(name)
    return Words(
        required=False,
        initial=column.get_default,
        help_text=column.help_text,
        validators=column.base_field.validators,
    )

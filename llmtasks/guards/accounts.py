"""What an answer says of the account itself, written down for people: a credential that the vendor
refused, limits that it told.

A refused credential is used no more, in no process, until a person says so in the admin or changes
it. A model that the account may not use is left out by itself.
"""

import logging
import time
from collections.abc import Sequence

from django.db import Error, transaction

from llmtasks import pulse
from llmtasks.models import Provider, ProviderEvent, ProviderModel
from llmtasks.routing import Candidate
from providers import errors
from providers.vendor_limits import Told

log = logging.getLogger(__name__)

MAX_REASON = 500
# A process writes a model's told limits at most so often: every write makes all processes read
# the configuration anew.
TELL_AGAIN_S = 600.0

_told_at: dict[tuple[str, str], float] = {}


def note(candidate: Candidate, error: BaseException | None, told: Sequence[Told]) -> None:
    """Write down what an attempt's end says of the account. Never raises."""
    try:
        if isinstance(error, errors.CredentialError) and error.status is not None:
            refuse(candidate, error)
        elif told and candidate.vendor_limits != (limits := {one.unit: one.limit for one in told}):
            keep_told(candidate, limits)
    except Error:
        log.exception("what a vendor said can't be written down", extra={"of": candidate.provider})


def refuse(candidate: Candidate, error: errors.CredentialError) -> None:
    """Take the credential, or the one model, out of use."""
    reason = f"{type(error).__name__}: {error.message}"[:MAX_REASON]
    model = ""
    rows = Provider.objects.filter(name=candidate.provider)
    if isinstance(error, errors.PermissionDenied):
        if error.code is None:
            # Not the vendor's own words: a firewall may object to one prompt.
            return
        model = candidate.model
        rows = ProviderModel.objects.filter(provider__name=candidate.provider, name=model)  # type: ignore[assignment]
    with transaction.atomic():
        if rows.filter(refused_at=None).update(refused_at=pulse.now(), refused_reason=reason):
            ProviderEvent.objects.create(
                provider=candidate.provider,
                model=model,
                event=ProviderEvent.Event.REFUSED,
                detail=reason,
            )
            log.error(
                "the vendor refused the credential: it is used no more",
                extra={"provider": candidate.provider, "model": model, "reason": reason},
            )


def recover(provider: str, who: str) -> bool:
    """Use a provider's credential and models again; whether any was out of use."""
    with transaction.atomic():
        back = {"refused_at": None, "refused_reason": ""}
        found = Provider.objects.filter(name=provider).exclude(refused_at=None).update(**back)
        models = ProviderModel.objects.filter(provider__name=provider).exclude(refused_at=None)
        found += models.update(**back)
        if found:
            ProviderEvent.objects.create(
                provider=provider, event=ProviderEvent.Event.RECOVERED, detail=f"by {who}"
            )
    return bool(found)


def keep_told(candidate: Candidate, limits: dict[str, int]) -> None:
    place = (candidate.provider, candidate.model)
    now = time.monotonic()
    if now - _told_at.get(place, float("-inf")) < TELL_AGAIN_S:
        return
    _told_at[place] = now
    rows = ProviderModel.objects.filter(provider__name=place[0], name=place[1])
    rows.exclude(vendor_limits=limits).update(vendor_limits=limits)

"""Signatures of webhooks, as Standard Webhooks has them."""

import base64

from llmtasks import webhooks

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_the_signature_is_that_of_the_specification() -> None:
    """The example that the libraries of Standard Webhooks are tested with."""
    id_ = "msg_p5jXN8AQM9LWM0D4loKWxJek"
    assert webhooks.signed(SECRET, id_, 1614265330, b'{"test": 2432232314}') == {
        "webhook-id": id_,
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_a_secret_is_base64_or_any_text() -> None:
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    assert webhooks.key_of(SECRET) == key
    assert webhooks.key_of("some words") == b"some words"
    assert webhooks.key_of("whsec_no base64!") == b"whsec_no base64!"


def test_the_waits_fit_the_promise() -> None:
    """A receiver that is away for a day is told."""
    assert sum(webhooks.WAITS_S) > 24 * 3600
    assert webhooks.AT_ONCE * webhooks.TIMEOUT_S < webhooks.TAKEN_S

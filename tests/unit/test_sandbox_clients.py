"""The sandbox, asked by the vendors' own clients."""

import anthropic
import openai
import pytest


def test_openais_client(sandbox):
    client = openai.OpenAI(base_url=f"{sandbox.base_url}/v1", api_key="k", max_retries=0)
    messages = [{"role": "user", "content": "Hello, world!"}]
    with client:
        answer = client.chat.completions.create(model="echo", messages=messages)
        assert answer.choices[0].message.content == "Hello, world!"
        assert answer.usage.total_tokens == 6
        chunks = list(
            client.chat.completions.create(
                model="echo",
                messages=messages,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert chunks[-1].usage.total_tokens == 6
        assert len(client.embeddings.create(model="embed-8", input="a").data[0].embedding) == 8
        assert "echo" in {model.id for model in client.models.list()}
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="nope", messages=messages)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="rate-limit-1", messages=messages)


def test_anthropics_client(sandbox):
    client = anthropic.Anthropic(base_url=sandbox.base_url, api_key="k", max_retries=0)
    messages = [{"role": "user", "content": "Hello, world!"}]
    with client:
        answer = client.messages.create(model="claude-echo", max_tokens=100, messages=messages)
        assert answer.content[0].text == "Hello, world!"
        assert answer.usage.output_tokens == 3
        with client.messages.stream(
            model="claude-echo", max_tokens=100, messages=messages
        ) as stream:
            assert "".join(stream.text_stream) == "Hello, world!"
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="nope", max_tokens=100, messages=messages)

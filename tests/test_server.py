"""sample.py --ui: the OpenAI protocol and the page, on one thread that owns the model."""

import asyncio
import base64
import hashlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import jax
import numpy as np
import openai
import pytest
import torch
from helpers.reference import ROOT
from transformers import AutoModelForCausalLM

import gpt2
import llama
import sample
import train

PROMPTS = ["ROMEO:\n", "The king is dead.", "O", "What light is this, that through the window"]


class Server:
    """`serve` in a thread of this process, so that tests can look into it; and a client."""

    def __init__(self, monkeypatch, module, folder, *flags):
        command = ["sample.py", "--ui", "--weights", str(folder), "--port", "0", *flags]
        monkeypatch.setattr(sys, "argv", command)
        args = sample.parse_command_line()
        model = module.load(folder)
        mesh = sample.make_mesh("data:1", jax.devices()[:1], model.config.num_attention_heads)
        listener = sample.open_listener(args.host, args.port)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.model = model
        self.name = str(folder)
        self.services = []
        make_app = sample.make_app

        def keep_service(service):
            self.services.append(service)
            return make_app(service)

        monkeypatch.setattr(sample, "make_app", keep_service)
        codec = module.tokenizer(folder)
        serve = (module, model, mesh, folder, codec, [], listener, args)
        threading.Thread(target=sample.serve, args=serve, daemon=True).start()
        key = args.api_key or "any"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)
        self.client.models.list()  # it serves

    @property
    def engine(self):
        return self.services[0].engine

    def write(self, prompt, **options):
        """A choice of /v1/completions."""
        options = {"max_tokens": 20, "temperature": 0.8, "seed": 1, **options}
        return self.client.completions.create(model=self.name, prompt=prompt, **options)

    def say(self, *texts, **options):
        """The answer to a conversation: texts of the user and the assistant in turns."""
        messages = []
        for i, text in enumerate(texts):
            messages.append({"role": ["user", "assistant"][i % 2], "content": text})
        options = {"max_tokens": 20, "temperature": 0, "seed": 1, **options}
        return self.client.chat.completions.create(model=self.name, messages=messages, **options)

    def post(self, path, body, **more):
        """The status and the error of a request that is not as it should be."""
        answer = httpx.post(f"{self.url}{path}", content=body, timeout=600, **more)
        return answer.status_code, answer.json()["error"]


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def writer(module_patch):
    """tiny/gpt2, which continues texts."""
    return Server(module_patch, gpt2, ROOT / "tiny/gpt2")


@pytest.fixture(scope="module")
def talker(module_patch, tmp_path_factory):
    """tiny/llama with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    for file in (ROOT / "tiny/llama").iterdir():
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(train.PLAIN_TEMPLATE)
    return Server(module_patch, llama, folder)


# ------------------------------------------------------------------------------------ what is said


def continuations(model, prompts, n, seed, **options) -> list[str]:
    """Texts by the model file's own generate."""
    codec = gpt2.tokenizer(ROOT / "tiny/gpt2")
    ids = [codec.encode(prompt) for prompt in prompts]
    new = gpt2.generate(model, ids, n, key=sample.random_key(seed), **options)
    return [codec.decode(row) for row in new]


def test_choices_are_the_texts_of_the_command_line(writer):
    """Whose row numbers are those of the choices, with --num-samples."""
    answer = writer.write(PROMPTS[0], n=3, seed=7, top_p=0.9)
    options = {"temperature": 0.8, "top_p": 0.9}
    expected = continuations(writer.model, PROMPTS[:1] * 3, 20, 7, **options)
    assert [choice.text for choice in answer.choices] == expected
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 60, 67)


def test_top_k_min_p_and_the_penalty_are_taken_as_extensions(writer):
    options = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    answer = writer.write(PROMPTS[1], extra_body=options)
    [expected] = continuations(writer.model, PROMPTS[1:2], 20, 1, temperature=0.8, **options)
    assert answer.choices[0].text == expected


def test_an_answer_is_that_of_the_chat_template_and_so_is_the_next_one(talker):
    """The second finds the first in the KV cache."""
    codec = sample.ChatTokenizer(talker.services[0].codec.backend, ROOT / talker.name, None)
    said = ["Who are you?"]
    for _ in range(2):
        messages = [
            {"role": ["user", "assistant"][i % 2], "content": text} for i, text in enumerate(said)
        ]
        ids = codec.encode(messages)
        [new] = llama.generate(talker.model, [ids], 20, key=0, temperature=0)
        [choice] = talker.say(*said).choices
        assert choice.message.content == codec.decode(new).lstrip()
        assert choice.message.role == "assistant"
        said += [choice.message.content, "And who am I?"]
    assert talker.engine.memory.ids[: len(ids)] == ids


def test_system_messages_and_contents_in_parts_reach_the_template(talker):
    parts = [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    body = {"model": talker.name, "messages": messages}
    assert sample.read_messages(body) == [
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who are you?"},
        ]
    ]


def test_prompts_may_be_several_and_token_ids(writer):
    codec = gpt2.tokenizer(ROOT / "tiny/gpt2")
    texts = [choice.text for choice in writer.write(PROMPTS[:2], n=2).choices]
    ids = [codec.encode(prompt) for prompt in PROMPTS[:2]]
    assert [choice.text for choice in writer.write(ids, n=2).choices] == texts
    assert writer.write(ids[1]).choices[0].text == texts[2]


def test_what_is_streamed_is_the_whole_text(writer, talker):
    whole = writer.write(PROMPTS[:2], n=2)
    streamed = [""] * 4
    *chunks, last = writer.write(
        PROMPTS[:2], n=2, stream=True, stream_options={"include_usage": True}
    )
    for chunk in chunks:
        [choice] = chunk.choices
        streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in whole.choices]
    assert (last.choices, last.usage) == ([], whole.usage)

    chunks = list(talker.say("Hello", stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    text = "".join(delta.content for delta in deltas)
    assert text == talker.say("Hello").choices[0].message.content
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len(chunks) > 1


def test_a_text_ends_before_a_stop_string(writer):
    [whole] = writer.write(PROMPTS[0], max_tokens=60).choices
    stop = whole.text[25:28]
    end = whole.text.index(stop)
    [choice] = writer.write(PROMPTS[0], max_tokens=60, stop=["never said", stop]).choices
    assert (choice.text, choice.finish_reason) == (whole.text[:end], "stop")
    streamed = writer.write(PROMPTS[0], max_tokens=60, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.text[:end]


def test_max_tokens_ends_at_the_context_length(writer):
    answer = writer.write(PROMPTS[0], max_tokens=100_000)
    assert answer.usage.total_tokens == writer.model.config.max_position_embeddings


def test_a_prompt_is_continued_as_far_as_alone_beside_one_that_leaves_less_room(writer):
    alone = writer.write("O", max_tokens=60)
    both = writer.write(["O", [5] * 250], max_tokens=60)
    assert both.choices[0].text == alone.choices[0].text
    assert both.usage.completion_tokens == 60 + 6  # context: 256


def test_the_same_seed_gives_the_same_text_and_no_seed_another(writer):
    texts = [writer.write(PROMPTS[0], seed=seed).choices[0].text for seed in (5, 5, None, None)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


# ---------------------------------------------------------------------------------------- logprobs


def reference_logprobs(folder, ids) -> np.ndarray:
    """[T, V] by transformers: of the token after each of ids."""
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(hf(torch.tensor([ids])).logits[0], dim=-1).numpy()


def test_logprobs_of_a_completion_are_those_of_the_model(writer):
    """Whatever the temperature; rounding of float32 sums in another order."""
    [choice] = writer.write(PROMPTS[3], max_tokens=70, logprobs=3, temperature=1.5).choices
    found = choice.logprobs
    codec = gpt2.tokenizer(ROOT / "tiny/gpt2")
    text = writer.services[0].answers  # the last answer has the ids
    ids = list(text.values())[-1].ids
    prompt = codec.encode(PROMPTS[3])
    expected = reference_logprobs(ROOT / "tiny/gpt2", prompt + ids)[len(prompt) - 1 : -1]

    own = expected[np.arange(70), ids]
    np.testing.assert_allclose(found.token_logprobs, own, atol=1e-4)
    best = -np.sort(-expected)[:, :3]
    tops = [list(top.values()) for top in found.top_logprobs]
    np.testing.assert_allclose(tops, best, atol=1e-4)
    assert "".join(found.tokens) == choice.text
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)


def test_logprobs_of_a_chat_are_streamed_with_their_tokens(talker):
    options = {"logprobs": True, "top_logprobs": 2, "max_tokens": 50}
    [choice] = talker.say("Hello", **options).choices
    whole = choice.logprobs.content
    tokens = "".join(entry.token for entry in whole)
    assert tokens.lstrip() == choice.message.content  # a blank before the answer is left out
    for entry in whole:
        assert entry.bytes == list(entry.token.encode())
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob

    streamed = []
    for chunk in talker.say("Hello", stream=True, **options):
        streamed += chunk.choices[0].logprobs.content
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]


def test_logprobs_end_with_the_text_at_a_stop_string(writer):
    [whole] = writer.write(PROMPTS[0], max_tokens=60).choices
    stop = whole.text[25:28]
    [choice] = writer.write(PROMPTS[0], max_tokens=60, stop=stop, logprobs=0).choices
    text = "".join(choice.logprobs.tokens)
    assert text.startswith(choice.text)
    assert choice.logprobs.text_offset[-1] < len(choice.text)
    assert choice.logprobs.top_logprobs is None


# --------------------------------------------------------------------------------- several at once


def test_eight_requests_at_once_share_batches_and_get_what_each_gets_alone(writer, monkeypatch):
    prompts = [PROMPTS[i % 4] + "x" * i for i in range(8)]
    alone = [writer.write(prompts[i], seed=i).choices[0].text for i in range(8)]

    sizes = []
    run = writer.engine.run

    def counted(rows):
        sizes.append(len(rows))
        return run(rows)

    monkeypatch.setattr(writer.engine, "run", counted)
    monkeypatch.setattr(sample, "GATHERING", 0.5)
    with ThreadPoolExecutor(8) as threads:
        answers = threads.map(lambda i: writer.write(prompts[i], seed=i), range(8))
        assert [answer.choices[0].text for answer in answers] == alone
    sizes = [size for size in sizes if size > 0]
    assert sum(sizes) == 8
    assert max(sizes) > 1


def test_requests_of_other_options_or_without_room_do_not_share(writer):
    def row(prompt_tokens, limit, temperature):
        sampling = sample.Sampling(temperature, None, None, None, 1.0)
        call = SimpleNamespace(sampling=sampling, dropped=False)
        text = SimpleNamespace(prompt_ids=[1] * prompt_tokens, reason=None)
        return sample.Choice(call, 0, text, 0, limit, 1)

    engine = writer.engine
    assert engine.can_share([row(10, 20, 1.0), row(100, 100, 1.0)])
    assert not engine.can_share([row(10, 20, 1.0), row(10, 20, 0.5)])
    assert not engine.can_share([row(10, 200, 1.0), row(200, 10, 1.0)])  # context: 256
    assert not engine.can_share([row(10, 20, 1.0)] * (sample.MOST_ROWS + 1))


class Slow:
    """Generation that waits for the test after each part, and the calls it is for."""

    def __init__(self, monkeypatch, server, name):
        self.turn = threading.Semaphore(0)
        self.calls = []
        generate = getattr(sample, name)
        run = server.engine.run

        def slowly(*args):
            for new in generate(*args):
                yield new
                self.turn.acquire(timeout=300)

        def noted(rows):
            self.calls += [row.call for row in rows]
            return run(rows)

        monkeypatch.setattr(sample, name, slowly)
        monkeypatch.setattr(server.engine, "run", noted)

    def wait_until(self, condition):
        """The 300 seconds are only against what hangs."""
        end = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)

    def finish(self, server):
        """Lets all go on, up to the end of another request."""
        other = threading.Thread(target=server.write, args=("A",), kwargs={"max_tokens": 1})
        other.start()
        while other.is_alive():
            self.turn.release()
            other.join(0.05)


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_is_dropped_stops_generating(writer, monkeypatch, stream):
    slow = Slow(monkeypatch, writer, "fill_context")
    body = {"model": writer.name, "prompt": "O", "max_tokens": 200, "stream": stream}
    body = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", writer.port)) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        slow.wait_until(lambda: slow.calls and slow.calls[0].rows[0].text.ids)
        if stream:
            assert client.recv(100).startswith(b"HTTP/1.1 200")

    [call] = slow.calls
    slow.wait_until(lambda: call.dropped)
    slow.finish(writer)
    [row] = call.rows
    assert row.text.reason is None
    assert len(row.text.ids) == 1  # what came later was not added


# ------------------------------------------------------------------------------------ bad requests

GOOD = {"prompt": "O", "max_tokens": 3}
HALF = "\\ud800"


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"temperature": "hot"}, "temperature", "must be a number from 0"),
        ({"temperature": -1}, "temperature", "must be a number from 0"),
        ({"temperature": float("nan")}, "temperature", "must be a number from 0"),
        ({"temperature": True}, "temperature", "must be a number from 0"),
        ({"temperature": 10**400}, "temperature", "must be a number from 0"),
        ({"top_p": 0}, "top_p", "must be a number"),
        ({"max_tokens": 0}, "max_tokens", "must be a whole number from 1"),
        ({"max_tokens": 2.5}, "max_tokens", "must be a whole number"),
        ({"n": 129}, "n", "from 1 to 128"),
        ({"n": 128, "prompt": ["a", "b"]}, "n", "128 choices at most"),
        ({"seed": "x"}, "seed", "must be a whole number"),
        ({"logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"stop": 3}, "stop", "must be a text"),
        ({"stop": [""]}, "stop", "has 1 to 200 characters"),
        ({"stop": "a" * 201}, "stop", "has 1 to 200 characters"),
        ({"stop": ["a"] * 17}, "stop", "or a list of 16 at most"),
        ({"stream": "yes"}, "stream", "must be true or false"),
        ({"stream_options": []}, "stream_options", "must be an object"),
        ({"prompt": None}, "prompt", "must be a text"),
        ({"prompt": ""}, "prompt", "has no tokens"),
        ({"prompt": []}, "prompt", "must be 1 to 128 texts"),
        ({"prompt": {"a": 1}}, "prompt", "must be a text"),
        ({"prompt": [[1, "a"]]}, "prompt", "a token id must be from 0 to 511"),
        ({"prompt": [512]}, "prompt", "a token id must be from 0 to 511"),
        ({"prompt": [True]}, "prompt", "a token id must be from 0 to 511"),
        ({"prompt": "\ud800"}, "prompt", "half of a character"),
        ({"prompt": "a b c " * 100}, "prompt", "leave no room in the context length of 256"),
        ({"max_token": 3}, "max_token", "is not a field"),
        ({"\ud800": 3}, "\ud800", "is not a field"),
        ({"messages": []}, "messages", "is not a field"),
        ({"best_of": 2}, "best_of", "is not supported"),
        ({"model": None}, "model", "name the model"),
        ({"model": 3}, "model", "there is no model 3"),
    ],
)
def test_a_wrong_field_is_named(writer, changes, param, message):
    body = json.dumps({"model": writer.name, **GOOD, **changes})
    status, error = writer.post("/v1/completions", body)
    assert status == (404 if changes == {"model": 3} else 400)
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": None}, "must be a list of at least one"),
        ({"messages": ["Hi"]}, "a message must be an object"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "a role must be"),
        ({"messages": [{"role": "user"}]}, "a content must be a text"),
        ({"messages": [{"role": "user", "content": None}]}, "a content must be a text"),
        ({"prompt": "Hi"}, "is not a field"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "parts of type text",
        ),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(talker, changes, message):
    body = {"model": talker.name, "messages": [{"role": "user", "content": "Hi"}], **changes}
    status, error = talker.post("/v1/chat/completions", json.dumps(body))
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert message in error["message"]


def test_a_template_that_refuses_says_why(talker, monkeypatch):
    codec = talker.services[0].chat_codec
    monkeypatch.setattr(codec.templates, "chat_template", "{{ raise_exception('no, never') }}")
    with pytest.raises(openai.BadRequestError, match="no, never"):
        talker.say("Hello")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", b"{", 400),
        ("/v1/completions", b"\xff\xfe", 400),
        ("/v1/completions", b"[" * 100_000, 400),
        ("/v1/completions", b"[]", 400),
        ("/v1/completions", b" " * (sample.MOST_BYTES + 1), 413),
        ("/v1/embeddings", b"{}", 404),
        ("/v1/models", b"{}", 405),
        ("/v1/chat/completions", b"{}", 400),  # this model has no chat template
    ],
)
def test_no_request_ends_the_server(writer, path, body, status):
    found, error = writer.post(path, body)
    assert found == status
    assert set(error) == {"message", "type", "param", "code"}
    assert writer.write("O", max_tokens=1).usage.completion_tokens == 1


def test_the_client_raises_its_own_exceptions(writer):
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        writer.client.models.retrieve("gpt-4")
    with pytest.raises(openai.BadRequestError) as stop:
        writer.write("a b c " * 100)
    assert stop.value.code == "context_length_exceeded"
    assert writer.client.models.retrieve(writer.name).id == writer.name


def test_a_body_that_does_not_arrive_is_given_up(monkeypatch):
    monkeypatch.setattr(sample, "MOST_SECONDS", 0.01)

    async def stream():
        yield b"{"
        await asyncio.sleep(60)

    with pytest.raises(sample.ApiError) as stop:
        asyncio.run(sample.read_body(SimpleNamespace(stream=stream)))
    assert stop.value.status == 408


def test_a_request_that_fails_is_an_error_and_the_next_one_is_answered(writer, monkeypatch, capfd):
    """Of the input, and by a fault, whose traceback is shown."""
    for error in (gpt2.InputError("the logits are not numbers"), ZeroDivisionError("a fault")):

        def fail(rows, error=error):
            raise error if rows else AssertionError("there was nothing to run")

        monkeypatch.setattr(writer.engine, "run", fail)
        with pytest.raises(openai.InternalServerError):
            writer.write("O")
        with pytest.raises(openai.APIError):
            list(writer.write("O", stream=True))
        monkeypatch.undo()
    assert writer.write("O").choices[0].text
    shown = capfd.readouterr().err
    assert "a request failed: the logits are not numbers" in shown
    assert shown.count("ZeroDivisionError: a fault") == 2


# ------------------------------------------------------------------------------------ who may ask


def ask(gate, path="/v1/models", **headers):
    """The status of a request that passes the gate, or does not."""

    async def get():
        transport = httpx.ASGITransport(app=gate)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:1") as client:
            return (await client.get(path, headers=headers)).status_code

    return asyncio.run(get())


def test_with_a_key_only_who_has_it_is_answered(writer):
    gate = sample.Gate(sample.make_app(writer.services[0]), "secret", "0.0.0.0")
    assert ask(gate) == 401
    assert ask(gate, authorization="Bearer Secret") == 401
    assert ask(gate, authorization="secret") == 401
    assert ask(gate, authorization="Basic secret") == 401
    assert ask(gate, authorization="Bearer secret") == 200
    assert ask(gate, authorization="bearer secret") == 200  # a scheme has no case
    assert ask(gate, authorization="Bearer secret", host="a.name") == 200
    assert ask(gate, "/") == 200


def test_without_a_key_no_other_site_is_answered(writer):
    gate = sample.Gate(sample.make_app(writer.services[0]), None, "127.0.0.1")
    assert ask(gate) == 200
    assert ask(gate, origin="http://127.0.0.1:1") == 200
    assert ask(gate, origin="http://127.0.0.1:2") == 403
    assert ask(gate, origin="https://evil.test") == 403
    assert ask(gate, origin="null") == 403
    assert ask(gate, host="localhost:1") == 200
    assert ask(gate, host="evil.test:1") == 403  # a name that now stands for this address
    assert ask(gate, host="") == 403
    assert ask(gate, host="[") == 403
    assert ask(gate, origin="http://[") == 403
    assert ask(gate, "/", host="evil.test") == 403


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "1"], "--port is for --ui"),
        (["--ui", "--prompt", "a"], "leave --prompt"),
        (["--ui", "--num-samples", "2"], "leave --num-samples"),
        (["--ui", "--parallel", "data"], "leave all --parallel but tensor out"),
        (["--ui", "--port", "65536"], "from 0 to 65535"),
        (["--ui", "--api-key", ""], "--api-key must be"),
        (["--ui", "--host", "0.0.0.0"], "add --api-key KEY, or --no-auth"),
        (["--ui", "--host", "192.0.2.1", "--no-auth"], "an address of this machine as --host"),
        (["--ui", "--host", "ä..b", "--no-auth"], "an address of this machine as --host"),
    ],
)
def test_what_cannot_be_served_is_one_line(refused, flags, message):
    assert message in refused(*flags)


def test_a_port_in_use_is_one_line(refused, writer):
    assert "Address already in use" in refused("--ui", "--port", writer.port)


def test_a_missing_package_is_one_line(refused, monkeypatch):
    monkeypatch.setattr(sample, "find_spec", lambda name: name != "uvicorn")
    assert "--ui needs uvicorn: pip install starlette uvicorn" in refused("--ui")


@pytest.mark.wide
def test_ctrl_c_ends_the_server_with_one_line_even_while_it_writes():
    command = [sys.executable, "sample.py", "--weights", "tiny/gpt2", "--ui", "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    lines = []
    while not lines or "Ctrl-C" not in lines[-1]:
        lines.append(server.stderr.readline())
    url = re.search(r"http://\S+/v1", "".join(lines))[0]
    client = openai.OpenAI(base_url=url, api_key="any", max_retries=0)
    stream = client.completions.create(model="tiny/gpt2", prompt="O", max_tokens=200, stream=True)
    next(iter(stream))
    server.send_signal(signal.SIGINT)
    assert server.wait(600) == 130
    assert server.stderr.read() == "\nstopped\n"


# ---------------------------------------------------------------------------------------- the page


def test_the_page_runs_its_own_script_and_asks_nobody_else(writer):
    answer = httpx.get(writer.url)
    policy = answer.headers["content-security-policy"]
    [script] = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert not re.search(r"https?://|src=|@import|url\(", answer.text)


def test_the_page_has_the_options_of_the_command_line(writer, monkeypatch):
    flags = ["--ui", "--system", "</script>", "--temperature", "0.3", "--max-new-tokens", "9"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
    html = writer.services[0].fill_page(sample.parse_command_line())
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    assert (data["system"], data["temperature"], data["max_tokens"]) == ("</script>", 0.3, 9)
    assert (data["model"], data["context"], data["chat"]) == (writer.name, 256, False)


def test_the_attention_of_an_answer_has_its_page(talker):
    answer = talker.say("Who are you?")
    page = httpx.get(f"{talker.url}/attention/{answer.id}", timeout=600)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.text, re.DOTALL)[1])
    assert len(data["tokens"]) == answer.usage.total_tokens
    assert "".join(data["tokens"]).startswith("User:·Who·are·you?")
    assert "script-src 'sha256-" in page.headers["content-security-policy"]
    assert httpx.get(f"{talker.url}/attention/chatcmpl-0").status_code == 404


# ------------------------------------------------------------------------------- in a real browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
in_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="apt install chromium"),
]
PATIENCE = 200_000  # milliseconds, only against what hangs


def slow_in_browser(test):
    for mark in in_browser:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Opens the page of a server in a new tab. No script may fail, and no other site be asked."""
    contexts, problems = [], []

    def open_page(server, **options):
        contexts.append(chromium.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: problems.append(str(error)))

        def look(request):
            if not request.url.startswith((server.url, "data:")):
                problems.append(request.url)

        page.on("request", look)
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def say(page, text):
    """Sends a message by the keyboard and waits for the whole answer -> the answer."""
    page.fill("#message", text)
    page.press("#message", "Enter")
    return wait_for_answer(page)


def wait_for_answer(page) -> str:
    page.wait_for_selector("#send", state="visible")
    return page.locator(".assistant .text").last.text_content()


def texts(page) -> list[str]:
    return page.locator(".turn .text").all_text_contents()


@slow_in_browser
def test_a_conversation_in_the_browser(talker, open_page):
    """Its answers are those of the protocol, and it is kept in the tab."""
    page = open_page(talker)
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "20")
    first = say(page, "Who are you?")
    assert first == talker.say("Who are you?").choices[0].message.content
    second = say(page, "And who am I?")
    expected = talker.say("Who are you?", first, "And who am I?").choices[0].message.content
    assert second == expected
    figures = page.inner_text("#figures")
    assert re.search(r"[\d.]+ tokens/s", figures) and re.search(r"context \d+ of 256", figures)
    assert "float32" in figures

    page.reload()
    assert texts(page) == ["Who are you?", first, "And who am I?", second]
    page.locator(".user .actions button").first.click()  # Edit
    assert (page.input_value("#message"), texts(page)) == ("Who are you?", [])
    say(page, "Who else?")
    page.click("#clear")
    assert texts(page) == []
    assert page.is_disabled("#clear")


@slow_in_browser
def test_shift_enter_begins_a_new_line_and_retry_writes_another_answer(talker, open_page):
    page = open_page(talker)
    page.fill("#max_tokens", "20")
    page.fill("#message", "Hello,")
    page.press("#message", "Shift+Enter")
    page.locator("#message").press_sequentially("you")
    assert page.input_value("#message") == "Hello,\nyou"
    page.click("#send")
    first = wait_for_answer(page)
    page.click("text=Retry")
    second = wait_for_answer(page)
    assert texts(page) == ["Hello,\nyou", second]
    assert first != second


@slow_in_browser
def test_the_settings_are_sent_and_kept(talker, open_page):
    page = open_page(talker)
    numbers = {"temperature": 0.5, "top_p": 0.9, "min_p": 0.05, "top_k": 7, "max_tokens": 4}
    numbers |= {"seed": 3, "repetition_penalty": 1.1}
    for name, value in numbers.items():
        page.fill(f"#{name}", str(value))
    page.fill("#system", "Be brief.")
    page.reload()
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "Hello")
    body = sent.value.post_data_json
    assert {name: body[name] for name in numbers} == numbers
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    page.click("#reset")
    assert (page.input_value("#temperature"), page.input_value("#top_k")) == ("0.8", "")


@slow_in_browser
@pytest.mark.parametrize("how", ["button", "Escape"])
def test_an_answer_is_shown_as_it_comes_and_can_be_stopped(talker, open_page, monkeypatch, how):
    slow = Slow(monkeypatch, talker, "answer")
    page = open_page(talker)
    page.fill("#message", "Talk")
    page.press("#message", "Enter")
    lengths = set()
    while len(lengths) < 4:
        slow.turn.release()
        page.wait_for_timeout(100)
        lengths.add(len(texts(page)[-1]))
    if how == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    page.wait_for_selector("text=stopped")

    [call] = slow.calls
    slow.wait_until(lambda: call.dropped)
    slow.finish(talker)
    [row] = call.rows
    assert row.text.reason is None
    assert row.text.completion.lstrip().startswith(texts(page)[-1])


@slow_in_browser
def test_two_tabs_at_once_do_not_mix(talker, open_page):
    pages = [open_page(talker), open_page(talker)]
    messages = ["Who are you?", "The king is dead."]
    for page, message in zip(pages, messages, strict=True):
        page.fill("#temperature", "0")
        page.fill("#max_tokens", "30")
        page.fill("#message", message)
        page.press("#message", "Enter")
    for page, message in zip(pages, messages, strict=True):
        answer = talker.say(message, max_tokens=30).choices[0].message.content
        assert wait_for_answer(page) == answer
        assert texts(page)[0] == message


@slow_in_browser
def test_where_the_context_is_full_the_oldest_messages_are_left_out(talker, open_page):
    """The context has 256 tokens, and each message about 100."""
    page = open_page(talker)
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "20")
    message = "The king is dead, long live the king. " * 5
    answers = [say(page, message) for _ in range(4)]

    assert page.locator(".bad").count() == 0
    assert len(texts(page)) == 8  # all are still shown
    assert "messages are left out" in page.locator(".assistant .note").last.text_content()
    seen = [message, answers[2], message]
    assert answers[3] == talker.say(*seen).choices[0].message.content


@slow_in_browser
def test_what_a_model_writes_is_text_and_never_html(talker, open_page):
    page = open_page(talker)
    bad = '<script>window.bad = 1</script><img src="data:," onerror="window.bad = 1"><b>'
    code = f"{bad}\n```html\n{bad}\n```\nend"
    chunk = {"id": "chatcmpl-1", "choices": [{"delta": {"content": code}, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body))
    say(page, bad)
    assert page.evaluate("window.bad") is None
    assert texts(page)[0] == bad
    assert page.locator("#log img, #log script, #log b").count() == 0
    assert page.locator("#log pre").text_content() == f"{bad}\n"


@slow_in_browser
def test_an_error_is_shown_and_the_next_message_works(talker, open_page):
    page = open_page(talker)
    page.fill("#max_tokens", "5")
    say(page, "a b c " * 100)
    assert "no room in the context length of 256" in page.inner_text(".bad")
    page.locator(".user .actions button").click()
    assert say(page, "Hello")
    assert page.locator(".bad").count() == 0


@slow_in_browser
def test_a_key_is_asked_for_and_kept(open_page, monkeypatch):
    server = Server(monkeypatch, gpt2, ROOT / "tiny/gpt2", "--api-key", "secret")
    page = open_page(server, viewport={"width": 600, "height": 700})
    say(page, "O")
    assert "a wrong API key, or none" in page.inner_text(".bad")
    page.fill("#key", "secret")  # the settings have opened
    page.click("#settings")
    page.click("text=Retry")
    assert wait_for_answer(page)
    page.reload()
    assert page.input_value("#key") == "secret"


@slow_in_browser
def test_the_attention_of_the_last_answer_is_one_click_away(talker, open_page):
    page = open_page(talker)
    page.fill("#max_tokens", "5")
    say(page, "Who are you?")
    with page.context.expect_page(timeout=PATIENCE) as opened:
        page.click("text=Attention")
    picture = opened.value
    picture.wait_for_selector("#grid button", timeout=PATIENCE)
    assert "Who·are·you?" in picture.locator("#words").text_content()


@slow_in_browser
def test_a_model_without_a_template_continues_a_text(writer, open_page):
    page = open_page(writer)
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "10")
    first = say(page, PROMPTS[0])
    [expected] = continuations(writer.model, PROMPTS[:1], 20, 0, temperature=0)
    page.click("text=Continue")
    wait_for_answer(page)
    assert "".join(texts(page)) == PROMPTS[0] + expected
    assert expected.startswith(first)


def brightness(page, name) -> float:
    colour = page.evaluate(f"getComputedStyle(document.body).{name}")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@slow_in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_narrow_window_light_and_dark(talker, open_page, scheme):
    page = open_page(talker, viewport={"width": 360, "height": 640}, color_scheme=scheme)
    answer = "long" * 50 + " words " * 50
    chunk = {"id": "1", "choices": [{"delta": {"content": answer}, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(chunk)}\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body))
    say(page, "Hello " * 20)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.getElementById('scroll').scrollWidth") <= 360
    for selector in ("#message", "#send", "#settings", ".assistant .text"):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    assert page.locator("#send").bounding_box()["y"] < 640

    dark, light = brightness(page, "backgroundColor"), brightness(page, "color")
    assert (dark < 60 and light > 180) if scheme == "dark" else (dark > 240 and light < 80)
    page.click("#settings")
    assert page.is_visible("#temperature")

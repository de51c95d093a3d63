"""sample.py --chat: a checkpoint's chat template, once or as a conversation on a terminal."""

import codecs
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from flax import nnx
from helpers import templates

import gemma
import llama
import mistral
import sample
import train

ROOT = Path(__file__).parents[1]
CHATML = (  # the template that SmolLM2-Instruct and many others use
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# One token each, so that a text is cut in only one way; without the sign that asks for a message.
LETTERS = ["\n", *(chr(code) for code in range(32, 127) if chr(code) != ">")]
END = len(LETTERS) + 1
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": END + 1,
    "initializer_range": 0.3,
    "max_position_embeddings": 2048,
}
MORE = {
    llama: {},
    mistral: {"sliding_window": 24},
    gemma: {
        "sliding_window": 24,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 8,
        "model_type": "gemma3_text",
    },
}


def write_chat(folder, module=llama, template=CHATML, **sizes):
    """A random model over letters and two special tokens, with a chat template."""
    config = module.Config.from_hf({**SIZES, **MORE[module], "eos_token_id": END, **sizes})
    module.save(module.Model(config, rngs=nnx.Rngs(jax.random.key(0))), folder)
    vocabulary = {letter: id for id, letter in enumerate(LETTERS)}
    codec = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    codec.decoder = tokenizers.decoders.Fuse()
    codec.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    codec.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat(tmp_path_factory.mktemp("chat"))


def chat_tokenizer(folder, system=None):
    return sample.ChatTokenizer(llama.tokenizer(folder).backend, folder, system)


def said(folder, messages, n, module=llama):
    """Ids and text of the greedy answer, from `generate` and transformers' tokenizer."""
    codec = transformers.AutoTokenizer.from_pretrained(folder)
    text = codec.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = codec.encode(text, add_special_tokens=False)
    [new] = module.generate(
        module.load(folder), [ids], n, key=jax.random.key(0), temperature=0, stop_ids=[END]
    )
    return new, codec.decode(new, skip_special_tokens=True)


def run(*options, **more):
    command = [sys.executable, "sample.py", "--model", "llama", *map(str, options)]
    more = more or {"stdin": subprocess.DEVNULL}
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=600, **more)


# --------------------------------------------------------------------------------------- one answer


def test_a_prompt_is_answered_as_the_template_asks_and_only_the_answer_is_printed(folder):
    new, text = said(folder, [{"role": "user", "content": "Who are you?"}], 30)
    options = ["--weights", folder, "--chat", "--temperature", 0, "--max-new-tokens", 30]
    result = run(*options, "--prompt", "Who are you?")
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode() == text.lstrip() + "\n"
    assert b"PyTorch" not in result.stderr
    piped = run(*options, "--json", input=b"Who are you?")
    record = json.loads(piped.stdout)
    assert (record["prompt"], record["completion"]) == ("Who are you?", text)
    assert record["completion_ids"] == new


def test_a_template_in_a_file_of_its_own_is_found(tmp_path):
    write_chat(tmp_path, template=None)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    ids = chat_tokenizer(tmp_path).encode("Hi")
    assert ids[0] == END - 1 and ids.count(END - 1) == 2 and ids.count(END) == 1


@pytest.mark.parametrize(
    ("template", "no_thought"),
    [
        pytest.param(templates.SWITCHED, "<think>\n\n</think>\n\n", id="Qwen3"),
        pytest.param(templates.SMOLLM3, "<think>\n\n</think>\n", id="SmolLM3"),
    ],
)
def test_no_think_asks_the_template_for_an_answer_without_thoughts(template, no_thought, tmp_path):
    """As transformers renders it with enable_thinking=False; LETTERS has no < and /."""
    folder = write_chat(tmp_path, template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for think in (True, False):
        codec = sample.ChatTokenizer(llama.tokenizer(folder).backend, folder, None, think)
        text = theirs.apply_chat_template(
            [{"role": "user", "content": "Hi"}],
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=think,
        )
        assert text.endswith(no_thought) == (not think)
        assert codec.encode("Hi") == codec.backend.encode(text, add_special_tokens=False).ids


def test_no_think_is_for_chats_whose_template_has_the_switch(folder):
    options = ["--weights", folder, "--no-think", "--prompt", "Hi"]
    result = run(*options)
    assert (result.returncode, result.stderr.decode().strip()) == (
        2,
        "sample.py: --no-think is for --chat and --ui",
    )
    result = run(*options, "--chat")
    assert result.returncode == 2
    assert "has no switch for thinking (enable_thinking)" in result.stderr.decode()


# ----------------------------------------------------------------------------------- a conversation


class Terminal:
    """sample.py --chat on a terminal of its own."""

    def __init__(self, folder, *options, env=None):
        self.end, its_end = pty.openpty()
        termios.tcsetwinsize(its_end, (50, 500))  # so that no line is wrapped
        # A session of its own, so that Ctrl-C of this terminal reaches it and nobody else; and it
        # heeds Ctrl-C also where the tests were started with `&`, which lets children ignore it.
        start = (
            "import fcntl, os, signal, sys, termios; os.setsid();"
            "fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
            "signal.signal(signal.SIGINT, signal.SIG_DFL);"
            "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        )
        command = [
            sys.executable,
            "-c",
            start,
            "sample.py",
            "--model",
            "llama",
            "--weights",
            str(folder),
            "--chat",
            "--temperature",
            "0",
            *options,
        ]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=its_end,
            stdout=its_end,
            stderr=its_end,
            env={**os.environ, "TERM": "dumb", **(env or {})},
        )
        os.close(its_end)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.shown = ""

    def read_more(self):
        """A read may end within a character, or between the two of a line's end."""
        text = self.decoder.decode(os.read(self.end, 10_000))
        self.shown = (self.shown + text).replace("\r\n", "\n")

    def read(self, *, until, limit=600):
        """What is shown up to a text, which is taken away."""
        deadline = time.monotonic() + limit
        while until not in self.shown:
            assert select.select([self.end], [], [], deadline - time.monotonic())[0], self.shown
            self.read_more()
        text, _, self.shown = self.shown.partition(until)
        return text

    def wait_until_it_listens(self):
        """Waits until it has slept for a second: it asks before it listens."""
        asleep = 0
        while asleep < 20:
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(") ", 1)[1][0]
            asleep = asleep + 1 if state == "S" else 0  # R: it has work, though not always a core
            time.sleep(0.05)

    def wait_for_an_answer(self):
        while len(self.shown) < 100:
            self.read_more()

    def type(self, text):
        os.write(self.end, text.encode())

    def ask(self, message):
        """Types a line; what is said to it."""
        self.type(message + "\n")
        self.read(until=message + "\n")  # the terminal shows what is typed
        return self.read(until="\n> ").strip()

    def interrupt(self):
        """Ctrl-C at the prompt, which it shows before it listens."""
        self.wait_until_it_listens()
        self.type("\x03")


@pytest.fixture
def converse():
    """Opens a terminal with a conversation, and ends it after the test."""
    opened = []

    def begin(*options, **more):
        opened.append(Terminal(*options, **more))
        opened[-1].read(until="> ")
        return opened[-1]

    yield begin
    for terminal in opened:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.end)


def test_a_conversation_keeps_what_was_said_and_ends_with_ctrl_d(folder):
    terminal = Terminal(folder, "--max-new-tokens", "30")
    terminal.read(until="> ")
    messages = []
    for message in ["Who are you?", "And who am I?", "Well"]:
        messages.append({"role": "user", "content": message})
        terminal.type(message + "\n")
        terminal.read(until=message + "\n")  # the terminal shows what is typed
        _, text = said(folder, messages, 30)
        assert terminal.read(until="\n> ") == text.lstrip()
        messages.append({"role": "assistant", "content": text.strip()})
    terminal.type("\x04")
    terminal.read(until="\n")
    assert terminal.process.wait(600) == 0


def test_ctrl_c_stops_an_answer_and_at_the_prompt_the_conversation(tmp_path):
    folder = write_chat(tmp_path, max_position_embeddings=50_000, eos_token_id=None)
    terminal = Terminal(folder, "--max-new-tokens", "40000")
    terminal.read(until="> ")
    for message in ["Talk\n", "Once more\n"]:
        terminal.type(message)
        terminal.read(until=message)
        terminal.wait_for_an_answer()
        terminal.type("\x03")
        terminal.read(until="> ")
    terminal.interrupt()
    terminal.read(until="Ctrl-C again ends the conversation, as Ctrl-D does\n> ")
    terminal.interrupt()
    assert "Traceback" not in terminal.read(until="stopped\n")
    assert terminal.process.wait(600) == 130


def test_ctrl_c_drops_what_is_typed_and_does_not_count_as_the_first_of_two(converse, folder):
    terminal = converse(folder, "--max-new-tokens", "5")
    for _ in range(2):
        terminal.type("Not this")
        terminal.read(until="Not this")
        terminal.interrupt()
        assert "again" not in terminal.read(until="> ")
    terminal.interrupt()
    terminal.read(until="again ends the conversation, as Ctrl-D does\n> ")
    terminal.ask("Hi")  # after a message, a second one is again the first
    terminal.interrupt()
    terminal.read(until="again ends the conversation, as Ctrl-D does\n> ")


# ----------------------------------------------------------------------------------------- commands


def test_help_names_every_command_and_an_unknown_one_names_help(converse, folder):
    terminal = converse(folder)
    shown = terminal.ask("/help")
    for command in ("/clear", "/system TEXT", "/undo", "/save FILE", "/help"):
        assert f"\n{command} " in "\n" + shown
    unknown = "there is no /quit: /help lists the commands, and Ctrl-D ends the conversation"
    assert terminal.ask("/quit") == unknown


def test_undo_clear_and_system_change_what_is_answered(converse, folder):
    """Each answer is the greedy one to the messages that should be left."""
    terminal = converse(folder, "--max-new-tokens", "20")

    def answer(*messages):
        """To messages that are user, assistant, user ..., after "!" the system message."""
        system = [message[1:] for message in messages if message.startswith("!")]
        others = [message for message in messages if not message.startswith("!")]
        turns = [{"role": "system", "content": text} for text in system]
        for i, text in enumerate(others):
            turns.append({"role": "assistant" if i % 2 else "user", "content": text})
        return said(folder, turns, 20)[1].strip()

    first = terminal.ask("One")
    assert first == answer("One")
    assert terminal.ask("Two") == answer("One", first, "Two")
    assert terminal.ask("/undo") == "taken back: Two"
    assert terminal.ask("Three") == answer("One", first, "Three")

    assert terminal.ask("/clear") == "the messages are forgotten"
    assert terminal.ask("/undo") == "there is no message to take back"
    assert terminal.ask("Three") == answer("Three")

    terminal.ask("/clear")
    assert terminal.ask("/system Be brief.") == "the system message: Be brief."
    assert terminal.ask("Three") == answer("!Be brief.", "Three")
    assert terminal.ask("/system") == "removed: Be brief."
    assert terminal.ask("/system") == "there was no system message"


def test_a_system_message_that_the_template_refuses_changes_nothing(converse, tmp_path):
    folder = write_chat(tmp_path, template=NO_SYSTEM + CHATML)
    terminal = converse(folder, "--max-new-tokens", "5")
    assert "does not take this: no system" in terminal.ask("/system Be brief.")
    _, text = said(folder, [{"role": "user", "content": "Hi"}], 5)
    assert terminal.ask("Hi") == text.strip()


def test_a_saved_conversation_is_one_that_train_py_reads(converse, folder, tmp_path):
    terminal = converse(folder, "--max-new-tokens", "20", "--system", "Be brief.")
    file = tmp_path / "talk.jsonl"
    assert terminal.ask(f"/save {file}") == "there is nothing to save yet"
    first = terminal.ask("Who are you, é?")
    assert terminal.ask(f"/save {tmp_path / 'talk.txt'}").startswith(
        "/save FILE: its name must end"
    )
    assert terminal.ask(f"/save {file}").endswith("3 messages")

    expected = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you, é?"},
        {"role": "assistant", "content": first},
    ]
    assert json.loads(file.read_text()) == {"messages": expected}
    before = file.read_text()
    assert terminal.ask(f"/save {file}").endswith("exists: choose another name")
    assert file.read_text() == before
    assert "cannot be written: " in terminal.ask(f"/save {tmp_path / 'no/talk.jsonl'}")
    assert terminal.ask("/save ~nobody-of-that-name/talk.jsonl").endswith("of that user")

    other = tmp_path / "other.jsonl"  # train.py wants two, one of them to validate on
    terminal.ask(f"/save {other}")
    command = [sys.executable, "train.py", "--weights", folder, "--data", file, other]
    command += ["--show-data", "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert "Be brief." in done.stdout, done.stderr


def test_the_arrow_keys_bring_an_earlier_line_back(converse, folder):
    terminal = converse(folder, "--max-new-tokens", "5", env={"TERM": "xterm"})
    terminal.type("/undo\n")
    terminal.read(until="no message to take back\n")
    terminal.read(until="> ")
    terminal.type("\x1b[A\n")
    terminal.read(until="no message to take back\n")


class Talk:
    """A conversation without a terminal, greedy, that counts the tokens it feeds."""

    def __init__(self, module, folder):
        self.module, self.model = module, module.load(folder)
        self.memory, self.fed = sample.Memory(), 0
        self.args = SimpleNamespace(
            top_k=None, temperature=0, top_p=None, min_p=None, seed=0, repetition_penalty=1.0
        )

    def prefill(self, graphdef, state, cache, tokens, *more, **options):
        self.fed += tokens.shape[1]
        return self.module.prefill(graphdef, state, cache, tokens, *more, **options)

    def answer(self, ids, n):
        self.fed = 0
        parts = SimpleNamespace(**{**vars(self.module), "prefill": self.prefill})
        tokens = sample.answer(parts, self.model, self.memory, ids, n, 0, self.args)
        return [int(token[0]) for token in tokens]

    def anew(self, ids, n):
        """The same without a memory."""
        options = {"key": jax.random.key(0), "temperature": 0, "keep": 0}
        [new] = self.module.generate(self.model, [ids], n, **options)
        return new


@pytest.mark.parametrize(
    "module",
    [llama, *[pytest.param(module, marks=pytest.mark.wide) for module in (gemma, mistral)]],
    ids=lambda module: module.__name__,
)
def test_the_cache_computes_new_messages_only_and_gives_the_same_answers(tmp_path, module):
    """In pieces, and for longer than the windows of 24 tokens."""
    folder = write_chat(tmp_path, module)
    codec, talk, messages, known = chat_tokenizer(folder), Talk(module, folder), [], 0
    for message in [
        "The first message is one of more than sixty-four letters, so of two pieces.",
        "A second.",
        "Third.",
    ]:
        messages.append({"role": "user", "content": message})
        ids = codec.encode(messages)
        new = talk.answer(ids, 20)
        assert new == talk.anew(ids, 20)
        assert talk.fed == len(ids) - known  # what the cache held was not computed again
        known = len(ids) + 20
        text = "".join([*LETTERS, "<|im_start|>", "<|im_end|>"][token] for token in new)
        messages.append({"role": "assistant", "content": text})


def test_where_a_template_changes_earlier_turns_all_is_computed_anew(folder):
    codec, talk = chat_tokenizer(folder), Talk(llama, folder)
    for text in ["Hello", "Another beginning, not of the same ids"]:
        ids = codec.encode(text)
        assert talk.answer(ids, 20) == talk.anew(ids, 20)
        assert talk.fed == len(ids)


@pytest.mark.wide
def test_a_conversation_that_outgrows_its_cache_gets_a_longer_one(folder):
    """It begins with 1,024 slots."""
    codec, talk = chat_tokenizer(folder), Talk(llama, folder)
    ids = codec.encode("Hello")
    ids += talk.answer(ids, 20) + codec.encode("a" * 1000)
    assert talk.answer(ids, 20) == talk.anew(ids, 20)
    assert (talk.fed, talk.memory.length) == (len(ids), 2048)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("template", "options", "said"),
    [
        (None, ["--prompt", "Hi"], "has no chat template"),
        (CHATML, [], "--chat needs a terminal to converse on, or a --prompt"),
        (CHATML, ["--prompt", "a" * 3000], "do not fit the context"),
    ],
)
def test_what_a_chat_lacks_is_said_in_one_line(tmp_path, refused, template, options, said):
    folder = write_chat(tmp_path, template=template)
    assert said in refused("--model", "llama", "--weights", folder, "--chat", *options)


@pytest.mark.parametrize("options", [["--num-samples", "2"], ["--profile", "/tmp"]])
def test_a_conversation_is_one_text_and_has_no_profile(folder, options):
    terminal = Terminal(folder, *options)
    assert "leave --num-samples, --json" in terminal.read(until="give a --prompt\n")
    assert terminal.process.wait(600) == 2


def test_an_answer_that_outgrows_the_context_goes_on_as_generate_does(tmp_path):
    talk = Talk(llama, write_chat(tmp_path, max_position_embeddings=64))
    ids = list(range(5, 25))
    assert talk.answer(ids, 150) == talk.anew(ids, 150)


def test_where_a_conversation_fills_the_context_its_oldest_turns_go(tmp_path):
    """48 of 64 tokens are for the conversation; with their frame, these messages take some 20."""
    folder = write_chat(tmp_path, max_position_embeddings=64)
    codec = sample.ChatTokenizer(llama.tokenizer(folder).backend, folder, "Be short.")
    config = llama.read_config(folder)
    args = SimpleNamespace(stop=[])
    messages = []
    for i in range(3):
        messages += [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": "A"}]
    messages.append({"role": "user", "content": "Last"})

    first, text = sample.fit_context(llama, config, codec, messages, 100, args)
    assert first % 2 == 0 and len(text.prompt_ids) <= 48
    assert text.prompt_ids == codec.encode(messages[first:])
    assert len(codec.encode(messages[first - 2 :])) > 48  # no turn goes without need
    assert codec.decode(text.prompt_ids).count("Be short.") == 1

    # With a sliding window the ring runs on, and all turns stay.
    windowed = mistral.Config.from_hf({**SIZES, "max_position_embeddings": 64, **MORE[mistral]})
    first, text = sample.fit_context(mistral, windowed, codec, messages, 100, args)
    assert (first, text.prompt_ids) == (0, codec.encode(messages))


@pytest.mark.wide
def test_a_message_for_which_the_context_has_no_room_is_not_taken(tmp_path):
    terminal = Terminal(write_chat(tmp_path, max_position_embeddings=64))
    terminal.read(until="> ")
    terminal.type("A message of more than sixty-four letters, and so of more tokens than it has.\n")
    terminal.read(until="no room in the context of 64: say less, /undo, or /clear\n> ")
    terminal.type("Hi\n")
    terminal.read(until="Hi\n")
    terminal.read(until="\n> ")
    terminal.type("\x04")
    assert terminal.process.wait(600) == 0


def test_the_same_message_again_is_answered_again(folder):
    """Where a template shows the last message alone, the second time all tokens are known."""
    args = SimpleNamespace(
        seed=0, temperature=0.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0
    )
    memory, model = sample.Memory(), llama.load(folder)
    once, again = (list(sample.answer(llama, model, memory, [5, 6, 7], 1, 0, args)) for _ in "12")
    assert len(once) == 1 and once == again


# ------------------------------------------------------------------------- texts made of bytes


def byte_fallback_tokenizer():
    """As Llama's: letters, and the 256 bytes for all that is none."""
    pieces = ["a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    codec = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    codec.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )

    def encode(text):
        return codec.encode(text).ids

    return SimpleNamespace(encode=encode, decode=codec.decode, backend=codec)


def test_a_byte_that_spoils_the_bytes_before_it_is_waited_for():
    """The decoder replaces all bytes in a row that are not UTF-8 together, the whole é too."""
    codec = byte_fallback_tokenizer()
    e_acute, half = codec.encode("é"), codec.encode("ü")[:1]
    assert codec.decode(e_acute) == "é" and codec.decode(e_acute + half) == "\ufffd" * 3

    text, shown = sample.Text(codec, "a", []), []
    for token in [*e_acute, *half, *codec.encode("b")]:
        text.add([token], [], 9)
        shown.append(text.completion)
    assert shown == ["", "", "", "\ufffd" * 3 + "b"]


def test_what_is_streamed_is_the_beginning_of_the_whole_text():
    codec, rng = byte_fallback_tokenizer(), np.random.default_rng(0)
    common = [*codec.encode("ab"), *codec.encode("éü€😀")]
    for _ in range(300):
        tokens = rng.choice(common, 12).tolist()
        text, shown = sample.Text(codec, "a", []), ""
        for token in tokens:
            text.add([token], [], len(tokens))
            assert text.completion.startswith(shown)
            shown = text.completion
        assert shown == codec.decode([*codec.encode("a"), *tokens])[1:]


# ------------------------------------------------------------------------------- chat templates


def answer_ids(tmp_path, template, system=None):
    return chat_tokenizer(write_chat(tmp_path, template=template), system).encode("Hi")


def test_the_ids_are_those_of_the_folders_own_tokenizer(tmp_path):
    """Not of the class that tokenizer_config.json names, which may cut digits in another way."""
    write_chat(tmp_path)
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    fast.save(str(tmp_path / "tokenizer.json"))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "GPT2Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))

    expected = llama.tokenizer(tmp_path).encode("<|im_start|>user\nHi<|im_end|>\n")
    assert chat_tokenizer(tmp_path).encode("Hi")[: len(expected)] == expected


@pytest.mark.parametrize("read", [chat_tokenizer, train.ChatTemplate])
def test_code_that_came_with_the_folder_is_not_run(read, tmp_path, monkeypatch, capsys):
    """Nor is anybody asked whether to, on standard output, for 15 seconds."""
    write_chat(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "OwnTokenizer"
    settings["auto_map"] = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nOwnTokenizer = 1\n")

    monkeypatch.setattr("builtins.input", lambda question: "y")
    with pytest.raises(SystemExit):
        read(tmp_path)
    assert "contains custom code" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_system_message_comes_first(tmp_path):
    ids = answer_ids(tmp_path, CHATML, system="Be brief.")
    expected = llama.tokenizer(tmp_path).encode("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert ids[: len(expected)] == expected


def test_of_several_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    assert answer_ids(tmp_path, named) == answer_ids(tmp_path, CHATML)


RAISES = "{{ raise_exception('roles must alternate') }}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
WANTS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('who am I?') }}{% endif %}"
TOOLS_ONLY = [{"name": "tool_use", "template": CHATML}]


@pytest.mark.parametrize(
    ("template", "options", "said"),
    [
        (RAISES, [], "does not take this: roles must alternate"),
        (NO_SYSTEM, ["--system", "Be brief."], "does not take this: no system"),
        (WANTS_SYSTEM, [], "who am I? (if it wants a system message: --system TEXT)"),
        ("{% if %}", [], "fails: "),
        ("{{ messages[0].content + 1 }}", [], "fails: "),
        ("{{ 1 // 0 }}", [], "fails: "),
        ("{{ messages[0].content[0].text }}", [], "makes no text of the messages"),
        (TOOLS_ONLY, [], "templates tool_use, but none called default"),
    ],
)
def test_a_template_that_refuses_says_why_in_one_line(tmp_path, refused, template, options, said):
    folder = write_chat(tmp_path, template=template)
    assert said in refused("--weights", folder, "--chat", "--prompt", "Hi", *options)


def test_a_system_message_without_a_chat_is_refused(refused):
    assert "--system is for --chat" in refused("--system", "Be brief.", "--prompt", "Hi")

"""Tokenizer folders, templates and loss masks, against transformers; conversations in JSONL and what they get wrong."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from functional_trainer.data import Tokenizer, records
from tests.functional_trainer.reading import read

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

# The mechanics of Qwen3's template: tools in the system turn, thoughts of earlier turns dropped and an empty one put
# into the last, tool answers as user turns, tool calls behind the text.
QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\nSignatures:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}
                {{- '\\n' }}
            {%- endif %}
            {%- set call = tool_call.function or tool_call %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3_PLAIN = QWEN3.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")

LLAMA = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no ' + message.role) }}{% endif %}
    {{- '<|start|>' + message.role + '<|stop|>\\n\\n' + message.content | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|stop|>\\n\\n' }}{%- endif %}
"""
LLAMA_MARKED = LLAMA.replace(
    "message.content | trim + eos_token }}",
    "'' }}{%- if message.role == 'assistant' %}{% generation %}{{- message.content | trim }}{% endgeneration %}"
    "{%- else %}{{- message.content | trim }}{%- endif %}{{- eos_token }}",
)
MISTRAL = """\
{{ bos_token }}{% for m in messages %}
{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}
{% endfor %}
"""
TEMPLATES = dict(chatml=CHATML, qwen3=QWEN3, qwen3_plain=QWEN3_PLAIN, llama=LLAMA, llama_marked=LLAMA_MARKED)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot|>", "<s>"]


def write_folder(folder: Path, template, eos="<|im_end|>", **config) -> Path:
    """Train a small byte-level BPE and save it as transformers would find it."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    text = [CHATML, QWEN3, LLAMA, "what is seven and twelve? assistant user system tool think"] * 3
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(text, tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    bpe.add_special_tokens(SPECIAL)
    bpe.add_tokens([tokenizers.AddedToken(t, special=False) for t in ("<think>", "</think>", "<tool_call>")])
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    given_ = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=eos, bos_token="<s>", pad_token="<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({**given_, "chat_template": template, **config}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        name: write_folder(root / name, text, "<|eot|>" if "llama" in name else "<|im_end|>")
        for name, text in TEMPLATES.items()
    }


@pytest.fixture(scope="module")
def pairs(folders):
    return {name: (Tokenizer(path), AutoTokenizer.from_pretrained(path)) for name, path in folders.items()}


def say(role, content=None, **more):
    return {"role": role, **({} if content is None else {"content": content}), **more}


def call(name="add", arguments="{}"):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = [call("add", '{"a": 1}'), call("sort", {"text": "<b> & 'é'"})]
THINKING = [
    say("system", "Be brief."),
    say("user", "7+5?"),
    say("assistant", "<think>\nseven and five\n</think>\n\n12"),
    say("user", "and then?"),
    say("assistant", "<think>\nhm\n</think>\n\nnothing 🙂 é"),
]
AGENT = [
    say("user", "sort"),
    say("assistant", None, tool_calls=CALLS),
    say("tool", "a b"),
    say("tool", "c"),
    say("assistant", "done", reasoning="easy", tool_calls=CALLS[:1]),
    say("tool", "d"),
    say("assistant", "so: a b c"),
]
CHATS = {
    "short": [say("user", "hi"), say("assistant", "ho")],
    "turns": [say("system", "s"), say("user", "a"), say("assistant", "b c"), say("user", "d"), say("assistant", " e ")],
    "thinking": THINKING,
    "agent": AGENT,
}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a <b> & 'c' é", "parameters": {}}}]


def fits(name, chat):
    return "qwen3" in name or chat != "agent"


CASES = [(name, chat) for name in TEMPLATES for chat in CHATS if fits(name, chat)]


@pytest.mark.parametrize("name, chat", CASES)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_renders_and_encodes_as_transformers(pairs, name, chat, tools):
    ours, theirs = pairs[name]
    for prompt in (False, True):
        args = dict(tools=tools, add_generation_prompt=prompt)
        text = theirs.apply_chat_template(CHATS[chat], tokenize=False, **args)
        assert ours.render(CHATS[chat], **args) == text
        ids = theirs.apply_chat_template(CHATS[chat], return_dict=True, **args)["input_ids"]
        assert (ours.prompt if prompt else lambda *a: ours.encode_chat(*a)[0])(CHATS[chat], tools) == ids


@pytest.mark.parametrize("chat", CHATS)
def test_marked_mask_is_that_of_transformers(pairs, chat):
    ours, theirs = pairs["qwen3"]
    out = theirs.apply_chat_template(CHATS[chat], return_assistant_tokens_mask=True, return_dict=True, tools=TOOLS)
    ids, mask = ours.encode_chat(CHATS[chat], TOOLS)
    assert (ids, [int(m) for m in mask]) == (out["input_ids"], out["assistant_masks"])
    assert any(mask)


@pytest.mark.parametrize("chat", CHATS)
def test_sentinels_find_what_marks_say(pairs, chat):
    assert pairs["qwen3_plain"][0].encode_chat(CHATS[chat], TOOLS) == pairs["qwen3"][0].encode_chat(CHATS[chat], TOOLS)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_plain"])
def test_text_cannot_pass_for_an_answer_by_the_marks_of_turns(pairs, name):
    turns = [{"role": "user", "content": "q \U000f0000not said\U000f0001"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match="private-use character U.F0000 marks turns here; take it out of the text"):
        pairs[name][0].encode_chat(turns)


@pytest.mark.parametrize("chat", ["short", "turns"])
def test_marks_without_the_end_of_turn_are_extended_by_it(pairs, chat):
    ours, theirs = pairs["llama_marked"]
    assert ours.encode_chat(CHATS[chat]) == pairs["llama"][0].encode_chat(CHATS[chat])
    out = theirs.apply_chat_template(CHATS[chat], return_assistant_tokens_mask=True, return_dict=True)
    ids, mask = ours.encode_chat(CHATS[chat])
    added = [i for i, a, b in zip(ids, mask, out["assistant_masks"], strict=True) if a != b]
    assert added == [ours.backend.token_to_id("<|eot|>")] * sum(m["role"] == "assistant" for m in CHATS[chat])


def trained(tokenizer, chat, tools=None) -> list[str]:
    """Return the trained stretches of a chat as text."""
    ids, mask = tokenizer.encode_chat(chat, tools)
    runs: list[list[int]] = []
    for i, (token, on) in enumerate(zip(ids, mask, strict=True)):
        if on:
            if not (i and mask[i - 1]):
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run, skip_special=False) for run in runs]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_plain"])
def test_mask_trains_the_assistant_and_the_end_of_turn_only(pairs, name):
    ours = pairs[name][0]
    assert trained(ours, CHATS["short"]) == ["<think>\n\n</think>\n\nho<|im_end|>"]
    assert trained(ours, THINKING) == ["12<|im_end|>", "<think>\nhm\n</think>\n\nnothing 🙂 é<|im_end|>"]
    first, second, third = trained(ours, AGENT, TOOLS)
    assert first.startswith('<tool_call>\n{"name": "add"') and first.count("<tool_call>") == 2
    assert first.endswith("'é'\"}}\n</tool_call><|im_end|>")
    assert second.startswith("<think>\neasy\n</think>\n\ndone\n<tool_call>") and second.endswith("<|im_end|>")
    assert third == "<think>\n\n</think>\n\nso: a b c<|im_end|>"


texts = st.text(st.sampled_from("ab 1\n\t.<>|🙂é\u0301"), min_size=1, max_size=12)


@settings(max_examples=150)
@given(
    turns=st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=4),
    system=st.none() | texts,
    name=st.sampled_from(["chatml", "llama", "qwen3"]),
)
def test_any_conversation_trains_exactly_its_answers(pairs, turns, system, name):
    chat = [] if system is None else [say("system", system)]
    for question, answer in turns:
        chat += [say("user", question), say("assistant", answer)]
    ours, theirs = pairs[name]
    text, spans = ours.spans(chat)
    assert text == theirs.apply_chat_template(chat, tokenize=False)
    end = "<|eot|>" if name == "llama" else "<|im_end|>"
    shown = [answer.strip() if name == "llama" else answer for _, answer in turns]
    if name == "qwen3":
        shown[-1] = "<think>\n\n</think>\n\n" + shown[-1].lstrip("\n")
    assert [text[start:stop] for start, stop in spans] == [answer + end for answer in shown]
    if name == "qwen3":
        out = theirs.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
        ids, mask = ours.encode_chat(chat)
        assert (ids, [int(on) for on in mask]) == (out["input_ids"], out["assistant_masks"])
    for i, (start, _) in enumerate(spans):
        before = [m for m in chat if m["role"] != "system"][: 2 * i + 1]
        prompt = ours.render(([chat[0]] if system is not None else []) + before, add_generation_prompt=True)
        if name != "qwen3":  # it forgets the thoughts of earlier turns
            assert text[:start] == prompt, "training sees what generation sees"


def test_named_templates_and_jinja_files(tmp_path):
    named = [dict(name="default", template=CHATML), dict(name="tool_use", template=QWEN3)]
    folder = write_folder(tmp_path / "named", named)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for tools in (None, TOOLS):
        expected = theirs.apply_chat_template(CHATS["turns"], tools=tools, tokenize=False)
        assert ours.render(CHATS["turns"], tools) == expected
    (folder / "chat_template.jinja").write_text(LLAMA)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.render(CHATS["turns"]) == theirs.apply_chat_template(CHATS["turns"], tokenize=False)


def test_environment_is_that_of_transformers(tmp_path):
    template = (
        "{%- for m in messages %}\n    {%- if m.role == 'user' %}{% continue %}{% endif %}\n"
        "  {{ [m.content, 'é<&'] | tojson(indent=2) }}\n{%- if loop.index > 2 %}{% break %}{% endif %}{% endfor %}\n"
        "{{ strftime_now('%Y') }}\n   {% if x is defined %}\n  x={{ x }}\n   {% endif %}\n"
        "{{ messages[0].name is defined }}"
    )
    folder = write_folder(tmp_path, template)
    theirs = AutoTokenizer.from_pretrained(folder)
    for extra in ({}, {"x": 3}):
        chat = [say("user", "q", name=None), *CHATS["turns"][1:]]
        expected = theirs.apply_chat_template(chat, tokenize=False, **extra)
        assert Tokenizer(folder).render(chat, **extra) == expected


def test_base_model_whose_eos_is_not_the_end_of_turn(tmp_path):
    folder = write_folder(tmp_path, CHATML, eos="<|endoftext|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [600, 1]}))
    ours = Tokenizer(folder)
    assert ours.turn_ends[:2] == ["<|im_end|>", "<|endoftext|>"] and 1 in ours.eos_ids
    assert trained(ours, CHATS["short"]) == ["ho<|im_end|>"]


def test_template_without_a_generation_prompt(tmp_path):
    ours = Tokenizer(write_folder(tmp_path, MISTRAL, eos="<|eot|>"))
    assert trained(ours, CHATS["turns"]) == [" b c<|eot|>", "  e <|eot|>"]


def test_template_that_looks_at_the_first_character(tmp_path):
    head = "('#' if message['content'].startswith('b') else '') + message['content']"
    ours = Tokenizer(write_folder(tmp_path, CHATML.replace("message['content']", head)))
    assert trained(ours, CHATS["turns"]) == ["#b c<|im_end|>", " e <|im_end|>"]


def test_text_ids_and_files(folders, pairs, tmp_path):
    for ours, theirs in pairs.values():
        text = "Seven 🙂 é\n\n<|im_start|>user <think>"
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        for skip in (False, True):
            expected = theirs.decode(ours.encode(text), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ours.encode(text), skip_special=skip) == expected
        assert (ours.vocab_size, ours.pad_id) == (max(theirs.get_vocab().values()) + 1, theirs.pad_token_id)
        assert theirs.eos_token_id in ours.eos_ids
    pairs["qwen3"][0].save(tmp_path / "copy")
    copy = tmp_path / "copy"
    assert Tokenizer(copy).encode_chat(AGENT) == pairs["qwen3"][0].encode_chat(AGENT)
    assert (copy / "tokenizer.json").read_bytes() == (folders["qwen3"] / "tokenizer.json").read_bytes()
    assert isinstance(AutoTokenizer.from_pretrained(copy), PreTrainedTokenizerFast)


def test_tokens_listed_beside_tokenizer_json(tmp_path):
    folder = write_folder(tmp_path, CHATML)
    next_id = Tokenizer(folder).vocab_size
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(next_id): {"content": "<|new|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(folder).encode("a<|new|>b")[1] == next_id
    config["added_tokens_decoder"] = {str(next_id + 5): {"content": "<|new|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"should have id {next_id + 5} but gets {next_id}"):
        Tokenizer(folder)


@pytest.mark.parametrize(
    "template, message",
    [
        (CHATML.replace("message['content']", "message['content'] | replace('b', '')"), None),
        (CHATML.replace("message['content']", "(message['content'] | length) | string"), "omits or alters"),
        ("{{ messages | length }}" + MISTRAL, "generation prompt '' does not open"),
        (CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|start|>' }}"), "'<|start|>' does not open"),
        (CHATML.replace("<|im_end|>", ""), "none of the end-of-turn tokens"),
        (CHATML.replace("'<|im_end|>'", "('<|im_end|>' if loop.last else '')"), "before the turn of message 4"),
        ("{% for m in messages %}{{ m.nothing.there }}{% endfor %}", "refuses these messages"),
        (None, "no chat template"),
    ],
)
def test_templates_that_hide_the_answer_are_refused_with_the_reason(tmp_path, template, message):
    ours = Tokenizer(write_folder(tmp_path, template))
    if message is None:
        assert trained(ours, CHATS["turns"]) == [" c<|im_end|>", " e <|im_end|>"]
        return
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        ours.encode_chat(CHATS["turns"])


def test_broken_folders(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json: no such file"):
        Tokenizer(tmp_path / "nothing")
    folder = write_folder(tmp_path / "a", "{% if %}")
    with pytest.raises(ValueError, match="not valid Jinja"):
        Tokenizer(folder)
    write_folder(folder, CHATML, eos="<|gone|>")
    with pytest.raises(ValueError, match="eos_token '<|gone|>' is not in"):
        Tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json: not valid JSON"):
        Tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer file"):
        Tokenizer(folder)


GOOD = json.dumps({"messages": CHATS["short"], "id": 7})


def test_reads_files_folders_and_globs(folders, tmp_path):
    ours = Tokenizer(folders["chatml"])
    for i, name in enumerate(["b.jsonl", "a.jsonl", "c.ndjson"]):
        chat = [say("user", "q"), say("assistant", [{"type": "text", "text": "x"}, {"type": "text", "text": str(i)}])]
        (tmp_path / name).write_text("\n" + json.dumps({"messages": chat}) + "\n\n")
    docs = read(tmp_path, ours)
    answers = ["".join(trained(ours, record.messages)) for record in records(tmp_path)]
    assert answers == ["x1<|im_end|>", "x0<|im_end|>", "x2<|im_end|>"]
    for i, record in enumerate(records(tmp_path)):
        ids, mask = docs[i]
        assert (ids.tolist(), mask.tolist()) == ours.encode_chat(record.messages)
    names = [Path(record.where).name for record in records(str(tmp_path / "*"))]
    assert names == ["a.jsonl:2", "b.jsonl:2", "c.ndjson:2"]
    assert len(read([tmp_path / "c.ndjson", str(tmp_path)], ours)) == 4
    with pytest.raises(ValueError, match="no such file"):
        read(tmp_path / "d.jsonl", ours)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no data file in it"):
        read(tmp_path / "empty", ours)


def chat(*messages):
    return json.dumps({"messages": list(messages)})


USER, ANSWER = say("user", "q"), say("assistant", "a")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"messages": [', "not valid JSON"),
        (b'{"messages": "\xff"}', "not valid JSON"),
        ("[1]", "expected an object with a list 'messages'"),
        ("{}", "expected an object with a list 'messages'"),
        (chat(), "list 'messages' that is not empty"),
        (json.dumps({"messages": [USER, ANSWER], "tools": "add"}), "'tools' must be a list"),
        (chat("hi"), "message 0: expected an object"),
        (chat(say("human", "q"), ANSWER), "message 0: unknown role 'human'; it can be"),
        (chat(say("user", "q"), say(None, "a")), "message 1: unknown role None"),
        (chat(ANSWER), "message 0: role 'assistant' cannot come first; here it can be 'system' or 'user'"),
        (chat(USER, USER, ANSWER), "message 1: role 'user' cannot follow 'user'; here it can be 'assistant'"),
        (chat(USER, ANSWER, say("system", "s")), "message 2: role 'system' cannot follow 'assistant'"),
        (chat(USER, ANSWER, ANSWER), "message 2: role 'assistant' cannot follow 'assistant'"),
        (chat(USER, ANSWER, say("tool", "t"), ANSWER), "message 2: a 'tool' message must answer"),
        (chat(USER), "the last message must be the assistant's, it is of role 'user'"),
        (chat(say("user"), ANSWER), "message 0: 'content' is missing"),
        (chat(say("user", 3), ANSWER), r"message 0: 'content' is missing or not text \(3\)"),
        (chat(say("user", [{"type": "image_url"}]), ANSWER), "parts that are not text"),
        (chat(USER, say("assistant")), "message 1: 'content' is missing"),
        (chat(USER, say("assistant", " \n")), "message 1: the assistant's turn is empty"),
        (chat(USER, say("assistant", "", tool_calls=[])), "the assistant's turn is empty"),
        (chat(USER, say("assistant", "a", tool_calls=[{"id": 1}])), "'tool_calls' must be an assistant's list"),
        (chat(say("user", "q", tool_calls=[call()]), ANSWER), "'tool_calls' must be an assistant's list"),
        (chat(say("user", "\ud800"), ANSWER), "not valid JSON .*surrogates not allowed"),
    ],
)
def test_a_bad_record_names_file_line_and_remedy(folders, tmp_path, line, message):
    file = tmp_path / "train.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(GOOD.encode() + b"\n\n" + line + b"\n" + GOOD.encode() + b"\n")
    with pytest.raises(ValueError, match=f"train.jsonl:3: .*{message}") as error:
        read(file, Tokenizer(folders["qwen3"]))
    assert "\n" not in str(error.value)


def test_bad_files_and_vocabulary(folders, tmp_path):
    ours, file = Tokenizer(folders["chatml"]), tmp_path / "train.jsonl"
    file.write_text("\n")
    with pytest.raises(ValueError, match="train.jsonl: the file is empty"):
        read(file, ours)
    file.write_text(GOOD)
    end = ours.backend.token_to_id("<|im_end|>")
    assert len(read(file, ours, end + 1)) == 1
    with pytest.raises(ValueError, match=rf"train.jsonl:1: token '<\|im_end\|>' has id {end} but .* has {end} rows"):
        read(file, ours, end)
    never = write_folder(tmp_path / "never", CHATML + "{% if false %}{% generation %}x{% endgeneration %}{% endif %}")
    with pytest.raises(ValueError, match="train.jsonl:1: no token of it is trained"):
        read(file, Tokenizer(never))
    shutil.rmtree(never)

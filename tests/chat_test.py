"""Chat templates byte for byte against transformers, in a sandbox, and through a whole config."""

import json
import random
import shutil
import time
from unittest import mock

import jax
import pytest

from configs import base
from flowrl_jax.assembly import assemble
from flowrl_jax.cli import load_config
from flowrl_jax.config import parse_config
from flowrl_jax.errors import InputError
from flowrl_jax.rollouts import encode_prompt
from flowrl_jax.sharding import make_mesh
from flowrl_jax.tokenizers import ChatTemplate, load_chat_template, load_tokenizer, sandbox
from tests.tiny_tokenizers import NASTY, byte_level, write_config

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TEMPLATES = (
    "deepseekv3", "gemma", "gemma3", "llama3", "llama3_1", "phi3", "qwen2_5", "qwen2_5_training",
    "qwen3", "qwen3_instruct_2507", "qwen3_training",
)  # fmt: skip
CONFIGS = ("tokenizer_config.json", "tokenizer_config.qwen3.json", "deepseek-r1-distill-qwen")
# What the public templates do not happen to use, but others do.
CONSTRUCTS = (
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% else %}none{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.length }}{{ loop.last }}"
    "{{ loop.previtem.content }}|{{ loop.nextitem.content }}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': '<é>'} | tojson }}",
    "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}"
    "{{ x }}{% endfor %}",
    "{%- set ns = namespace(n=0, s='') -%}\n  {% for m in messages %}\n  {% set ns.n = ns.n + 1 %}"
    "\n  {% set ns.s = ns.s ~ m.role ~ (ns.n * 2) %}\n  {% endfor %}\n  {{ ns.n }}{{ ns.s }}\n",
    "{% macro show(m, sep='-') %}{{ m.role ~ sep ~ m.content | trim }}{% endmacro %}"
    "{% set all %}{% for m in messages %}{{ show(m) }}{% endfor %}{% endset %}{{ all | upper }}",
    "{% set a, b = 'x', 2 %}{{ a * b }}{{ b ** 3 }}{{ [a] * 2 + [b] }}{{ dict(a=a) }}\n\n",
    "{{ strftime_now('%Y') }}{{ bos_token }}{{ missing_token }}{{ tools is none }}{{ documents }}"
    "{{ add_generation_prompt }}{{ enable_thinking is defined }}",
    "{% for m in messages %}{{ m.tool_calls is defined }}{{ m | length }}{% endfor %}",
    "{% for x in 'ab' recursive %}{{ x }}{% if loop.depth < 3 %}{{ loop('cd') }}{% endif %}"
    "{% endfor %}{{ range(5) | list | join(',') }}{{ messages | map(attribute='role') | list }}",
)


def conversations(count):
    """Random conversations, well-formed and not."""
    rng = random.Random(count)
    words = [
        *NASTY,
        "What is 2+2?",
        "</think>4",
        "<think>\nhm\n</think>\n\n4",
        " x ",
        "{{ 1 }} {% %}",
    ]
    for _ in range(count):
        messages = []
        if rng.random() < 0.4:
            messages.append({"role": "system", "content": rng.choice(words)})
        for turn in range(rng.randrange(1, 6)):
            role = ("user", "assistant")[turn % 2]
            if rng.random() < 0.05:
                role = rng.choice(("system", "tool", "assistant"))
            messages.append({"role": role, "content": "".join(rng.choices(words, k=2))})
            if rng.random() < 0.2:
                messages[-1]["tool_calls"] = None  # as some programs write it; it counts as absent
        options = {"enable_thinking": rng.random() < 0.5} if rng.random() < 0.5 else {}
        if rng.random() < 0.2:
            options["date_string"] = "26 Jul 2024"
        yield messages, rng.random() < 0.7, options


@pytest.fixture(scope="module")
def reference(parity_packages):
    """transformers' rendering of a template, None where it refuses."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)

    def render(source, messages, add_generation_prompt, options):
        try:
            return fast.apply_chat_template(
                messages, chat_template=source, tokenize=False,
                add_generation_prompt=add_generation_prompt, **options,
            )  # fmt: skip
        except Exception:
            return None

    return render


def check(reference, source, count=60):
    """Compares renderings; returns how many there were and how many were refused."""
    template = ChatTemplate(source, SPECIAL, name="this")
    refused = 0
    for messages, prompt, options in conversations(count):
        wanted = reference(source, messages, prompt, options)
        before = json.dumps(messages)
        try:
            text = template.render(messages, add_generation_prompt=prompt, options=options)
        except InputError as error:
            text, refused = None, refused + 1
            assert len(str(error).splitlines()) == 1
        assert text == wanted
        assert json.dumps(messages) == before
    assert refused < count


@pytest.mark.parametrize("name", TEMPLATES)
def test_public_template(name, shared_data, reference):
    file = shared_data / "chat_templates" / f"{name}.jinja"
    check(reference, file.read_text(encoding="utf-8"))
    assert load_chat_template(file, SPECIAL) is not None


@pytest.mark.parametrize("name", CONFIGS)
def test_template_of_a_tokenizer_config(name, shared_data, reference):
    (file,) = (shared_data / "tokenizer_qwen2").glob(f"*{name}*")
    check(reference, json.loads(file.read_text(encoding="utf-8"))["chat_template"])


@pytest.mark.parametrize("source", CONSTRUCTS)
def test_constructs(source, reference):
    check(reference, source)


def test_ids_of_a_conversation(shared_data, parity_packages):
    from transformers import AutoTokenizer

    folder = shared_data / "tokenizer_qwen2"
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    template = load_chat_template(folder, ours.special_tokens)
    assert template is not None
    for messages, prompt, _ in conversations(30):
        ids = ours.encode(template.render(messages, add_generation_prompt=prompt), special=True)
        wanted = theirs.apply_chat_template(messages, add_generation_prompt=prompt)
        assert ids == wanted["input_ids"]


USER = [{"role": "user", "content": "hi"}]


def render(source, **options):
    return ChatTemplate(source, {}, name="this").render(USER, options=options)


LOOPS = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
DOUBLE = "{{% set ns = namespace(s='a') %}}{{% for i in range(99) %}}{}{{% endfor %}}"
HARMFUL = {
    "raises": ("{{ raise_exception('no\nsystem role') }}", "this: no system role"),
    "undefined": ("{{ nothing.at.all }}", "'nothing' is undefined"),
    "type": ("{{ 1 + 'a' }}", "unsupported operand"),
    "zero": ("{{ 1 / 0 }}", "division by zero"),
    "loops": (LOOPS, "takes more than 200,000 steps"),
    "range": ("{{ range(10**9) | list }}", "Range too big"),
    "macros": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "exponential macros": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "takes more than 200,000 steps",
    ),
    "recursive loop": ("{% for x in 'ab' recursive %}{{ loop('ab') }}{% endfor %}", "recursion"),
    "product": ("{{ 'a' * 10**10 }}", "more than 10,000,000 parts"),
    "power": ("{{ 9 ** 999999999 }}", "integers of more than 10,000 bits"),
    "integers": (
        "{% set ns = namespace(i=3) %}{% for i in range(99) %}{% set ns.i = ns.i * ns.i %}"
        "{% endfor %}",
        "integers of more than 10,000 bits",
    ),
    "remainder": ("{{ 7 % ('1' * 10**6) | int(base=16) }}", "integers of more than 10,000 bits"),
    "width": ("{{ '%1000000000d' % 1 }}", "more than 10,000,000 parts"),
    "width as an argument": ("{{ '%*d' % (10**9, 1) }}", "more than 10,000,000 parts"),
    "width in a filter": ("{{ '%1000000000d' | format(1) }}", "more than 10,000,000 parts"),
    "width in a format": ("{{ '{:>1000000000}'.format(1) }}", "more than 10,000,000 parts"),
    "center": ("{{ 'x' | center(10**9) }}", "more than 10,000,000 parts"),
    "method": ("{{ 'x'.zfill(10**9) }}", "more than 10,000,000 parts"),
    "indent": ("{{ 'a\nb' | indent(10**9) }}", "more than 10,000,000 parts"),
    "json": ("{{ messages | tojson(indent=10**9) }}", "more than 10,000,000 parts"),
    "slices": ("{{ [1] | slice(10**9) | list }}", "more than 10,000,000 parts"),
    "translation": ("{{ ('a' * 10**6).translate({97: 'b' * 10**6}) }}", "10,000,000 parts"),
    "joined": ("{{ ('a' * 10**6).join([''] * 10**5) }}", "more than 10,000,000 parts"),
    "lists of lists": (
        DOUBLE.format("{% set ns.s = [ns.s, ns.s] %}").replace("99", "40") + "{{ ns.s }}", "parts"),
    "much in all": (
        "{% set x = 'a' * 10**7 %}{% for i in range(10**5) %}{{ x }}{% endfor %}",
        "makes more than 200,000,000 parts in all",
    ),
    "much in a macro": (
        "{% set x = 'a' * 10**7 %}{% macro f() %}{% for i in range(10**5) %}{{ x }}{% endfor %}"
        "{% endmacro %}{{ f() | length }}",
        "makes more than 200,000,000 parts in all",
    ),
    "links": ("{{ ('a ' * 10**6) | urlize }}", "No filter named 'urlize'"),
    "random text": ("{{ lipsum(10**6) }}", "'lipsum' is undefined"),
    "sum": (DOUBLE.format("{% set ns.s = ns.s + ns.s %}"), "more than 10,000,000 parts"),
    "concatenation": (DOUBLE.format("{% set ns.s = ns.s ~ ns.s %}"), "more than 10,000,000 parts"),
    "replace": (
        DOUBLE.format("{% set ns.s = ns.s | replace('a', 'aa') %}"), "more than 10,000,000 parts"
    ),
    "block": (
        DOUBLE.format("{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"),
        "more than 10,000,000 parts",
    ),
    "class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "mutation": ("{{ messages.append(1) }}", "unsafe"),
    "namespace": ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "underscore"),
    "include": ("{% include '/etc/passwd' %}", "loader"),
    "import": ("{% import 'os' as os %}", "loader"),
    "syntax": ("{% if %}", "not a template \\(line 1"),
    "open": ("\n{% for m in messages %}", "not a template \\(line 2"),
    "nested": ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "not a template"),
}  # fmt: skip


@pytest.mark.parametrize("case", HARMFUL)
def test_harmful_template(case):
    source, message = HARMFUL[case]
    start = time.thread_time()
    with pytest.raises(InputError, match=message) as caught:
        render(source)
    assert len(str(caught.value).splitlines()) == 1
    assert time.thread_time() - start < 10


def test_few_steps_that_take_long(monkeypatch):
    monkeypatch.setattr(sandbox, "_MAX_SECONDS", 0.5)
    with pytest.raises(InputError, match=r"takes more than 0\.5 seconds"):
        render("{% for i in range(10**5) %}{{ range(99999) | sum }}{% endfor %}")


def test_what_is_out_of_bounds_says_nothing():
    for expression in (
        "''.__class__",
        "raise_exception.__globals__",
        "messages | map(attribute='__class__') | first",
        "'{0.__class__}'.format(1)",
    ):
        assert render("{{ " + expression + " }}") == ""


def test_a_template_may_be_used_again_after_it_failed():
    template = ChatTemplate("{% for i in range(n) %}.{% endfor %}", {}, name="this")
    for _ in range(3):  # each is counted on its own
        assert len(template.render(USER, options={"n": 90_000})) == 90_000


def test_options():
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"
    template = ChatTemplate("{{ bos_token }}{{ eos_token }}", SPECIAL, name="this")
    assert template.render(USER) == "<s></s>"
    assert template.render(USER, options={"bos_token": "B"}) == "B</s>"
    with pytest.raises(InputError, match="has 'messages', which is not an option"):
        render("", messages=[])


def test_where_a_template_is_looked_for(tmp_path):
    def found(path=tmp_path):
        template = load_chat_template(path, {})
        return template and template.render(USER)

    assert found() is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    assert found() == "processor"
    write_config(tmp_path, chat_template="config\n")
    assert found() == found(tmp_path / "tokenizer.json") == found(tmp_path / "a.model") == "config"
    assert found(tmp_path / "chat_template.json") == "processor"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "named"}]
    write_config(tmp_path, chat_template=named)
    assert found() == "named"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}\n")
    assert found() == found(tmp_path / "chat_template.jinja") == "file hi"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "chat_template is a int, not text"),
        ([1], "chat_template is a list, not text"),
        ([{"name": "tool_use", "template": "t"}], r"\(tool_use\) is named default"),
        ([{"name": "default", "template": 3}], "chat_template is a int"),
        ("{% if", "tokenizer_config.json: not a template"),
    ],
)
def test_damaged_template_of_a_tokenizer(value, message, tmp_path):
    write_config(tmp_path, chat_template=value)
    with pytest.raises(InputError, match=message):
        load_chat_template(tmp_path, {})


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="none.jinja: No such file"):
        load_chat_template(tmp_path / "none.jinja", {})
    (tmp_path / "a.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        load_chat_template(tmp_path / "a.jinja", {})
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(InputError, match="has no chat_template"):
        load_chat_template(tmp_path / "a.json", {})


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im|>assistant:{% if quiet %} (quiet){% endif %}{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    """A small tokenizer with a chat template."""
    named = {"bos_token": "<|bos|>", "eos_token": "<|end|>"}
    special = ("<|bos|>", "<|im|>", "<|end|>")
    return byte_level(tmp_path / "tokenizer", special, chat_template=TEMPLATE, **named)


def parts_of(folder, tmp_path, **tokenizer):
    """The parts of a run with a tiny, random model."""
    config = base.get_config()
    config.tokenizer.update(path=str(folder), **tokenizer)
    config.model.update(num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=2, head_dim=4)
    mesh = make_mesh(parse_config(config).mesh, jax.devices()[:1])
    with mock.patch("flowrl_jax.assembly.make_mesh", lambda _: mesh):
        return assemble(parse_config(config), tmp_path)


def test_prompts_become_conversations(folder, tmp_path):
    parts = parts_of(folder, tmp_path, chat=True, system_prompt="Be brief.")
    tokenizer = parts.tokenizer
    text = "<|bos|><|im|>system: Be brief.<|end|><|im|>user: 2+2?<|end|><|im|>assistant:"
    assert encode_prompt(parts, "2+2?") == tokenizer.encode(text, special=True)
    # The template has written the opening id already.
    opened = parts_of(folder, tmp_path, chat=True, add_bos=True, chat_options={"quiet": True})
    text = "<|bos|><|im|>user: 2+2?<|end|><|im|>assistant: (quiet)"
    assert encode_prompt(opened, "2+2?") == tokenizer.encode(text, special=True)


def test_opening_id_where_the_template_writes_none(folder, tmp_path):
    other = tmp_path / "other.jinja"
    other.write_text("{{ messages[0].content }}")
    parts = parts_of(folder, tmp_path, chat=True, chat_template=str(other), add_bos=True)
    ids = parts.tokenizer.encode("hi")
    assert encode_prompt(parts, "hi") == [parts.tokenizer.bos_id, *ids]


def test_prompts_stay_as_they_are_without_chat(folder, tmp_path):
    parts = parts_of(folder, tmp_path)
    assert parts.chat is None
    assert encode_prompt(parts, "<|end|>hi") == parts.tokenizer.encode("<|end|>hi")
    assert parts.eos_ids[0] not in encode_prompt(parts, "<|end|>hi")


def test_what_does_not_fit_stops_before_anything_compiles(folder, tmp_path):
    write_config(tmp_path / "bare", eos_token="<|end|>")
    shutil.copy(folder / "tokenizer.json", tmp_path / "bare")
    with pytest.raises(InputError, match="bare has no chat template: name a file in tokenizer"):
        parts_of(tmp_path / "bare", tmp_path, chat=True)
    with pytest.raises(InputError, match="of Countdown has no chat template"):
        parts_of("", tmp_path, chat=True)
    refusing = tmp_path / "refusing.jinja"
    refusing.write_text("{{ raise_exception('no system role') if messages[0].role == 'system' }}")
    with pytest.raises(InputError, match="refusing.jinja: no system role; change the conversation"):
        parts_of(folder, tmp_path, chat=True, system_prompt="x", chat_template=str(refusing))
    for name, value in (("system_prompt", "x"), ("chat_template", "x"), ("chat_options", {"a": 1})):
        with pytest.raises(InputError, match=f"tokenizer.{name}=.* set tokenizer.chat=True"):
            parts_of(folder, tmp_path, **{name: value})


def test_options_on_the_command_line():
    overrides = {"tokenizer.chat": "True", "tokenizer.chat_options.enable_thinking": "False"}
    config = parse_config(load_config("configs/base.py", overrides))
    assert config.tokenizer.chat_options == {"enable_thinking": False}


@pytest.mark.parametrize("name", ["math_7b", "math_32b", "code_7b"])
def test_released_runs_talk_to_the_model(name):
    assert parse_config(load_config(f"configs/{name}.py", {})).tokenizer.chat

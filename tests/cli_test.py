"""Command lines: config files, settings on the command line, exit codes and one-line mistakes."""

import pytest
from absl import flags

from flowrl_jax import cli, evaluate, sample, sft, train
from flowrl_jax.errors import InputError

CONFIG = """
import ml_collections
def get_config(size="small"):
    config = ml_collections.ConfigDict()
    config.size = {"small": 1, "large": 9}[size]
    config.rate = 0.5
    config.name = "n"
    config.sure = True
    config.ids = (1, 2)
    config.absent = None
    config.part = {"options": {"known": 3}, "value": 4}
    return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


VALUES = [
    ("size", "5", 5),
    ("rate", "5", 5.0),
    ("rate", "1e-3", 1e-3),
    ("name", "5", "5"),
    ("name", "a=b", "a=b"),
    ("name", "", ""),
    ("sure", "False", False),
    ("sure", "true", True),
    ("ids", "(3,)", (3,)),
    ("ids", "[3, 4]", (3, 4)),
    ("ids", "7", (7,)),
    ("ids", "()", ()),
    ("absent", "text", "text"),
    ("absent", "None", None),
    ("part.value", "8", 8),
    ("part.options.known", "8", 8),
    ("part.options.new", "8", 8),
    ("part.options.new", "(1, 2)", (1, 2)),
    ("part.options.new", "train.jsonl", "train.jsonl"),
]


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_a_text_is_read_as_the_type_it_replaces(file, name, text, value):
    config = cli.load_config(file, {name: text})
    for part in name.split("."):
        config = config[part]
    assert config == value and type(config) is type(value)


def test_an_options_section_can_be_replaced(file):
    config = cli.load_config(file, {"part.options": "{'other': 1}"})
    assert config.part.options.to_dict() == {"other": 1}


def test_argument_of_a_config_file(file):
    assert cli.load_config(file, {}).size == 1
    assert cli.load_config(f"{file}:large", {}).size == 9


WRONG_SETTINGS = [
    ("sise", "5", "--config.sise=5: config has no field 'sise'; did you mean 'size'?"),
    ("part.vale", "5", "config.part has no field 'vale'; did you mean 'value'?"),
    ("prt.value", "5", "config has no field 'prt'; did you mean 'part'?"),
    ("size.value", "5", "config.size is a single setting; write --config.size=5"),
    ("size", "1.5", "--config.size=1.5 is not an integer"),
    ("size", "many", "--config.size=many is not an integer"),
    ("rate", "fast", "--config.rate=fast is not a number"),
    ("sure", "maybe", "--config.sure=maybe is not a truth value: give True or False"),
    ("part", "5", "--config.part=5 replaces a section"),
    ("", "5", "config has no field ''"),
]


@pytest.mark.parametrize(("name", "text", "message"), WRONG_SETTINGS)
def test_wrong_settings(file, name, text, message):
    with pytest.raises(InputError) as caught:
        cli.load_config(file, {name: text})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


WRONG_FILES = {
    "syntax": ("def get_config(:\n", "line 1: SyntaxError: invalid syntax"),
    "no function": ("x = 1\n", "has no function get_config()"),
    "import": ("import nothere\n", "line 1: ModuleNotFoundError: No module named 'nothere'"),
    "fault": ("\ndef get_config():\n    return 1 / 0\n", "line 3: ZeroDivisionError: division by"),
    "name": ("get_config = lambda: nothing\n", "line 1: NameError"),
    "nothing": ("def get_config(): pass\n", "gives a NoneType; return a ConfigDict"),
    "lines": ("raise ValueError('one\\ntwo')\n", "ValueError: one two; mend the file"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files(tmp_path, case):
    text, message = WRONG_FILES[case]
    path = tmp_path / "wrong.py"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        cli.load_config(str(path), {})
    assert message in str(caught.value) and "wrong.py" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_argument(file, tmp_path):
    with pytest.raises(InputError, match="does not know 'medium'"):
        cli.load_config(f"{file}:medium", {})
    plain = tmp_path / "plain.py"
    plain.write_text("def get_config(): pass")
    with pytest.raises(InputError, match="takes no argument"):
        cli.load_config(f"{plain}:large", {})
    with pytest.raises(InputError, match="no file .*none.py"):
        cli.load_config(f"{tmp_path}/none.py:large", {})


def test_a_config_file_imports_its_neighbours(tmp_path):
    """From wherever the command is started: a peer's command line works in its own folder only."""
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "common.py").write_text(CONFIG)
    (folder / "mine.py").write_text(
        "from experiments import common\nget_config = lambda: common.get_config('large')\n"
    )
    assert cli.load_config(str(folder / "mine.py"), {}).size == 9


def test_settings_are_taken_out_of_the_command_line():
    words, settings = cli.split_overrides(
        ["--config=c.py", "--config.a.b=1=2", "--resume", "--config.c", "3", "-config.a.b=4"]
    )
    assert words == ["--config=c.py", "--resume"]
    assert settings == {"a.b": "4", "c": "3"}
    with pytest.raises(InputError, match="--config.c has no value"):
        cli.split_overrides(["--config.c"])


def values():
    made = cli.config_flag_values("A command.")
    flags.DEFINE_string("workdir", "here", "folder", flag_values=made)
    return made


def run(main, *arguments, monkeypatch):
    # What becomes of a config is config_test's business.
    monkeypatch.setattr(cli, "parse_config", lambda config: config)
    return cli.run(main, values(), arguments)


def test_main_gets_config_and_flags(file, monkeypatch):
    seen = []
    main = lambda config, values: seen.append((config.size, values["workdir"].value))  # noqa: E731
    arguments = [f"--config={file}", "--config.size=3", "--workdir=there"]
    assert run(main, *arguments, monkeypatch=monkeypatch) == 0
    assert seen == [(3, "there")]


def never(config, values):
    raise AssertionError("a wrong command line must not get here")


WRONG_LINES = {
    "unknown flag": (["--workdr=x"], "Unknown command line flag 'workdr'"),
    "unknown flag before a setting": (["--confg.a=x"], "Unknown command line flag 'confg.a'"),
    "stray word": (["x"], "argument 'x' is not a flag"),
    "no file": (["--config=none.py"], "no file none.py"),
    "setting": (["--config.sise=x"], "did you mean 'size'?"),
}


@pytest.mark.parametrize("case", WRONG_LINES)
def test_wrong_lines(file, case, capsys, monkeypatch):
    arguments, message = WRONG_LINES[case]
    assert run(never, f"--config={file}", *arguments, monkeypatch=monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and message in err
    assert err.count("\n") == 1


def test_config_is_needed(capsys, monkeypatch):
    assert run(never, monkeypatch=monkeypatch) == 2
    assert "--config is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("steps=0:\n too few"), 2, "error: steps=0: too few\n"),
        (cli.Alarmed("alarm at step 3: kl: far"), 3, "stopped: alarm at step 3: kl: far\n"),
        (cli.Preempted("saved step 3"), 75, "preempted: saved step 3\n"),
    ],
)
def test_exit_codes(file, error, code, line, capsys, monkeypatch):
    def main(config, values):
        raise error

    assert run(main, f"--config={file}", monkeypatch=monkeypatch) == code
    assert capsys.readouterr().err == line


def test_a_fault_is_not_dressed_up(file, monkeypatch):
    def main(config, values):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run(main, f"--config={file}", monkeypatch=monkeypatch)


@pytest.mark.parametrize("module", [train, sft, evaluate, sample])
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help(module, word, capsys):
    assert module.main([word]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "--config=FILE" in out
    # Every flag of the command is explained.
    for flag in {train: ("resume", "workdir"), sft: ("workdir",), evaluate: ("run", "out", "json"),
                 sample: ("prompts", "n", "top_p", "max_tokens")}[module]:  # fmt: skip
        assert f"--{flag}: " in out

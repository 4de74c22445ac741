import subprocess
import sys

import pytest
import typer

from ctsft.cli.console import printable
from ctsft.cli.main import literal

COMMANDS = ("tune", "compare", "export", "inspect", "sample")


def test_help_is_quick():
    """Neither the command line nor its help needs the seconds that torch and peft take."""
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom ctsft.cli.main import app\n"
        f"for command in {COMMANDS}: assert CliRunner().invoke(app, [command, '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'peft', 'transformers', 'datasets', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_an_example(ctsft, command):
    code, out, _ = ctsft(command, "--help")
    assert code == 0
    assert f"Example: ctsft {command}" in out


def test_no_command_shows_the_help(ctsft):
    code, out, _ = ctsft()
    assert code in (0, 2)
    assert all(command in out for command in COMMANDS)


def test_brackets_in_a_help_text_are_no_markup(ctsft):
    assert "pip install 'ctsft[ray]'" in ctsft("lab", "run", "--help")[1]


def test_all_texts_of_all_commands_are_literal():
    app = typer.Typer(help="[a]")
    app.command(epilog="[b]", short_help="[c]")(lambda one: None)
    below = typer.Typer(help="[d]")
    option = typer.Option("", help="[f]")
    below.command("two", help="[e]")(lambda one=option: None)
    app.add_typer(below, name="below")
    whole = literal(typer.main.get_command(app))
    one, group = whole.commands.values()
    two = group.commands["two"]
    texts = [whole.help, one.epilog, one.short_help, group.help, two.help, two.params[0].help]
    assert texts == [rf"\[{letter}]" for letter in "abcdef"]


def test_printable_keeps_text_and_drops_control():
    assert printable("a\tä\n\N{SNOWMAN}") == "a\tä\n\N{SNOWMAN}"
    assert printable("\x1b[31mred\x07\r") == "\N{REPLACEMENT CHARACTER}[31mred" + "\N{REPLACEMENT CHARACTER}" * 2


def test_an_unknown_option_and_a_word_for_a_number(ctsft):
    for args in (("tune", "--colour", "red"), ("tune", "--steps", "many"), ("dance",)):
        code, out, err = ctsft(*args)
        assert (code, out) == (2, "")
        assert "Usage: ctsft" in err and "Traceback" not in err

"""Options: answered before torch is imported, in one line, with what was meant."""

import os
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from dataclasses import fields
from pathlib import Path

import pytest

from cli import options
from cli.arguments import RANK0_SECONDS, amount, documents, percentage, token_bias
from layers.args import DTYPES
from load import CACHE_BITS
from neurons.records import KINDS
from options.settings import SELF_DRAFTS
from quant.linear import GROUP_SIZES, HEADS, MODES
from speculate import SELF_BITS
from text.generation_config import GenerationConfig

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = "generate.py", "eval.py", "quantize.py", "flash.py"


def command(script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    given = [sys.executable, str(ROOT / script), *args]
    return subprocess.run(given, capture_output=True, text=True, env=os.environ | env)


def test_names_are_those_of_the_modules_that_define_them():
    assert tuple(DTYPES) == options.DTYPES
    assert tuple(CACHE_BITS) == options.CACHES
    assert tuple(SELF_BITS) == SELF_DRAFTS
    assert (MODES, HEADS, GROUP_SIZES) == (options.MODES, options.HEADS, options.GROUP_SIZES)
    assert KINDS == options.NEURONS


def test_each_field_of_the_generation_config_is_an_option():
    given = vars(options.parse_args([]))
    assert {field.name for field in fields(GenerationConfig)} <= given.keys()
    assert all(given[field.name] is None for field in fields(GenerationConfig))


def started(script: str, option: str) -> subprocess.CompletedProcess:
    """A command that prints, when it ends, its exit code and whether torch was imported."""
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['{script}', '{option}']\n"
        f"sys.path.insert(0, '{ROOT}')\n"
        f"try: runpy.run_path('{ROOT / script}', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("script", COMMANDS)
def test_a_wrong_option_is_one_line_and_torch_is_not_imported(script: str):
    done = started(script, "--abacus")
    assert done.stdout.split() == ["2", "False"]
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"{script}: ")


@pytest.mark.parametrize("script", COMMANDS)
def test_help_does_not_import_torch(script: str):
    done = started(script, "--help")
    assert "--quiet" in done.stdout and done.stdout.split()[-2:] == ["0", "False"]


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--tempreture", "0"], "did you mean --temperature?"),
        (["--max_new_token_s", "3"], "did you mean --max_new_tokens?"),
        (["--Max-New-Tokens=3"], "did you mean --max_new_tokens?"),
        (["Once", "upon"], "a text with blanks needs quotes"),
        (["--dtype", "bf16"], "invalid choice: 'bf16'"),
        (["--percent", "nan", "0", "100", "0", "100", "0"], "nan is not from 0 to 100"),
        (["--logit_bias", "5"], "5 is not ID=BIAS"),
        (["--logprobs", "2"], "--logprobs needs --output"),
        (["--prompt", "a", "--prompt_file", "b"], "--prompt or --prompt_file, not both"),
        (["--model", "a/b", "--random_weights", "c"], "not both"),
        (["--revision", "main"], "--revision needs --checkpoint_path"),
        (["--host_memory", "4GB"], "--host_memory needs --offload or --percent or --plan"),
    ],
)
def test_a_mistake_is_one_line(args: list[str], expected: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped:
        options.parse_args(args)
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert expected in line and line.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        "--percent 100 0 100 0 100 0 --draft self-int8",  # all on the device: nothing is offloaded
        "--offload auto --draft self-int8",
        "--offload auto --flash",
        "--plan --pipeline --compile",
        "--plan --draft self-int8",
    ],
)
def test_what_only_a_plan_can_decide_is_left_to_it(line: str):
    assert options.parse_args(line.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--pipeline", "--pipeline needs ranks"),
        ("--compile_prefill --bench --interactive", "--compile_prefill needs --compile"),
        ("--micro_batches 2", "--micro_batches needs --pipeline"),
    ],
)
def test_rules_of_a_loaded_model_are_checked_before_torch(
    line: str, message: str, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit):
        options.parse_args(line.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["text", "0", "-4", "\u00b2", "\u0664", "4.0"])
def test_bench_takes_a_number_of_tokens(prompt: str, capsys: pytest.CaptureFixture):
    assert options.parse_args(["--bench"]).prompt is None
    assert options.parse_args(["--bench", "--prompt", "4"]).prompt == ["4"]
    with pytest.raises(SystemExit):
        options.parse_args(["--bench", f"--prompt={prompt}"])
    assert "one number of tokens" in capsys.readouterr().err


def test_hyphens_are_as_good_as_underscores():
    args = options.parse_args(["--max-new-tokens", "7", "--top-p=0.5", "--prompt", "a-b--c"])
    assert (args.max_new_tokens, args.top_p, args.prompt) == (7, 0.5, ["a-b--c"])
    assert options.parse_eval_args(["--perplexity", "x", "--batch-size", "auto"]).batch_size is None


def test_a_text_that_looks_like_an_option_stays_as_it_is():
    assert options.parse_args(["--prompt", "--a well-known fact"]).prompt == ["--a well-known fact"]


def test_another_rank_gives_rank_0_time_to_tell_of_a_mistake():
    """torchrun ends the others once rank 0 has failed; see also test_ranks.py."""
    assert command("generate.py", "--abacus", RANK="0").stderr
    assert len(command("generate.py", "--abacus", RANK="").stderr.splitlines()) == 1
    start = time.monotonic()
    done = command("generate.py", "--abacus", RANK="1")
    assert done.returncode == 2 and "--abacus" in done.stderr
    assert time.monotonic() - start >= RANK0_SECONDS


def test_chat_is_implied_by_a_system_message():
    assert options.parse_args(["--system", "Be brief."]).chat
    assert not options.parse_args(["--system", "Be brief.", "--interactive"]).chat
    assert options.parse_args(["--chat_template_kwargs", '{"thinking": false}']).chat


def test_the_version_names_the_parts():
    done = command("generate.py", "--version")
    assert done.returncode == 0 and "gpt-flex" in done.stdout and "torch 2" in done.stdout


def test_kinds_of_numbers():
    assert documents("0.1") == 0.1 and documents("3") == 3 and isinstance(documents("1"), int)
    assert percentage("12.5") == 12.5
    assert amount("100%") == 1 and amount("1k") == 1000
    assert token_bias("29=-1.5") == (29, -1.5) and token_bias("0=-inf") == (0, -1e9)
    for kind, texts in (
        (documents, ("0", "1.5", "nan", "inf", "-1")),
        (percentage, ("nan", "-1", "101", "inf")),
        (token_bias, ("a=1", "-1=2", "3", "3=", "3=nan")),
        (amount, ("0%", "101%", "0.5", "1", "1B")),
    ):
        for text in texts:
            with pytest.raises(ArgumentTypeError, match=text):
                kind(text)

"""The options of generate.py, eval.py, quantize.py and flash.py, and the checks of combinations.

Functions that add options take `add`, the add_argument of a parser or of one of its groups. A local
variable `help` is the help text of the option that follows. Words of the options: a draft proposes
tokens that the model verifies; a placed model has parts on device, host and disk, by a plan; ranks
are the processes that torchrun starts.

Start at parse_args, which parses the options of generate.py. Nothing here imports torch, so that
--help and a wrong option are answered at once. Choices that modules with torch define are therefore
repeated here as names; tests/test_options.py compares them with the originals.
"""

import argparse
import importlib.metadata
import os
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from cli.arguments import (
    Parser,
    amount,
    count,
    count_or_auto,
    documents,
    json_object,
    nbytes,
    pair,
    percentage,
    positive,
    rows_or_auto,
    share,
    text_length,
    token_bias,
    window,
)
from options.rules import MODEL_RULES, OPTION_RULES, PLACING, Excludes, Needs, broken_rule
from options.settings import DRAFTS, MAX_DRAFT_TOKENS
from text.generation_config import GenerationConfig
from tiers.links import LINKS

# Values of --dtype, --kv_dtype, quantize.py's --mode, --head and --groupsize, flash.py's --neurons.
DTYPES = "bfloat16", "float16", "float32"
CACHES = "int8", "int4"
MODES = "int8", "int4", "int4-gptq"
HEADS = "int8", "int4", "dense"
GROUP_SIZES = 32, 64, 128, 256
NEURONS = "dense", "int8", "int4"
TIERED = "weights", "cache", "activations"  # each has two numbers of --percent

Add = Callable[..., Any]  # the add_argument of a parser or of a group of its options


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of generate.py. argv: the arguments; None: those of the process.

    A sampling option that the user did not give is None, so that the model's generation_config.json
    can provide it. Ends the process if options are wrong or do not go together.
    """
    parser = new_parser("generate.py", "Generate text with an open language model.")
    for title, add_options in GROUPS.items():
        add_options(parser.add_argument_group(title).add_argument)
    args = parser.parse_args(argv)
    args.stop = tuple(args.stop) or None  # None: not given
    args.logit_bias = args.logit_bias or None
    implies_chat = args.system or args.chat_template_kwargs
    args.chat = args.chat or bool(implies_chat and not args.interactive)
    if args.compress_cache:
        args.kv_dtype = "int4"
    check_rules(parser, vars(args), OPTION_RULES)
    if not args.plan:
        # Rules about `placed` and `self_draft`, which are no options, are skipped here; load_model
        # applies them: only a plan tells whether the model is placed.
        check_rules(parser, vars(args) | {"ranks": several_processes()}, MODEL_RULES)
    check_values(parser, args)
    return args


def new_parser(prog: str, description: str) -> Parser:
    """Returns a parser with the options that all commands have: --version and --quiet, and with
    --help. prog: the command's name, such as eval.py. description: a sentence for --help."""
    parser = Parser(prog=prog, usage=f"{prog} [options]", description=description)
    parser.add_argument("--version", action=Version, help="versions of this program and its parts")
    help = "only the text, the result and what went wrong: no log lines, no progress bars"
    parser.add_argument("--quiet", action="store_true", help=help)
    return parser


class Version(argparse.Action):
    """The action of --version: print the versions of this program, torch and tokenizers, and exit.

    Not argparse's own action, which takes a finished text: finding the versions starts git.
    """

    def __init__(self, **options: Any):
        super().__init__(nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the versions; this program's version is the commit of its git repository."""
        # Describes the commit by the nearest tag or its hash, and whether files have changed.
        git = [
            "git",
            "-C",
            str(Path(__file__).resolve().parent.parent),
            "describe",
            "--always",
            "--dirty",
        ]
        try:
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        except OSError:  # no git on this machine
            commit = ""
        parts = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "tokenizers"))
        print(f"gpt-flex {commit or '(commit unknown)'}, {', '.join(parts)}")
        parser.exit()


def text_options(add: Add) -> None:
    """Add options that choose the model, the prompts and the output, and chat: --interactive."""
    help = "a local path, or a repository of huggingface.co, ORG/NAME (default: the demo model)"
    add("--model", "--checkpoint_path", dest="checkpoint_path", metavar="PATH_OR_ID", help=help)
    add("--revision", help="branch, tag or commit of a repository (default: main)")
    help = "text to continue; repeatable (with --bench or --random_weights: a number of tokens)"
    add("--prompt", action="append", help=help)
    help = "the prompt is the text of this file; without any of these it is read from a pipe"
    add("--prompt_file", type=Path, metavar="FILE", help=help)
    add("--prompts", type=Path, metavar="FILE", help="many: .txt, one per line, or .jsonl")
    add("--output", type=Path, metavar="FILE.jsonl", help="results; a rerun does what is missing")
    add("--num_samples", type=positive, default=1, help="texts for each prompt")
    add("--batch_size", type=positive, help="rows at a time (default: 16 at most; --bench: 1)")
    add("--interactive", action="store_true", help="chat in the terminal")
    add("--chat", action="store_true", help="prompts are messages: apply the chat template")
    add("--system", help="system message for --interactive or --chat; implies --chat")
    help = 'variables of the chat template, as {"enable_thinking": false}; implies --chat'
    add("--chat_template_kwargs", type=json_object, default={}, metavar="JSON", help=help)


def sampling_options(add: Add) -> None:
    """Add one option for each field of GenerationConfig, in its order and with its type.

    A field with the default False becomes a flag, a number an option with a number; SPECIAL_OPTIONS
    has the options for other fields. The defaults in the help are those of GenerationConfig; a
    number or flag that is not given is None in the parsed options.
    """
    for field in fields(GenerationConfig):
        name, help = f"--{field.name}", GENERATION_HELP[field.name]
        if field.name in SPECIAL_OPTIONS:
            add(name, help=help, **SPECIAL_OPTIONS[field.name])
        elif field.default is False:
            add(name, action="store_true", default=None, help=help)
        else:
            add(name, type=type(field.default), help=f"{help} (default: {field.default})")


# Field of GenerationConfig -> arguments of add_argument, for fields that are no number and no flag,
# or whose default is None.
SPECIAL_OPTIONS: dict[str, dict[str, Any]] = {
    "stop": {"action": "append", "default": [], "metavar": "TEXT"},
    "logit_bias": {
        "action": "append",
        "default": [],
        "type": token_bias,
        "metavar": "ID=BIAS",
    },
    "logprobs": {"type": int, "metavar": "N"},
}
GENERATION_HELP = {
    "max_new_tokens": "most tokens to add to each prompt",
    "temperature": "0: always the likeliest token",
    "top_k": "draw among the k likeliest; 0: all",
    "top_p": "draw among the likeliest that have this probability together",
    "min_p": "drop what is less than min_p times as likely as the likeliest",
    "repetition_penalty": "above 1: tokens of prompt and answer become less likely",
    "frequency_penalty": "subtracted from a token's logit for each time the answer has it",
    "presence_penalty": "subtracted from a token's logit if the answer has it",
    "logit_bias": "added to a token's logit; repeatable",
    "logprobs": "log probabilities in --output: of each token, and of the N likeliest",
    "seed": "of the random draws",
    "stop": "end a text before this string; repeatable",
    "ignore_eos": "go on after the end-of-text token",
}


def device_options(add: Add) -> None:
    """Add options of the device, the dtypes and compilation to generate.py."""
    add("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)")
    add("--threads", type=positive, metavar="N", help="of the CPU (default: the free cores)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: as stored")
    add("--kv_dtype", choices=CACHES, help="KV cache (default: as the model)")
    add("--compile", action="store_true", help="compile decoding")
    add("--compile_prefill", action="store_true", help="compile prefill too; needs --compile")


def draft_options(add: Add) -> None:
    """Add options of speculative decoding."""
    help = "a small model that drafts tokens, same tokenizer: a path or a repository"
    add("--draft_checkpoint_path", metavar="PATH_OR_ID", help=help)
    add("--draft", choices=DRAFTS, help="draft from the text itself, or by the model in fewer bits")
    help = f"draft tokens at a time, up to {MAX_DRAFT_TOKENS}, or auto: as many as pay (default)"
    add("--speculate_k", type=count_or_auto, default="auto", help=help)


def rank_options(add: Add) -> None:
    """Add options of pipeline parallelism."""
    help = "layers on ranks, one after the other, in place of a share of each"
    add("--pipeline", action="store_true", help=help)
    add("--micro_batches", type=positive, help="batches that are under way in a pipeline")


def offload_options(add: Add) -> None:
    """Add options of offloading. Those that go with --percent have FlexGen's names."""
    add("--offload", choices=["auto"], help="place model and cache on device, host and disk")
    add("--plan", action="store_true", help="say where and how fast, and do no more")
    add("--link", choices=LINKS, help="with --plan: and on 1 to 64 devices that are joined by it")
    help = "with --link: what each device reads a second, 2TB (default: what this one does)"
    add("--read_rate", type=nbytes, metavar="BYTES", help=help)
    add("--device_memory", type=nbytes, metavar="BYTES", help="6GB: the most it may take")
    add("--host_memory", type=nbytes, metavar="BYTES", help="the same of the host's")
    add("--offload_dir", type=Path, default=Path("offload"), help="on the disk to be used")
    help = "by hand: weights, cache, activations on device and in host memory; the rest on disk"
    names = "WG", "WC", "CG", "CC", "AG", "AC"
    add("--percent", type=percentage, nargs=6, metavar=names, help=help)
    add("--gpu_batch_size", type=positive, help="rows that a layer takes at once, by hand")
    add("--num_gpu_batches", type=positive, default=1, help="of them that share a layer's weights")
    add("--compress_weight", action="store_true", help="round weights to 4 bits, group size 64")
    add("--compress_cache", action="store_true", help="the KV cache to 4 bits")
    add("--cpu_cache_compute", action="store_true", help="attend on the host to a cache there")
    help = "with --cpu_cache_compute: of how many tokens values count"
    add("--attn_sparsity", type=share, default=1.0, help=help)
    add("--pin_weight", type=int, choices=[0, 1], default=1, help="pin host memory (default: 1)")
    add("--overlap", type=int, choices=[0, 1], default=1, help="copy while computing (default: 1)")


def flash_options(add: Add) -> None:
    """Add options of --flash, which reads the neurons of a ReLU model from disk."""
    add("--flash", action="store_true", help="read the neurons that a token needs; see flash.py")
    help = "weights in memory: 50%% of them, or 4GB (default: 50%%)"
    add("--dram_budget", type=amount, help=help)
    help = "tokens whose neurons stay (default: as many as pay)"
    add("--flash_window", type=window, metavar="N", help=help)
    add("--flash_threads", type=positive, help="reads at a time (default: as many as pay)")
    add("--flash_dir", type=Path, help="where flash.py wrote (default: beside the checkpoint)")


def bench_options(add: Add) -> None:
    """Add options of measurements."""
    add("--bench", action="store_true", help="time prefill of --prompt N (default: 512) and decode")
    add("--repeats", type=positive, default=5, help="of --bench (default: 5)")
    add("--json", action="store_true", help="print --bench's figures as a line of JSON")
    add("--profile", type=Path, metavar="FILE", help="write a trace of the run")
    add("--random_weights", type=Path, metavar="CONFIG.json", help="a shape without a checkpoint")
    add("--random_mode", choices=["int8", "int4"], help="quantise what --random_weights makes")


# Title of a group in generate.py's --help -> function that adds the options of this group.
GROUPS = {
    "model and prompts": text_options,
    "how to continue a text (defaults of a model's generation_config.json come first)": (
        sampling_options
    ),
    "device and precision": device_options,
    "several tokens at a time, by a draft": draft_options,
    "models larger than memory (docs/offload.md)": offload_options,
    "ReLU models read from disk (docs/flash.md)": flash_options,
    "several processes (torchrun)": rank_options,
    "measurements": bench_options,
}


def several_processes() -> bool:
    """Returns whether torchrun has started several processes, by WORLD_SIZE, which it sets. A
    malformed number counts as yes: join_process_group reports it."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def is_placed(args: argparse.Namespace) -> bool:
    """Returns whether options of generate.py ask for a plan of where the model's parts lie: see
    PLACING."""
    return any(getattr(args, name) for name in PLACING)


def check_rules(
    parser: argparse.ArgumentParser, chosen: Mapping[str, Any], rules: Iterable[Needs | Excludes]
) -> None:
    """Ends the process with an error if the chosen options break one of the rules.

    chosen: name of an option or feature -> its value, see broken_rule in options/rules.py.
    """
    if message := broken_rule(chosen, rules):
        parser.error(message)


def check_values(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the process with an error if values of generate.py's options do not go together.

    Rules that only ask whether an option is given are in options/rules.py. These are about values,
    such as a number as --prompt, a default that counts as not given, and the sums of --percent.
    """
    for broken, message in (
        (
            args.speculate_k != "auto" and not (args.draft or args.draft_checkpoint_path),
            "--speculate_k needs --draft or --draft_checkpoint_path",
        ),
        (
            args.bench and args.prompt and not (len(args.prompt) == 1 and is_count(args.prompt[0])),
            "--bench takes one number of tokens as --prompt",
        ),
        (
            args.attn_sparsity < 1 and not args.cpu_cache_compute,
            "--attn_sparsity needs --cpu_cache_compute",
        ),
        (
            args.logprobs is not None and not args.output,
            "--logprobs needs --output, to which they are written",
        ),
    ):
        if broken:
            parser.error(message)
    percent = args.percent or [0] * 6  # two numbers for each of TIERED: device, host
    for what, *shares in zip(TIERED, percent[::2], percent[1::2], strict=True):
        if sum(shares) > 100 + 1e-9:  # 1e-9: sums of decimals are not exact
            parser.error(f"--percent: {sum(shares):g} % of the {what} is more than there is")


def is_count(text: str) -> bool:
    """Returns whether a text is a number above 0 in ASCII digits."""
    return text.isascii() and text.isdecimal() and int(text) > 0


def parse_eval_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of eval.py. argv: the arguments; None: those of the process.

    Ends the process if options are wrong or do not go together.
    """
    parser = new_parser("eval.py", "How good a model is: perplexity of a text, or lm_eval's tasks.")
    add = parser.add_argument
    help = "a path, or a repository of huggingface.co, ORG/NAME (default: the demo model)"
    add("--model", "--checkpoint_path", dest="checkpoint_path", metavar="PATH_OR_ID", help=help)
    add("--revision", help="branch, tag or commit of a repository (default: main)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--perplexity", type=Path, metavar="FILE", help="of a text file")
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="of lm_eval, or in --include_path")
    help = "tokens read at once (default: the context; of --perplexity at most 2048)"
    add("--max_seq_length", type=positive, help=help)
    help = "tokens from a window's beginning to the next one's (default: no overlap)"
    add("--stride", type=positive, help=help)
    help = "rows, or auto: as many as are fast (default: auto)"
    add("--batch_size", type=rows_or_auto, help=help)
    help = "the first documents of a task, or windows; below 1 a share of them: not a score"
    add("--limit", type=documents, help=help)
    add("--num_fewshot", type=int, help="examples before each document (default: the task's)")
    add("--apply_chat_template", action="store_true", help="ask as in a chat")
    add("--system", help="system message for --apply_chat_template")
    add("--gen_kwargs", help="for tasks that generate: max_gen_toks=256,temperature=0")
    add("--include_path", type=Path, help="a directory of more tasks, such as scripts/tasks")
    help = "the files of scripts/tasks: hellaswag_local=FILE"
    add("--task_data", nargs="+", default=[], metavar="TASK=PATH", type=pair, help=help)
    add("--no_bos", action="store_true", help="put no BOS before texts")
    add("--output", type=Path, metavar="FILE.json", help="the results, with how they were made")
    add("--log_samples", action="store_true", help="and each document: FILE.TASK.jsonl")
    help = "keep tasks' answers: an interrupted run goes on from there"
    add("--use_cache", type=Path, metavar="FILE", help=help)
    add("--compile", action="store_true", help="compile the model")
    add("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)")
    add("--threads", type=positive, metavar="N", help="of the CPU (default: the free cores)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: as stored")
    add("--kv_dtype", choices=CACHES, help="KV cache (default: as the model)")
    args = parser.parse_args(argv)
    check_rules(parser, vars(args), OPTION_RULES)
    return args


def parse_quantize_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of quantize.py. argv: the arguments; None: those of the process.

    Ends the process if options are wrong or do not go together. The default of --groupsize is None
    until it is certain that int8, which has no groups, was given none; then it becomes 32.
    """
    parser = new_parser("quantize.py", "Write a checkpoint with int8 or int4 weights beside it.")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, or a directory")
    add("--mode", choices=MODES, default="int8", help="(default: int8)")
    sizes = ", ".join(map(str, GROUP_SIZES))
    add("--groupsize", type=int, help=f"inputs to a scale, of int4: {sizes} (default: 32)")
    add("--head", choices=HEADS, default="int8", help="the output head (default: int8)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--calibration_file", type=Path, metavar="TEXT", help="text for GPTQ")
    text.add_argument("--calibration_tasks", nargs="+", help="lm_eval tasks whose text GPTQ takes")
    add("--calibration_seq_length", type=text_length, default=2048, help="tokens of a text (2048)")
    add("--calibration_samples", type=positive, default=128, help="texts at most (128)")
    help = "of training after GPTQ (default: 250 for models of up to 10,000,000 weights, else 0)"
    add("--train_steps", type=int, metavar="N", help=help)
    add("--no_act_order", action="store_true", help="GPTQ: take columns as they come")
    add("--device", default="auto", help="for GPTQ: auto, cuda, cuda:N or cpu (default: auto)")
    add("--threads", type=positive, metavar="N", help="of the CPU (default: the free cores)")
    args = parser.parse_args(argv)
    if args.mode == "int4-gptq" and not (args.calibration_file or args.calibration_tasks):
        parser.error("--mode int4-gptq needs --calibration_file TEXT or --calibration_tasks")
    if args.train_steps is not None and (args.train_steps < 0 or args.mode != "int4-gptq"):
        parser.error("--train_steps is 0 or more, and for --mode int4-gptq")
    if args.groupsize is not None and args.mode == "int8":
        parser.error("--groupsize is for int4: --mode int8 has one scale for each output")
    args.groupsize = args.groupsize or 32
    return args


def parse_flash_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of flash.py. argv: the arguments; None: those of the process. Ends the
    process if options are wrong."""
    parser = new_parser("flash.py", "Write a ReLU model's neurons for --flash to read.")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, or a directory")
    add("--flash_dir", type=Path, help="where to write (default: beside the checkpoint)")
    add("--neurons", choices=NEURONS, default="dense", help="their weights (default: dense)")
    add("--groupsize", type=int, choices=GROUP_SIZES, default=64, help="of int4 (default: 64)")
    add("--sector", type=positive, default=512, help="bytes that the disk reads (default: 512)")
    add("--calibration_file", type=Path, metavar="TEXT", help="text to learn from")
    add("--calibration_seq_length", type=text_length, default=512, help="tokens of a text (512)")
    add("--calibration_samples", type=positive, default=64, help="texts at most (64)")
    add("--rank", type=positive, help="of the predictors (default: the width over 32)")
    add("--recall", type=share, default=0.97, help="of active neurons to be found (default: 0.97)")
    help = "of training predictors; 0: as they are drawn (default: 4)"
    add("--epochs", type=count, default=4, help=help)
    add("--device", default="auto", help="to learn on: auto, cuda, cuda:N or cpu (default: auto)")
    add("--threads", type=positive, metavar="N", help="of the CPU (default: the free cores)")
    return parser.parse_args(argv)

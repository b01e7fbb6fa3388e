"""The table of options that need or exclude one another, for the commands and load_model.

Start at broken_rule. Rules contain names of options, and of three features: `placed` (the model has
a policy that offloads it, which load_model knows and the command line does not), `self_draft` (the
draft is the model itself in fewer bits), `ranks` (torchrun has started several processes). `chosen`
maps such names to values; a false value means that the option or feature is not used. A draft
proposes tokens that the model verifies.
OPTION_RULES hold for the parsed options of a command, MODEL_RULES for a model that is to be loaded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PLACING = "offload", "percent", "plan"  # options that make a plan of where a model's parts lie


@dataclass(frozen=True)
class Needs:
    """The rule that `option` works only together with one of the options `any_of`.

    message: the error; "": a message that names the options. `chosen` in the methods: see the
    file's docstring.
    """

    option: str
    any_of: tuple[str, ...]
    message: str = ""

    def broken(self, chosen: Mapping[str, Any]) -> bool:
        """Returns whether `option` is used without any of `any_of`.

        The rules serve all commands and load_model, each of which has only some of the options. So
        the rule is not broken if `chosen` has none of the names `any_of`: generate.py, for example,
        has --system and no --apply_chat_template, which --system needs in eval.py.
        """
        existing = [name for name in self.any_of if name in chosen]
        return bool(chosen.get(self.option) and existing and not any(chosen[n] for n in existing))

    def text(self, chosen: Mapping[str, Any]) -> str:
        """Returns the error message."""
        needed = " or ".join(f"--{name}" for name in self.any_of)
        return self.message or f"--{self.option} needs {needed}"


@dataclass(frozen=True)
class Excludes:
    """The rule that the options `one` and `other` do not work together.

    message: the error, in which {} stands for the value of `other`; "": a message that names the
    options. `chosen` in the methods: see the file's docstring.
    """

    one: str
    other: str
    message: str = ""

    def broken(self, chosen: Mapping[str, Any]) -> bool:
        """Returns whether both options are used."""
        return bool(chosen.get(self.one) and chosen.get(self.other))

    def text(self, chosen: Mapping[str, Any]) -> str:
        """Returns the error message. Both options must be in `chosen`."""
        default = f"give --{self.one} or --{self.other}, not both"
        return self.message.format(chosen[self.other]) or default


def needs(options: str, *any_of: str) -> list[Needs]:
    """Returns a rule for each of the options, separated by blanks: it needs one of `any_of`."""
    return [Needs(option, any_of) for option in options.split()]


def excludes(options: str, other: str) -> list[Excludes]:
    """Returns a rule for each of the options, separated by blanks: it excludes `other`."""
    return [Excludes(option, other) for option in options.split()]


OPTION_RULES = (
    *needs("json", "bench"),
    *needs("random_mode", "random_weights"),
    *needs("compile_prefill", "compile"),
    *needs("micro_batches", "pipeline"),
    *needs("revision", "checkpoint_path"),
    *needs("device_memory host_memory compress_weight compress_cache", *PLACING),
    *needs("gpu_batch_size cpu_cache_compute", "percent"),
    *needs("link", "plan"),
    *needs("read_rate", "link"),
    *needs("dram_budget flash_window flash_threads flash_dir", "flash"),
    *excludes("checkpoint_path", "random_weights"),
    *excludes("prompt", "prompts"),
    *excludes("prompt", "prompt_file"),
    *excludes("prompt_file", "prompts"),
    *excludes("bench", "interactive"),
    *excludes("prompt_file prompts output chat", "bench"),
    *excludes("prompt prompt_file prompts output", "interactive"),
    *excludes("draft", "draft_checkpoint_path"),
    *excludes("offload", "percent"),
    *excludes("flash", "random_weights"),
    *excludes("plan", "flash"),
    # Options of eval.py. task_data is the files that tasks in --include_path read.
    *needs(
        "num_fewshot apply_chat_template gen_kwargs include_path log_samples use_cache", "tasks"
    ),
    *needs("stride", "perplexity"),
    *needs("log_samples", "output"),
    *needs("system", "apply_chat_template"),
    *needs("task_data", "include_path"),
)
# Rules about a model that is loaded. They are not applied with --plan, which loads no model.
MODEL_RULES = (
    Excludes(
        "flash", "placed", "--flash leaves neurons on disk, offloading whole layers: choose one"
    ),
    Excludes(
        "flash",
        "self_draft",
        "--draft {} copies a model that is in memory, and with --flash its neurons are not: give "
        "--draft_checkpoint_path, or --draft ngram",
    ),
    Excludes(
        "placed",
        "self_draft",
        "--draft {} copies a model that is in memory, and this one is offloaded: give "
        "--draft_checkpoint_path, or --draft ngram",
    ),
    Needs(
        "pipeline",
        ("ranks",),
        "--pipeline needs ranks: torchrun --nproc_per_node=2 generate.py ...",
    ),
    Excludes("ranks", "flash", "--flash is for one process, without torchrun"),
    Excludes(
        "ranks",
        "compress_weight",
        "--compress_weight is for one process: run quantize.py first",
    ),
    Excludes(
        "pipeline",
        "draft",
        "a pipeline does not verify draft tokens: omit the draft, or --pipeline",
    ),
    Excludes(
        "pipeline",
        "draft_checkpoint_path",
        "a pipeline does not verify draft tokens: omit the draft, or --pipeline",
    ),
    Excludes(
        "pipeline",
        "compile",
        "the stages of a pipeline are not compiled: omit --compile, or --pipeline",
    ),
)


def broken_rule(chosen: Mapping[str, Any], rules: Iterable[Needs | Excludes]) -> str | None:
    """Returns the message of the first rule that the chosen options break, or None.

    chosen: name of an option or feature -> its value; false if it is not used. Rules about names
    that `chosen` does not contain are skipped, as each command has only some of the options.
    """
    return next((rule.text(chosen) for rule in rules if rule.broken(chosen)), None)

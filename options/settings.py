"""The choices of a user, as frozen dataclasses with all defaults.

The commands make them from their options (cli/options.py). A program passes the fields of
LoadOptions to load_model by name.

Terms: a draft proposes tokens that the model verifies. A policy divides an offloaded model among
device, host and disk, and the rows (texts of a batch) into micro-batches. Ranks are processes that
run one model together.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # these import torch
    import torch

    from decoding import LoadedModel
    from ranks import Ranks
    from tiers.policy import Policy

SELF_DRAFTS = "self-int8", "self-int4"  # drafts made from the model itself, in fewer bits
DRAFTS = "ngram", *SELF_DRAFTS  # names of drafts that need no draft model
# Most draft tokens of a row in one verify pass, the model's call that checks them. The KV caches of
# layers with a sliding window are made for so many. With AMX a product of up to
# MAX_DRAFT_TOKENS + 1 = 16 rows takes about as long as one row: on a Xeon, in bfloat16, a verify
# pass over 16 tokens took 1.22 plain steps.
MAX_DRAFT_TOKENS = 15


class FromArguments:
    """A base of dataclasses that can be made from parsed options."""

    @classmethod
    def from_arguments(cls, args: Any, **overrides: Any) -> Self:
        """Returns the dataclass with the values of the options that have the names of its fields.

        args: an argparse.Namespace, which may have more options, and not all fields. overrides:
        values of fields, which replace those of options. A field that is in neither keeps its
        default.
        """
        names = {field.name for field in fields(cls)} & vars(args).keys()
        return cls(**({name: getattr(args, name) for name in names} | overrides))


@dataclass(frozen=True)
class FlashOptions:
    """How --flash leaves a model's feed-forward neurons on disk.

    memory (--dram_budget): the memory for weights: a share of all their bytes if at most 1, else
    bytes. window: the number of last tokens whose neurons stay in memory. depth (--flash_threads):
    the reads that the disk has pending at a time. A window or depth of None is chosen by measured
    costs (neurons/budget.py). directory: where flash.py wrote the neurons; None: beside the
    checkpoint.
    """

    memory: float = 0.5
    window: float | None = None
    depth: int | None = None
    directory: Path | None = None


@dataclass(frozen=True)
class LoadOptions:
    """Settings of load_model: how a model is loaded and run."""

    device: str = "auto"  # cuda, cuda:N, mps or cpu; auto: the first of these that exists
    dtype: "torch.dtype | str | None" = None  # dtype of the weights; None: as stored
    kv_dtype: str | None = None  # dtype of the KV cache: int8 or int4; None: that of the model
    compile: bool = False  # compile decoding with torch.compile
    compile_prefill: bool = False  # compile prefill, too
    # The source of draft tokens: one of DRAFTS, or a model or its path.
    draft: "str | Path | LoadedModel | None" = None
    # Draft tokens of a row in each verify pass, 1 to MAX_DRAFT_TOKENS; None: as many as pay.
    speculate_k: int | None = None
    policy: "Policy | None" = None  # where weights, KV cache and activations are (offload.py)
    flash: FlashOptions | None = None  # read feed-forward neurons from disk (neurons/)
    ranks: "Ranks | None" = None  # the processes that run the model together (ranks.py)
    pipeline: bool = False  # each rank has some layers (pp.py); False: a share of each (tp.py)
    micro_batches: int | None = None  # in a pipeline; None: enough to keep all stages busy

    def chosen(self) -> dict[str, Any]:
        """Returns each feature's name in options/rules.py -> its value, which is false if the
        feature is not in use. load_model applies MODEL_RULES to it. The value of "self_draft" is
        the name of the draft, because messages of the rules quote it."""
        return {
            "compile": self.compile,
            "draft": self.draft is not None,
            "self_draft": self.draft in SELF_DRAFTS and self.draft,
            "placed": self.policy is not None,
            "compress_weight": self.policy is not None and self.policy.compress_weight,
            "flash": self.flash is not None,
            "ranks": self.ranks is not None,
            "pipeline": self.pipeline,
        }


@dataclass(frozen=True)
class ModelChoice(FromArguments):
    """Which model a command runs: the files of a checkpoint, or a shape with random weights."""

    checkpoint_path: Path
    random_weights: Path | None = None  # a config.json
    random_mode: str | None = None  # int8 or int4: how random weights are quantised

    @property
    def name(self) -> str:
        return str(self.random_weights or self.checkpoint_path)


@dataclass(frozen=True)
class PlanOptions(FromArguments):
    """Settings that choose the policy, which divides a model among device, host and disk. Names of
    fields that FlexGen has are FlexGen's."""

    # Rows of all micro-batches together; not used with gpu_batch_size. None: all texts, or with
    # `percent` at most 16 rows of a micro-batch.
    batch_size: int | None = None
    device_memory: float | None = None  # bytes that may be used; None: the free ones less a reserve
    host_memory: float | None = None  # the same
    offload_dir: Path = Path("offload")  # where scratch files are written
    # Six numbers: the percentages of the weights on the device and on the host, then those of the
    # KV cache and of the activations; the rest is on disk. None: the planner chooses them.
    percent: tuple[float, ...] | None = None
    gpu_batch_size: int | None = None  # rows of a micro-batch
    num_gpu_batches: int = 1  # micro-batches computed with a layer before its weights are dropped
    compress_weight: bool = False  # round dense weights to 4 bits
    cpu_cache_compute: bool = False  # compute attention to a cache on the host there
    attn_sparsity: float = 1.0  # share of the tokens whose values that attention reads; 1: exact
    pin_weight: bool = True  # pin host memory, so that a GPU copies from it directly
    overlap: bool = True  # transfer while computing
    micro_batches: int | None = None  # in a pipeline of ranks; None: there is no pipeline
    plan: bool = False  # print the plan and do no more
    any_dtype: bool = False  # with `plan`: it may propose another dtype than the stored one
    downloaded: bool = True  # False: the weights are not yet on the disk, and must fit it


@dataclass(frozen=True)
class PromptOptions(FromArguments):
    """Which prompts a command continues, and how it encodes them. All fields but random_tokens are
    options of generate.py; None: not given."""

    prompt: tuple[str, ...] | None = None  # texts
    prompt_file: Path | None = None  # its whole text is one prompt
    prompts: Path | None = None  # a .txt or .jsonl file, a prompt in each line
    output: Path | None = None  # the file of results; None: texts go to stdout
    num_samples: int = 1  # texts for each prompt
    chat: bool = False  # apply the chat template
    system: str | None = None  # a system message for chats
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # variables of the template
    random_tokens: bool = False  # a prompt is a number: so many random tokens
    seed: int | None = None  # of random tokens; None: 0


@dataclass(frozen=True)
class CalibrationOptions:
    """The texts from which GPTQ, distillation and the predictors of active neurons learn."""

    file: Path | None = None  # a text file
    tasks: tuple[str, ...] = ()  # of lm_eval: their documents are the text
    seq_length: int = 2048  # tokens of each piece that is cut out of the text
    samples: int = 128  # pieces at most


@dataclass(frozen=True)
class PredictorOptions:
    """Settings of the training of flash.py's predictors of active neurons."""

    rank: int | None = None  # of a predictor's two matrices; None: by the model's width
    recall: float = 0.97  # share of the active neurons that a predictor must name
    epochs: int = 4  # passes over the calibration text; 0: matrices as initialised

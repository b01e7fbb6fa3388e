"""The choices of a user as frozen dataclasses: the only place of their defaults.

The commands fill them from their options (cli/options.py); a program passes the fields of
LoadOptions to load_model by name.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # these import torch
    import torch

    from decoding import LoadedModel
    from ranks import Ranks
    from tiers.policy import Policy

SELF_DRAFTS = "self-int8", "self-int4"
DRAFTS = "ngram", *SELF_DRAFTS  # or a draft model


class FromArguments:
    """A dataclass that takes its fields from parsed arguments of the same names."""

    @classmethod
    def from_arguments(cls, args: Any, **others: Any) -> Self:
        named = {field.name for field in fields(cls)} & vars(args).keys()
        return cls(**({name: getattr(args, name) for name in named} | others))


@dataclass(frozen=True)
class FlashOptions:
    """How a model's feed-forward neurons are left on disk.

    memory: for all its weights, a share of their bytes up to 1, else bytes. window: tokens whose
    neurons stay in memory. depth: reads in flight at a time. Both are chosen by cost if None.
    directory: of the pack; None: beside the checkpoint.
    """

    memory: float = 0.5
    window: float | None = None
    depth: int | None = None
    directory: Path | None = None


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded and run."""

    device: str = "auto"  # cuda, cuda:N, mps or cpu; auto: the first of these that exists
    dtype: "torch.dtype | str | None" = None  # of the weights; None: as stored
    kv_dtype: str | None = None  # of the KV cache: int8 or int4; None: the dtype of the model
    compile: bool = False  # decoding, by torch.compile
    compile_prefill: bool = False  # prefill, too
    # What proposes draft tokens: "ngram", one of SELF_DRAFTS, or a model or its path.
    draft: "str | Path | LoadedModel | None" = None
    speculate_k: int | None = None  # draft tokens of a step; None: as many as make it fastest
    policy: "Policy | None" = None  # where weights, KV cache and activations are (offload.py)
    flash: FlashOptions | None = None  # feed-forward neurons are read from disk (neurons/)
    ranks: "Ranks | None" = None  # the processes that run the model together (ranks.py)
    pipeline: bool = False  # each rank has some layers (pp.py), not a share of each (tp.py)
    micro_batches: int | None = None  # of a pipeline; None: as many as keep all its stages busy

    def chosen(self) -> dict[str, Any]:
        """The features in use, under the names that the rules have for them."""
        return {
            "compile": self.compile,
            "compile_prefill": self.compile_prefill,
            "draft": self.draft is not None,
            "self_draft": self.draft in SELF_DRAFTS and self.draft,
            "placed": self.policy is not None,
            "compress_weight": self.policy is not None and self.policy.compress_weight,
            "flash": self.flash is not None,
            "ranks": self.ranks is not None,
            "pipeline": self.pipeline,
            "micro_batches": self.micro_batches,
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
    """How offloading divides a model among device, host and disk; see tiers/policy.py."""

    batch_size: int | None = None  # rows of all micro-batches together
    device_memory: float | None = None  # bytes; None: what is free
    host_memory: float | None = None  # bytes
    offload_dir: Path = Path("offload")
    # By hand: percent of weights, KV cache and activations, each on the device and on the host.
    percent: tuple[float, ...] | None = None
    gpu_batch_size: int | None = None  # rows of a micro-batch
    num_gpu_batches: int = 1  # micro-batches that pass through a layer while its weights are there
    compress_weight: bool = False
    cpu_cache_compute: bool = False
    attn_sparsity: float = 1.0
    pin_weight: bool = True
    overlap: bool = True
    micro_batches: int | None = None  # of a pipeline
    plan: bool = False  # print the plan and do no more
    any_dtype: bool = False  # a plan may propose another dtype than the stored one
    downloaded: bool = True  # False: the weights are to be written to the disk that is measured


@dataclass(frozen=True)
class PromptOptions(FromArguments):
    """Which prompts a command continues, and how it encodes them."""

    prompt: tuple[str, ...] | None = None
    prompt_file: Path | None = None
    prompts: Path | None = None
    output: Path | None = None
    num_samples: int = 1
    chat: bool = False  # apply the chat template
    system: str | None = None
    random_tokens: bool = False  # a prompt is a number of random tokens
    seed: int | None = None


@dataclass(frozen=True)
class CalibrationOptions:
    """Which texts GPTQ, training and the predictors of active neurons learn from."""

    file: Path | None = None  # a text file
    tasks: tuple[str, ...] = ()  # of lm_eval: their documents are the text
    seq_length: int = 2048  # tokens of a text
    samples: int = 128  # texts at most


@dataclass(frozen=True)
class PredictorOptions:
    """How flash.py trains the predictors of active neurons."""

    rank: int | None = None  # None: by the model's width
    recall: float = 0.97  # share of active neurons to predict
    epochs: int = 4

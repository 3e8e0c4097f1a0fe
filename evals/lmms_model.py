"""`--model vtprune` of lmms-eval: any supported model under any pruner, with the cost of every answer."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import simple_parse_args_string

import vtprune
from vtprune.pictures import open_picture, open_pictures_in, whole_images
from vtprune.wrap import resolve

from .efficiency import RowCost
from .failures import InputError, SampleError
from .generation import Answer, answer_batch
from .journal import Journal, request_key
from .loading import first_line, load_model
from .prompts import Message, encode, images_of
from .settings import parse_keep, parse_value

MAX_NEW_TOKENS = 128


@dataclass
class VisionTokenCounts(TokenCounts):
    """lmms-eval's token counts with the cost of the vision tokens beside them."""

    cost: RowCost | None = None

    def to_dict(self) -> dict[str, Any]:
        """What lands in `token_counts` of the logged samples."""
        return {**super().to_dict(), **(self.cost.to_dict() if self.cost is not None else {})}


class VTPrune(lmms):
    """A vision-language model under one pruner, answering greedily.

    pretrained: a model id or folder (default: the bundled one); method, keep and any further option: as
    `vtprune.wrap` takes them; config: a folder with vtprune_config.json instead; batch_size: rows that are
    answered together; max_new_tokens: where a task sets none. `model` and `processor` hand in a loaded model,
    which is left as it is: its owner wraps it.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        method: str = "none",
        keep: int | float | str | None = None,
        config: str | None = None,
        positions: str = "original",
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        model: Any = None,
        processor: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() else 1
        self.max_new_tokens = int(max_new_tokens)
        self.journal: Journal | None = None
        self.on_answers: Callable[[int], None] = lambda count: None
        self.requests: list[Instance] = []
        if model is not None:
            self.model, self.processor = model, processor
            return
        self.model, self.processor = load_model(
            pretrained, device=device, dtype=dtype, attn_implementation=attn_implementation
        )
        if config is not None:
            if method != "none" or keep is not None or options:
                raise InputError("config: a folder says all of method, keep and options; give no others")
            given_to_wrap: Any = Path(config)
        else:
            chosen = parse_keep(keep) if isinstance(keep, str) else keep
            given = {name: parse_value(v) if isinstance(v, str) else v for name, v in options.items()}
            given_to_wrap = resolve(method, keep=chosen, **given)
        vtprune.wrap(self.model, given_to_wrap, positions=positions)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> VTPrune:
        """From `--model_args`, which may set what lmms-eval has a flag for (batch_size, device) too."""
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**flags, **simple_parse_args_string(arg_string)})

    @property
    def device(self) -> Any:
        """Where the model is."""
        return self.model.device

    def clean(self) -> None:
        """Keeps the model: lmms-eval would delete it after every task, and a sweep uses it again."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: benchmarks of vision-language models generate."""
        raise InputError("vtprune answers generate_until tasks, not loglikelihood ones")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise InputError("vtprune answers generate_until tasks, not multi-round ones")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One greedy answer per request, in the order of the requests."""
        self.requests = requests
        found: dict[int, dict[str, Any]] = {}
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            known = self.journal.get(_key(request)) if self.journal is not None else None
            if known is not None:
                found[i] = known
            else:
                groups[json.dumps(request.args[2], sort_keys=True, default=str)].append(i)
        self.on_answers(len(found))
        for indices in groups.values():
            # Rows of similar length share a batch, so that little of it is padding.
            indices.sort(key=lambda i: -len(requests[i].args[0]))
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                entries = [answer.to_dict() for answer in self._answer([requests[i] for i in batch])]
                found.update(zip(batch, entries, strict=True))
                if self.journal is not None:
                    keys = [_key(requests[i]) for i in batch]
                    self.journal.add(dict(zip(keys, entries, strict=True)))
                self.on_answers(len(batch))
        answers = [Answer.from_dict(found[i]) for i in range(len(requests))]
        _log_throughput(answers)
        return [_result(answer) for answer in answers]

    def inputs_of(self, requests: Sequence[Instance]) -> Any:
        """The padded batch of model inputs of some requests, on the CPU; raises SampleError."""
        chats = [self._chat(request) for request in requests]
        try:
            return encode(self.processor, chats)
        except Exception as error:
            for request, chat in zip(requests, chats, strict=True):
                self._try_alone(request, chat)
            raise SampleError(f"a batch cannot be encoded: {first_line(error)}") from error

    def _try_alone(self, request: Instance, chat: list[Message]) -> None:
        try:
            encode(self.processor, [chat])
        except Exception as error:
            sizes = ", ".join(f"{image.width}x{image.height}" for image in images_of(chat))
            raise SampleError(
                f"{self._name(request)}: the processor refuses it (images {sizes}): {first_line(error)}"
            ) from error

    def _answer(self, requests: list[Instance]) -> list[Answer]:
        options = requests[0].args[2]
        stops = options.get("until") or []
        inputs = self.inputs_of(requests)
        return answer_batch(
            self.model,
            self.processor.tokenizer,
            inputs,
            max_new_tokens=int(options.get("max_new_tokens") or self.max_new_tokens),
            stops=[stops] if isinstance(stops, str) else list(stops),
        )

    def _chat(self, request: Instance) -> list[Message]:
        _, to_messages, _, doc_id, task, split = request.args
        try:
            with whole_images():
                # Before the task's own functions: many of them call convert("RGB"), which loses what the door keeps.
                doc = open_pictures_in(self.task_dict[task][split][doc_id])
                chat = ChatMessages(messages=to_messages(doc)).to_hf_messages()
            for message in chat:
                for part in message["content"]:
                    if part["type"] == "image":
                        part["image"] = open_picture(part["image"])
        except Exception as error:
            raise SampleError(f"{self._name(request)}: cannot be read: {first_line(error)}") from error
        kinds = {part["type"] for message in chat for part in message["content"]} - {"text", "image"}
        if kinds:
            raise SampleError(f"{self._name(request)}: holds {' and '.join(kinds)}; vtprune takes images")
        return chat

    def _name(self, request: Instance) -> str:
        """The task, the place in it, and the sample's own id where it has one."""
        _, _, _, doc_id, task, split = request.args
        documents = self.task_dict[task][split]
        names = [name for name in ("id", "question_id") if name in getattr(documents, "column_names", ())]
        # Only that column is read: the sample's image may be what is broken.
        own = f" ({documents.select_columns(names[:1])[doc_id][names[0]]})" if names else ""
        return f"{task}, sample {doc_id}{own}"


def _key(request: Instance) -> str:
    context, _, options, doc_id, task, _ = request.args
    return request_key(task, doc_id, context, options)


def _result(answer: Answer) -> GenerationResult:
    counts = VisionTokenCounts(answer.input_tokens, answer.output_tokens, cost=answer.cost)
    return GenerationResult(answer.text, counts)


def _log_throughput(answers: Iterable[Answer]) -> None:
    """The run-level averages that lmms-eval prints and saves."""
    costs: list[RowCost] = []
    tokens, seconds = 0, 0.0
    for answer in answers:
        costs.append(answer.cost)
        tokens += answer.output_tokens
        seconds += answer.seconds
    names = ("visual_tokens", "kept_tokens", "flops", "flops_full", "kv_bytes", "kv_bytes_full", "prefill_ms")
    means = {name: sum(getattr(cost, name) for cost in costs) / len(costs) for name in names}
    log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, {"num_requests": len(costs), **means})

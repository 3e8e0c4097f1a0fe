"""`--model vtprune` of lmms-eval: any supported model under any pruner, with the cost of every answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

import vtprune
from vtprune.console.output import is_quiet
from vtprune.errors import InputError, SampleError, first_line
from vtprune.evals.lmms import table
from vtprune.evals.lmms.collecting import Question, collect
from vtprune.evals.lmms.efficiency import RowCost, summed
from vtprune.evals.lmms.gen_kwargs import read_generation
from vtprune.evals.lmms.generation import Answer, answer_batch
from vtprune.evals.lmms.instructions import Instructions, with_instruction
from vtprune.evals.lmms.journal import Journal, read_answer
from vtprune.evals.lmms.loglikelihood import Likelihood, continuation_ids, likelihoods
from vtprune.evals.lmms.model_args import ARGUMENTS, REFUSED, parse_model_args
from vtprune.evals.lmms.multi_round import Talk, talk_through
from vtprune.evals.lmms.requests import as_chat, check_no_cache, once_each, questions_of
from vtprune.evals.lmms.videos import video_in
from vtprune.evals.settings import UNPRUNED, holds_method
from vtprune.evals.untrained import told_untrained
from vtprune.loading.devices import device_of
from vtprune.loading.media import size_text
from vtprune.loading.model import load_model
from vtprune.loading.pictures import open_picture, open_pictures_in, whole_images
from vtprune.loading.prompts import (
    Message,
    check_chat,
    check_text,
    check_videos,
    encode_named,
    images_of,
    media_marks,
    takes_videos,
    videos_of,
)
from vtprune.loading.videos import FRAMES
from vtprune.method.pruner import Pruner
from vtprune.method.registry import option_names
from vtprune.method.resolving import folder_of, resolve
from vtprune.method.texts import folder_text, parse_keep, parse_value

MAX_NEW_TOKENS = 128
LMMS_EVAL_DEFAULTS = {"batch_size": "1"}


class VTPrune(lmms):
    """A vision-language model under one pruner.

    pretrained: a model id or folder (default: the bundled one; a folder with a method in it, as `vtprune train` leaves
    it, runs under that method, and without it under method=none); method: what vtprune/method/texts.py reads, as
    fastv:keep=0.5,layers=(2,5), or a folder with vtprune_config.json; keep and any further option: of that method;
    config: a folder, as `method`; positions: as `vtprune.wrap` takes them; device_map: as `load_model` takes it, in
    the place of a device; batch_size: rows that are answered together; max_new_tokens: where a task sets none; frames:
    of each video, evenly spread over it. `model` and `processor` hand in a loaded model, which is left as it is: its
    owner wraps it. Raises InputError for what it would not carry out.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        method: str | None = None,
        keep: int | float | str | None = None,
        config: str | None = None,
        positions: str = "original",
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_new_tokens: int | str = MAX_NEW_TOKENS,
        frames: int | str = FRAMES,
        model: Any = None,
        processor: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if max_batch_size is not None:
            raise InputError("max_batch_size: it goes with batch_size=auto, and vtprune takes a number of rows")
        self.batch_size = _whole("batch_size", batch_size, "rows that are answered together")
        self.max_new_tokens = _whole("max_new_tokens", max_new_tokens, "tokens of an answer")
        self.frames = _whole("frames", frames, "frames of a video")
        self.journal: Journal | None = None
        # Called with how many answers came; None: a bar of its own shows them.
        self.on_answers: Callable[[int], None] | None = None
        self.requests: list[Instance] = []
        if model is not None:
            given = {
                "pretrained": pretrained,
                "method": method,
                "keep": keep,
                "config": config,
                "positions": None if positions == "original" else positions,
                "device": device,
                "dtype": None if dtype == "auto" else dtype,
                "attn_implementation": attn_implementation,
                "device_map": device_map,
                **options,
            }
            idle = [name for name, value in given.items() if value is not None]
            if idle:
                raise InputError(f"model: one that is handed in is as its owner made it; leave out {', '.join(idle)}")
            self.model, self.processor = model, processor
        else:
            asked = _method(pretrained, method, config=config, keep=keep, options=options)
            own = folder_of(asked)
            beside = own is not None and (own / "config.json").is_file()
            self.model, self.processor = load_model(
                str(own) if pretrained is None and beside else pretrained,
                device=device,
                dtype=dtype,
                attn_implementation=attn_implementation,
                device_map=device_map,
            )
            with told_untrained(logger.warning):
                vtprune.wrap(self.model, asked, positions=positions)
        self._instructions = Instructions(self._write)
        # A model that is handed in belongs to somebody who has tables of their own.
        self._owner, self._warm = model is None, model is not None
        if self._owner:
            table.install()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> VTPrune:
        """From `--model_args`, which may set what lmms-eval has a flag for (batch_size, device) too; raises InputError
        where both say it, and differ."""
        given: dict[str, Any] = parse_model_args(arg_string, (*ARGUMENTS, *REFUSED), option_names())
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        for name in sorted(flags.keys() & given.keys()):
            # lmms-eval's own default for this flag cannot be told from one that was given.
            if str(flags[name]) not in (given[name], LMMS_EVAL_DEFAULTS.get(name)):
                raise InputError(
                    f"{name}: --{name} says {flags[name]} and --model_args {given[name]}; give one of them"
                )
        return cls(**{**flags, **given})

    @property
    def chat_template(self) -> str:
        """What lmms-eval asks for under `--apply_chat_template`, which its chat tasks cannot carry out."""
        raise InputError(
            "apply_chat_template: leave it out; every prompt goes through the model's own chat template already, and "
            "lmms-eval cannot build the contexts of chat tasks with it"
        )

    apply_chat_template = chat_template

    def _write(self, chat: Sequence[Message]) -> str:
        """A conversation as the model's chat template writes it."""
        written: str = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return written

    @property
    def device(self) -> Any:
        """Where the model takes its inputs."""
        return device_of(self.model)

    def clean(self) -> None:
        """Keeps the model: lmms-eval would delete it after every task, and a sweep uses it again."""

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """How likely each request's continuation is: the sum of its tokens' log-probabilities, with the sign turned,
        and whether greedy decoding would give it.

        The sign is that of lmms-eval's other models, which return a loss; its scoring takes the smallest for the
        likeliest. The numbers are in `text`: a bare pair would be made a text on its way. Raises SampleError for an
        empty continuation.
        """
        self.requests = asked = once_each(requests, self._with_continuation)
        check_no_cache(asked)
        self._check(asked)
        answers: list[Any] = self._collect(questions_of(asked, alike=True), asked, self._likelihoods)
        _log_throughput(answers)
        return [self._result((0.0 - one.logprob, one.greedy), [one]) for one in answers]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answers to all rounds of each request, in a list, and what they cost together."""
        self.requests = requests
        check_no_cache(requests)
        self._check_options(requests)
        self._check(requests)
        talks = [Talk(request, asked) for request, asked in zip(requests, questions_of(requests), strict=True)]

        def turn(talk: Talk) -> None:
            self._from_task(talk.request, talk.turn)

        def ask(questions: list[Question], batch: list[Instance]) -> list[Answer]:
            return self._collect(questions, batch, self._answer, progress=lambda answers: None)

        with self._progress(len(requests)) as progress:
            for start in range(0, len(talks), self.batch_size):
                batch = talks[start : start + self.batch_size]
                talk_through(batch, turn, ask, self._name)
                progress(len(batch))
        _log_throughput([answer for talk in talks for answer in talk.answers])
        return [self._result(talk.said, talk.answers) for talk in talks]

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer per request, in their order; what cannot be asked is refused before the first one."""
        self.requests = requests
        self._check_options(requests)
        self._check(requests)
        answers = self._collect(questions_of(requests), requests, self._answer)
        _log_throughput(answers)
        return [self._result(answer.text, [answer]) for answer in answers]

    def _collect(
        self,
        questions: Sequence[Question],
        requests: Sequence[Instance],
        answer: Callable[[list[Instance]], Sequence[Answer]],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """The answers to requests, batch by batch, of which the first is read once before; progress: who is told of
        them, in place of a bar."""

        def answered(places: list[int]) -> Sequence[Answer]:
            batch = [requests[place] for place in places]
            self._warm_up(batch)
            return answer(batch)

        with nullcontext(progress) if progress else self._progress(len(requests)) as told:
            found = collect(questions, answered, batch_size=self.batch_size, journal=self.journal, progress=told)
        return [read_answer(entry) for entry in found]

    def _with_continuation(self, request: Instance) -> Instance:
        """A request for a likelihood as a chat model's, with its continuation among the options."""
        given = request.args[1]
        if callable(given):
            to_target = given
            given = self._from_task(request, lambda doc: to_target(doc))
        asked = as_chat(request, {"continuation": given}, self._instructions)
        if not isinstance(given, str) or not given.strip():
            raise SampleError(f"{self._name(asked)}: a continuation is a text and not empty, got {given!r}")
        try:
            check_text(self.processor, given, self._name(asked))
        except InputError as error:
            raise SampleError(str(error)) from error
        return asked

    def _result(self, found: Any, answers: Sequence[Answer]) -> GenerationResult:
        """What lmms-eval is to score, and what the answers cost."""
        counts = table.VisionTokenCounts(
            sum(answer.input_tokens for answer in answers),
            sum(answer.output_tokens for answer in answers),
            cost=summed([answer.cost for answer in answers]) if len(answers) > 1 else answers[0].cost,
            shown=self._owner,
        )
        return GenerationResult(found, counts)

    @contextmanager
    def _progress(self, count: int) -> Iterator[Callable[[int], None]]:
        """What is told of answers as they come."""
        if self.on_answers is not None:
            yield self.on_answers
            return
        with tqdm(total=count, desc="answers", disable=self.rank != 0 or is_quiet()) as bar:

            def told(answers: int) -> None:
                bar.update(answers)

            yield told

    def _check_options(self, requests: Sequence[Instance]) -> None:
        """Raises InputError for options that would not be carried out."""
        options = {json.dumps(request.args[2], sort_keys=True, default=str): request.args[2] for request in requests}
        for given in options.values():
            read_generation(given, self.max_new_tokens)

    def _check(self, requests: Sequence[Instance]) -> None:
        """Raises InputError or SampleError for a system instruction without a place, videos that the model does not
        take, and questions that hold what stands for a picture."""
        instructions = {self._instructions.of(request) for request in requests}
        for instruction in sorted(instructions - {""}):
            self._instructions.check(instruction)
            check_text(self.processor, instruction, "system_instruction")
        if not takes_videos(self.processor):
            for task, request in {request.args[4]: request for request in reversed(requests)}.items():
                if any(part["type"] == "video" for part in _parts(self._messages(request))):
                    check_videos(self.processor, f"tasks: {task} shows videos")
        marks = media_marks(self.processor)
        for request in {id(one): one for one in requests}.values():
            # Only a task that takes its text apart itself may have used such a mark up.
            if any(mark in str(request.args[0]) for mark in marks):
                self._chat(request)

    def inputs_of(self, requests: Sequence[Instance]) -> Any:
        """The padded batch of model inputs of some requests, on the CPU; raises SampleError."""
        return self._encoded(requests, [self._chat(request) for request in requests])

    def _encoded(self, requests: Sequence[Instance], chats: list[list[Message]]) -> Any:
        def refused(place: int | None, reason: str) -> SampleError:
            if place is None:
                return SampleError(f"a batch cannot be encoded: {reason}")
            images, videos = images_of(chats[place]), videos_of(chats[place])
            shown = [("images", images)] * bool(images) + [("videos", videos)] * bool(videos)
            sizes = "; ".join(f"{kind} {', '.join(map(size_text, media))}" for kind, media in shown)
            return SampleError(f"{self._name(requests[place])}: the processor refuses it ({sizes}): {reason}")

        return encode_named(self.processor, chats, refused)

    def _warm_up(self, requests: list[Instance]) -> None:
        """Reads the first prompts once, untimed: the first forward is slower than any later one."""
        if self._warm:
            return
        self._warm = True
        # Samples are drawn as if nothing had been read.
        with torch.random.fork_rng():
            answer_batch(
                self.model, self.processor.tokenizer, self.inputs_of(requests), generation=read_generation({}, 2)
            )

    def _answer(self, requests: list[Instance]) -> list[Answer]:
        generation = read_generation(requests[0].args[2], self.max_new_tokens)
        return answer_batch(self.model, self.processor.tokenizer, self.inputs_of(requests), generation=generation)

    def _likelihoods(self, requests: list[Instance]) -> list[Likelihood]:
        tokenizer, chats = self.processor.tokenizer, [self._chat(request) for request in requests]
        texts = [request.args[2]["continuation"] for request in requests]
        return likelihoods(
            self.model,
            tokenizer,
            self._encoded(requests, chats),
            texts=texts,
            continuations=[
                continuation_ids(tokenizer, self._write(chat), text) for chat, text in zip(chats, texts, strict=True)
            ],
        )

    def _messages(self, request: Instance) -> list[Message]:
        """A request's conversation as its task writes it; raises SampleError for one that it cannot write."""
        to_messages = request.args[1]
        messages: list[Message] = self._from_task(
            request, lambda doc: ChatMessages(messages=to_messages(doc)).to_hf_messages()
        )
        return messages

    def _from_task(self, request: Instance, read: Callable[[Any], Any]) -> Any:
        """What a task's own function makes of a request's document; raises SampleError where that fails."""
        doc_id, task, split = request.args[-3:]
        try:
            with whole_images():
                # Before the task's own functions: many of them call convert("RGB"), which loses what the door keeps.
                return read(open_pictures_in(self.task_dict[task][split][doc_id]))
        except Exception as error:
            raise SampleError(f"{self._name(request)}: cannot be read: {first_line(error)}") from error

    def _chat(self, request: Instance) -> list[Message]:
        chat = self._messages(request)
        kinds = {part["type"] for part in _parts(chat)} - {"text", "image", "video"}
        if kinds:
            raise SampleError(f"{self._name(request)}: holds {' and '.join(kinds)}; vtprune takes images and videos")
        try:
            for part in _parts(chat):
                if part["type"] == "image":
                    part["image"] = open_picture(part["image"])
                elif part["type"] == "video":
                    check_videos(self.processor)
                    part["video"] = video_in(part, self.frames)
        except Exception as error:
            raise SampleError(f"{self._name(request)}: cannot be read: {first_line(error)}") from error
        try:
            check_chat(self.processor, chat, self._name(request))
        except InputError as error:
            raise SampleError(str(error)) from error
        return with_instruction(chat, self._instructions.of(request))

    def _name(self, request: Instance) -> str:
        """The task, the place in it, and the sample's own id where it has one."""
        doc_id, task, split = request.args[-3:]
        documents = self.task_dict[task][split]
        names = [name for name in ("id", "question_id") if name in getattr(documents, "column_names", ())]
        # Only that column is read: the sample's image may be what is broken.
        own = f" ({documents.select_columns(names[:1])[doc_id][names[0]]})" if names else ""
        return f"{task}, sample {doc_id}{own}"


def _parts(chat: Sequence[Message]) -> list[dict[str, Any]]:
    """Every part of every message."""
    return [part for message in chat for part in message["content"]]


def _method(
    pretrained: str | None,
    method: str | None,
    *,
    config: str | None,
    keep: int | float | str | None,
    options: dict[str, Any],
) -> str | list[Pruner]:
    """What `vtprune.wrap` is handed: a folder's name, or pruners; raises InputError for what would be left out."""
    given = {name: parse_value(value) if isinstance(value, str) else value for name, value in options.items()}
    if keep is not None:
        given["keep"] = parse_keep(keep) if isinstance(keep, str) else keep
    if config is not None:
        if method is not None or given:
            raise InputError("config: a folder says all of method, keep and options; give no others")
        if not Path(config).is_dir():
            raise InputError(f"config: {config} is not a folder with vtprune_config.json")
        method = folder_text(config)
    if method is None:
        named = ", ".join(f"{name}={value!r}" for name, value in given.items())
        if pretrained is not None and holds_method(pretrained):
            if given:
                raise InputError(
                    f"{named}: {pretrained} brings its own method with all options; give method=NAME or none"
                )
            return folder_text(pretrained)
        everything = given == {"keep": 1.0} and isinstance(given["keep"], float)
        if given and not everything:
            raise InputError(f"{named}: no method is given, so nothing would be pruned; give method=NAME")
        method = UNPRUNED
    if folder_of(method) is not None and not given:
        return method
    return resolve(method, **given)


def _whole(name: str, value: int | str, what: str) -> int:
    """A whole number of at least 1; raises InputError for anything else."""
    if not str(value).isascii() or not str(value).isdecimal() or int(value) < 1:
        raise InputError(f"{name}: a whole number of {what} (1 or more), got {value!r}")
    return int(value)


def _log_throughput(answers: Iterable[Answer]) -> None:
    """The run-level averages that lmms-eval prints and saves."""
    costs: list[RowCost] = []
    tokens, seconds = 0, 0.0
    for answer in answers:
        costs.append(answer.cost)
        tokens += answer.output_tokens
        seconds += answer.seconds
    # A process of several may have no request of a kind that others have.
    if not costs:
        return
    names = ("visual_tokens", "kept_tokens", "flops", "flops_full", "kv_bytes", "kv_bytes_full", "prefill_ms")
    means = {name: sum(getattr(cost, name) for cost in costs) / len(costs) for name in names}
    log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, {"num_requests": len(costs), **means})

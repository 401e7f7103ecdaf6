# SPDX-License-Identifier: Apache-2.0
"""Injects the settings into vLLM's shared renderer and counts tokens once a prompt is rendered.

Hooks: `vllm.renderers.online_renderer.OnlineRenderer.preprocess_chat` and `.preprocess_cmpl`, through which
chat, batch, completions, responses, messages, tokenize and `/invocations` all pass, and `.render_responses`
before the first of them. A client's own `mm_processor_kwargs` are judged first, under the operator's
`--trust-request-mm-kwargs`; only then is our entry added, so that flag never needs opening.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs
from vllm.exceptions import VLLMValidationError
from vllm.renderers.online_renderer import OnlineRenderer

from vllm_vtprune.context import PluginContext
from vllm_vtprune.contract import AUTO, KWARG
from vllm_vtprune.errors import SettingsError
from vllm_vtprune.kv_drop.plan import reuses
from vllm_vtprune.settings import Controls, PruneSettings
from vllm_vtprune.vision.placeholders import FIELDS
from vllm_vtprune.vision.processor import VISION_TOKENS
from vtprune_server.auto import AutoLevel
from vtprune_server.context import RequestContext, current_request, refusal
from vtprune_server.counts import TokenCounts
from vtprune_server.earlier_answers import readable
from vtprune_server.first_turn import first_turn_tokens
from vtprune_server.kv_plan import KVPlanner
from vtprune_server.question import question_of, with_question


class PrunedOnlineRenderer(OnlineRenderer):
    """vLLM's renderer with pruning settings resolved and injected per request."""

    vtprune_context: PluginContext
    kv_planner: KVPlanner | None
    model_presets: Mapping[str, str]
    auto: AutoLevel
    client_mm_kwargs_trusted: bool

    @staticmethod
    def install(
        renderer: OnlineRenderer,
        context: PluginContext,
        kv_planner: KVPlanner | None,
        model_presets: Mapping[str, str],
        auto: AutoLevel,
    ) -> PrunedOnlineRenderer:
        """Turn vLLM's renderer into this class, in place.

        vLLM's handlers hold references to the one instance before plugins are initialised
        (`init_app_state`), so replacing `state.online_renderer` alone would miss them.

        Args:
            renderer: vLLM's.
            context: the operator's policy and the model's facts.
            kv_planner: None without a prune layer.
            model_presets: the preset of each model name that names one.
            auto: which preset `auto` is.
        """
        if not isinstance(renderer, PrunedOnlineRenderer):
            renderer.__class__ = PrunedOnlineRenderer
            assert isinstance(renderer, PrunedOnlineRenderer)
            renderer.client_mm_kwargs_trusted = renderer.trust_request_mm_kwargs
            renderer.trust_request_mm_kwargs = True
        renderer.vtprune_context = context
        renderer.kv_planner = kv_planner
        renderer.model_presets = model_presets
        renderer.auto = auto
        return renderer

    async def render_responses(self, request: Any, **kwargs: Any) -> Any:
        """`OnlineRenderer.render_responses`, which fails at an earlier answer that begins with no text."""
        request.input = readable(request.input)
        return await super().render_responses(request, **kwargs)

    async def preprocess_chat(self, request: Any, messages: list[Any], *args: Any, **kwargs: Any) -> Any:
        """`OnlineRenderer.preprocess_chat`, with the request's settings in place."""
        with self._injected(request, messages) as settings:
            conversation, engine_inputs = await super().preprocess_chat(request, messages, *args, **kwargs)
        goes_on = self._as_its_first_turn(request, messages, settings)
        if goes_on is not None:
            turn = await first_turn_tokens(
                self, conversation, engine_inputs[0], request, messages, *args, **kwargs
            )
            if turn is not None:
                settings = replace(goes_on, kv=replace(goes_on.kv, first_turn=turn))
                self._inject_kv(request, settings)
        self._count(engine_inputs, request, settings)
        return conversation, engine_inputs

    async def preprocess_cmpl(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """`OnlineRenderer.preprocess_cmpl`, with the request's settings in place."""
        with self._injected(request) as settings:
            engine_inputs = await super().preprocess_cmpl(request, *args, **kwargs)
        self._count(engine_inputs, request, settings)
        return engine_inputs

    def _as_its_first_turn(
        self, request: Any, messages: Sequence[Any], settings: PruneSettings
    ) -> PruneSettings | None:
        """The settings of a later turn that may go on from what its first one kept; None for another request.

        What is dropped is then what would be at the first turn.
        """
        if self.kv_planner is None or not self.kv_planner.config.reuse_block:
            return None
        if not carries_an_answer(messages) or not _stands_kv_drop(request):
            return None
        first = self._resolve(request, settings.level)
        if not reuses(first.kv, self.kv_planner.config):
            return None
        return replace(first, vision=settings.vision)

    def resolve(self, request: Any, *, later_turn: bool = False) -> PruneSettings:
        """The settings of a request: headers over body over the model's name over the operator's default.

        Args:
            request: vLLM's request model.
            later_turn: it carries an earlier answer.

        Raises:
            VLLMValidationError: they cannot be served; vLLM answers 400 and names the field.
        """
        settings = self._resolve(request, self.auto.level, later_turn=later_turn)
        if (context := current_request.get()) is not None:
            context.settings = settings
        return settings

    def _resolve(self, request: Any, level: str | None, *, later_turn: bool = False) -> PruneSettings:
        context = current_request.get() or RequestContext()
        # run_batch bypasses the routes: the body field then comes with the request model
        body = context.body if context.body is not None else getattr(request, KWARG, None)
        try:
            by_model = self._named_by_model(context.model or getattr(request, "model", None))
            controls = context.headers.over(Controls.from_mapping(body)).over(by_model)
            if controls.fields and not self.vtprune_context.prunes:
                name = controls.name(next(iter(controls.fields)))
                raise SettingsError(f"{name} cannot be set: this server's model is not pruned.", name)
            policy = self.vtprune_context.policy
            return policy.resolve(controls, level, later_turn=later_turn)
        except SettingsError as error:
            raise refusal(error) from error

    def _named_by_model(self, model: str | None) -> Controls:
        preset = self.model_presets.get(model or "")
        return Controls({"preset": (preset, "model")} if preset is not None else {})

    @contextmanager
    def _injected(self, request: Any, messages: Sequence[Any] | None = None) -> Iterator[PruneSettings]:
        client_kwargs = getattr(request, "mm_processor_kwargs", None)
        validate_request_mm_kwargs(
            mm_processor_kwargs=client_kwargs,
            media_io_kwargs=getattr(request, "media_io_kwargs", None),
            trust_request_mm_kwargs=self.client_mm_kwargs_trusted,
        )
        _refuse_own_key(client_kwargs, "mm_processor_kwargs")
        messages = messages or ()
        later_turn = carries_an_answer(messages)
        settings = with_question(self.resolve(request, later_turn=later_turn), question_of(messages))
        if self.vtprune_context.policy.prune_layer is not None and hasattr(request, "vllm_xargs"):
            _refuse_own_key(request.vllm_xargs, "vllm_xargs")
            settings = _kv_compatible(request, settings)
            self._inject_kv(request, settings)
        # the request object belongs to this request alone; what follows must see the client's own value again
        request.mm_processor_kwargs = {**(client_kwargs or {}), KWARG: settings.vision.canonical()}
        try:
            yield settings
        except AssertionError as error:
            # vLLM truncates before it looks for the images' places (`_apply_prompt_updates` then finds none)
            if getattr(request, "truncate_prompt_tokens", None) is None:
                raise
            raise VLLMValidationError(
                "truncate_prompt_tokens cuts off the place of an image in the prompt: leave it out, or send "
                "fewer images.",
                parameter="truncate_prompt_tokens",
            ) from error
        finally:
            request.mm_processor_kwargs = client_kwargs

    def _inject_kv(self, request: Any, settings: PruneSettings) -> None:
        if (context := current_request.get()) is not None:
            context.settings = settings
        if hasattr(request, "vllm_xargs"):
            request.vllm_xargs = {**(request.vllm_xargs or {}), **settings.kv.extra_args()}

    def _count(self, engine_inputs: list[Any], request: Any, settings: PruneSettings) -> None:
        context = current_request.get()
        if context is None:
            return
        context.kv_planner = self.kv_planner
        for engine_input in engine_inputs:
            placeholders = engine_input.get("mm_placeholders") or {}
            ranges = [r for modality in FIELDS for r in placeholders.get(modality, ())]
            token_ids = engine_input.get("prompt_token_ids")
            counts = TokenCounts(
                vision_tokens=engine_input.get(VISION_TOKENS, 0),
                vision_tokens_kept=sum(r.get_num_embeds() for r in ranges),
                kv_tokens=len(token_ids or ()),
                kv_tokens_kept=len(token_ids or ()),
            )
            if self.kv_planner is not None:
                logprobs = getattr(request, "prompt_logprobs", None)
                plan = self.kv_planner.plan(engine_input, settings.kv, logprobs)
                counts.kv_tokens_kept = plan.kept + plan.behind
                counts.kv_tokens_by_layer = self.kv_planner.by_layer(plan)
                context.plans.append(plan)
            context.add(counts)


def carries_an_answer(messages: Sequence[Any]) -> bool:
    """Whether the model has answered before in this conversation; an answer to be continued is none."""
    roles = [m.get("role") if isinstance(m, Mapping) else getattr(m, "role", None) for m in messages[:-1]]
    return "assistant" in roles


def _refuse_own_key(mapping: Mapping[str, Any] | None, where: str) -> None:
    if mapping and KWARG in mapping:
        raise VLLMValidationError(
            f'{where}.{KWARG} cannot be set directly: send the X-VTPrune-* headers, or "{KWARG}" at the top '
            "level of the body.",
            parameter=f"{where}.{KWARG}",
        )


def _kv_compatible(request: Any, settings: PruneSettings) -> PruneSettings:
    """Refuse what cannot be answered once prompt tokens were dropped; `auto` then drops none."""
    if not settings.kv.drops:
        return settings
    if settings.level is not None and settings.preset == AUTO and not _stands_kv_drop(request):
        return replace(settings, kv=replace(settings.kv, keep=1.0, above=()))
    advice = "set kv_keep (header X-VTPrune-KV-Keep) to 1"
    if _asks_prompt_logprobs(request):
        raise VLLMValidationError(
            f"Prompt log-probabilities do not exist for dropped tokens: {advice}, or leave them out.",
            parameter="prompt_logprobs",
        )
    if getattr(request, "use_beam_search", False):
        raise VLLMValidationError(
            f"Beam search does not carry kv_keep: {advice}, or leave use_beam_search out.",
            parameter="use_beam_search",
        )
    return settings


def _asks_prompt_logprobs(request: Any) -> bool:
    echoed = getattr(request, "echo", False) and getattr(request, "logprobs", None) is not None
    return getattr(request, "prompt_logprobs", None) is not None or bool(echoed)


def _stands_kv_drop(request: Any) -> bool:
    return not (_asks_prompt_logprobs(request) or getattr(request, "use_beam_search", False))

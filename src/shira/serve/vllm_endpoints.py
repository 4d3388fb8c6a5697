# SPDX-License-Identifier: Apache-2.0
"""The endpoint plugin of vLLM: adapters chosen by the ``model`` field of the OpenAI routes.

Entry point ``shira`` of the group ``vllm.endpoint_plugins``, loaded by ``VLLM_PLUGINS=shira``. It
adds the routes of `shira.serve.http.routes` and the middleware `shira.serve.http.turns`, and
lists the adapters among ``/v1/models``. ``--api-key`` covers them. Settings are environment
variables:

- ``SHIRA_ADAPTERS``: the folder below which clients' paths lie; without it none can be loaded;
- ``SHIRA_PATIENCE``: see `shira.serve.scheduler.AdapterScheduler`; seconds, 0.5 if not given;
- ``SHIRA_MAX_ADAPTER_MEMORY``: bytes of each worker that adapters may take; all that is needed, if
  not given: see `shira.serve.holding`;
- ``SHIRA_MIXING``: ``on`` lets requests for different adapters run in one batch (see
  `shira.serve.mixed`); ``off`` if not given: they take turns;
- ``SHIRA_PACKED``: read by the workers, see `shira.serve.vllm_cpu`;
- ``SHIRA_BODY_LIMIT``: the largest body of a request to the model in bytes, 16 MiB if not given;
- ``SHIRA_JOURNAL``: the file from which a server that is started again has its adapters;
- ``SHIRA_READY``: a file that is made when they are there; ``shira serve`` looks for it.

One server process is supported: several would switch the weights under one another's requests.
Imports vLLM and FastAPI, which vLLM brings, on use.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from shira.errors import ConfigError, ServeError, shown
from shira.serve.client import AsyncClient
from shira.serve.http import routes
from shira.serve.http.names import folder_of_adapters
from shira.serve.http.routes import encoded
from shira.serve.http.service import AdapterService
from shira.serve.http.turns import BODY_LIMIT, Turns, answering, carrying
from shira.serve.messages import BASE_SALT, KEY, salted

FOLDER, PATIENCE, LIMIT = "SHIRA_ADAPTERS", "SHIRA_PATIENCE", "SHIRA_BODY_LIMIT"
JOURNAL, READY, MEMORY = "SHIRA_JOURNAL", "SHIRA_READY", "SHIRA_MAX_ADAPTER_MEMORY"
MIXING = "SHIRA_MIXING"


class ShiraEndpoints:
    """The object that vLLM makes of the entry point: routes first, the engine later."""

    name = "shira"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add routes and middleware to the FastAPI application."""
        from fastapi import Request
        from fastapi.responses import JSONResponse, Response

        def service() -> AdapterService | None:
            return getattr(app.state, "shira", None)

        async def call(request: Request) -> Response:
            data = b"" if request.method == "GET" else await request.body()
            status, value = await routes.answer(service(), request.scope["route"].path, data)
            return Response(encoded(value), status_code=status, media_type="application/json")

        async def models() -> JSONResponse:
            # vLLM's list, with a card for each adapter, like the base's
            listed = (await app.state.openai_serving_models.show_available_models()).model_dump()
            known = service()
            if known is not None and listed["data"]:
                base = listed["data"][0]
                listed["data"] += [
                    {**base, "id": name, "root": served.path or name, "parent": base["id"]}
                    for name, served in known.served.items()
                ]
            return JSONResponse(listed)

        call.__annotations__["request"] = Request  # FastAPI reads them; this one is local
        for path in sorted(routes.OWN_PATHS):
            app.add_api_route(path, call, methods=["POST"], response_model=None)
        app.add_api_route(routes.LIST, call, methods=["GET"], response_model=None)
        app.add_api_route("/v1/models", models, methods=["GET"], response_model=None)
        app.add_middleware(
            Turns, service=service, own_paths=routes.OWN_PATHS, body_limit=_bytes(LIMIT, BODY_LIMIT)
        )

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Reach the engine and make the service."""
        from vllm.logger import init_logger

        state.shira = None
        if engine_client is None:  # a server that only renders
            return
        parallel = engine_client.vllm_config.parallel_config
        if getattr(parallel, "_api_process_count", 1) > 1:
            raise ServeError(
                "shira's endpoints need --api-server-count 1: several server processes would "
                "switch the weights under one another's requests"
            )
        models = state.openai_serving_models
        memory = _bytes(MEMORY) if os.environ.get(MEMORY) else None
        client = await AsyncClient.of(engine_client, max_adapter_memory=memory)
        if client.active:  # the engine has been in use; this server begins with the base
            await client.deactivate()
        mixing = _mixing()
        if mixing:
            await client.mix()
            _hand_on(engine_client)
        journal = os.environ.get(JOURNAL)
        service = AdapterService(
            client,
            folder=folder_of_adapters(os.environ.get(FOLDER), FOLDER),
            base_models=[model.name for model in models.base_model_paths],
            patience=_seconds(os.environ.get(PATIENCE, "0.5")),
            taken=lambda name: name in models.lora_requests or bool(models.lora_resolvers),
            journal=Path(journal).expanduser() if journal else None,
            mixing=mixing,
        )
        if journal:
            for name, why in (await service.restore()).items():
                told = shown(journal), shown(name), shown(why)
                init_logger(f"vllm.{__name__}").error("not restored from %s: %s: %s", *told)
        state.shira = service
        _name_the_adapter(models)
        if os.environ.get(READY):
            Path(os.environ[READY]).touch()


def _name_the_adapter(models: Any) -> None:
    """Let responses carry the name of the adapter that answered, as they do for a LoRA."""
    name_of = models.model_name

    def model_name(lora_request: Any = None) -> Any:
        return (answering.get() if lora_request is None else None) or name_of(lora_request)

    models.model_name = model_name


def _hand_on(engine: Any) -> None:
    """Let each request that a route gives to the engine bring the adapter of its body along."""
    from vllm.exceptions import VLLMValidationError

    add = engine.add_request

    async def add_request(
        request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            carried = carrying.get()
        except LookupError:  # of a task that no request began: nobody knows whose it is
            raise VLLMValidationError("with mixed adapters only routes ask the engine") from None
        if KEY in (getattr(params, "extra_args", None) or ()):
            raise VLLMValidationError(f"{KEY} is not the client's: `model` names the adapter")
        if carried is not None:
            if not hasattr(params, "extra_args"):
                raise VLLMValidationError("an adapter that rides answers by generating only")
            prompt, params = carried.by(prompt, params)
        elif isinstance(prompt, dict) and prompt.get("cache_salt"):
            prompt = salted(prompt, BASE_SALT)  # a client's own could be that of an adapter
        return await add(request_id, prompt, params, *args, **kwargs)

    engine.add_request = add_request


def _mixing() -> bool:
    text = os.environ.get(MIXING, "off")
    if text not in ("on", "off"):
        raise ConfigError(f"{MIXING} is 'on' or 'off', not {text!r:.100}")
    return text == "on"


def _bytes(variable: str, default: int = 0) -> int:
    text = os.environ.get(variable, str(default))
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 16):
        raise ConfigError(f"{variable} is a number of bytes, not {text!r:.100}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{PATIENCE} is a number of seconds, not {text!r}") from None

"""Two addresses of vLLM's server: its recipes, and what they have touched. ThinkSteer's own server has them too.

vLLM asks for its key under /v1 alone, so these ask for it themselves.
"""

import hmac
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from thinksteer_vllm.settings import KEY

RECIPES, FIRED = "/thinksteer/recipes", "/thinksteer/fired"


class Addresses:
    """What vLLM makes of the entry point `vllm.endpoint_plugins`, where VLLM_PLUGINS names it."""

    name = "thinksteer"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.engine: Any = None
        self.keys: list[str] = []

    def attach_router(self, app: Any) -> None:
        from fastapi import Request
        from fastapi.responses import Response

        async def recipes(request: Request) -> Response:
            status, fields = self.recipes(request.headers.get("authorization"))
            return Response(json.dumps(fields), status, media_type="application/json")

        async def fired(request: Request) -> Response:
            status, fields = await self.fired(request.headers.get("authorization"))
            return Response(json.dumps(fields), status, media_type="application/json")

        for path, tell in ((RECIPES, recipes), (FIRED, fired)):
            app.add_api_route(path, tell, methods=["GET"], include_in_schema=False)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:  # noqa: ARG002
        self.engine = engine_client
        self.keys = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]

    def recipes(self, authorization: str | None) -> tuple[int, dict[str, Any]]:
        """The status, and the recipes step by step."""
        refused = self._refused(authorization)
        return refused or (200, {"object": "list", "data": self._settings().get("facts", [])})

    async def fired(self, authorization: str | None) -> tuple[int, dict[str, Any]]:
        """The status, and how many tokens each step has touched in each phase."""
        if refused := self._refused(authorization):
            return refused
        settings = self._settings()
        log = (await self.engine.collective_rpc("thinksteer_log"))[0] if settings else []  # every worker counts all
        return 200, {"recipes": {name: _rows(name, log, settings["steps"]) for name in settings.get("recipes", {})}}

    def _settings(self) -> Mapping[str, Any]:
        extra = self.engine.vllm_config.additional_config
        found = extra.get(KEY) if isinstance(extra, dict) else None
        return found or {}

    def _refused(self, authorization: str | None) -> tuple[int, dict[str, Any]] | None:
        given = (authorization or "").encode()
        if self.keys and not any(hmac.compare_digest(given, f"Bearer {key}".encode()) for key in self.keys):
            said = "The API key is missing or wrong: send it as Authorization: Bearer KEY."
            return 401, _error(said, "authentication_error", 401)
        if (settings := self._settings()) and not {"facts", "steps"} <= set(settings):
            said = (
                "This server's settings do not tell of its recipes' steps: write them with "
                "steer.engines.vllm.serving_settings."
            )
            return 501, _error(said, "server_error", 501)
        return None


def _rows(
    name: str, log: Sequence[Mapping[str, Any]], steps: Mapping[str, Sequence[Sequence[str]]]
) -> list[dict[str, Any]]:
    rows = []
    for row in sorted((row for row in log if row["recipe"] == name), key=lambda row: (row["step"], row["phase"])):
        kind, site, scope = steps[name][row["step"]]
        own = {"step": row["step"], "site": site, "kind": kind, "scope": scope, "phase": row["phase"]}
        rows.append({**own, "tokens": row["tokens"], "mean_ratio": None})  # which is not measured here
    return rows


def _error(said: str, kind: str, code: int) -> dict[str, Any]:
    return {"error": {"message": said, "type": kind, "param": None, "code": code}}

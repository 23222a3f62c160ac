"""The same model for those who deploy through LitServe: `LitServer(LitGPTAPI("out/mine/final"))`.

The one room that imports litserve. What LitServe does not do, this cannot either: see `litgpt.deploy.serve`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import litserve
import torch
from fastapi import HTTPException
from pydantic import ValidationError

from litgpt.deploy.schemas import PredictRequest
from litgpt.deploy.service import SETTINGS
from litgpt.errors import InputError
from litgpt.generate.sampling import Sampling
from litgpt.generate.session import conversation, load_session

if TYPE_CHECKING:
    from litgpt.generate.answers import Row


class LitGPTAPI(litserve.LitAPI):
    """`POST /predict`: {"prompt": ...} -> {"output": ...}.

    Args:
        checkpoint_dir: as `litgpt serve` takes it.
        precision, quantize, prompt_style: as there.
        max_new_tokens, temperature, top_k, top_p: where a request does not say.
        options: LitServe's own, such as max_batch_size: so many answers are written together.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        *,
        precision: str | None = None,
        quantize: str | None = None,
        prompt_style: str | None = None,
        max_new_tokens: int = 50,
        temperature: float = 0.8,
        top_k: int | None = 50,
        top_p: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.checkpoint_dir, self.most = checkpoint_dir, max_new_tokens
        self.loading = {"precision": precision, "quantize": quantize, "prompt_style": prompt_style}
        self.defaults = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    def setup(self, device: str) -> None:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        self.session = load_session(self.checkpoint_dir, max_rows=self.max_batch_size, **self.loading)  # type: ignore[arg-type]

    def decode_request(self, request: Any, **_: Any) -> PredictRequest:
        try:
            return PredictRequest.model_validate(request)
        except ValidationError as error:
            first = error.errors()[0]
            raise HTTPException(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def predict(self, x: Any, **_: Any) -> Any:
        """The answer to a request, or the answers to a batch of them."""
        rows = self._rows(x if isinstance(x, list) else [x])
        for _piece in self.session.pieces(rows):
            pass
        return [row.said for row in rows] if isinstance(x, list) else rows[0].said

    def encode_response(self, output: Any, **_: Any) -> Any:
        return {"output": output}

    def _rows(self, requests: list[PredictRequest]) -> list[Row]:
        rows: list[Row] = []
        try:
            for asked in requests:
                rows += self._start(asked)
        except InputError as error:
            for row in rows:
                self.session.engine.cancel(row.request)
            raise HTTPException(400, str(error)) from None
        return rows

    def _start(self, asked: PredictRequest) -> list[Row]:
        own = {name: value for name in SETTINGS if (value := getattr(asked, name)) is not None}
        bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
        seed = None if asked.seed is None else asked.seed % 2**63
        sampling = Sampling(**{**self.defaults, **own}, logit_bias=bias, seed=seed)  # type: ignore[arg-type]
        return self.session.start(
            self.session.encode(conversation(asked.prompt, asked.sys_prompt)),
            [sampling],
            max_new_tokens=asked.max_new_tokens or self.most,
            stop=asked.stops(),
            at_limit="stop" if asked.max_new_tokens is None else "refuse",
        )


class StreamingLitGPTAPI(LitGPTAPI):
    """The same, with a line {"output": ...} for each piece; LitServe wants a class of its own for it."""

    def __init__(self, checkpoint_dir: str | Path, **options: Any) -> None:
        super().__init__(checkpoint_dir, stream=True, **options)

    def predict(self, x: Any, **_: Any) -> Iterator[str]:
        for _index, text in self.session.pieces(self._rows([x])):
            if text:
                yield text

    def encode_response(self, output: Any, **_: Any) -> Iterator[dict[str, str]]:
        for text in output:
            yield {"output": text}

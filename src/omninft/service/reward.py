"""Rewards that another process computes: `omninft serve` there, `remote` in the recipe here.

A service that fails in mid-run costs the scores it could not give, each with its reason; it never makes the runner
split batches and ask a dead service again. One that cannot be reached when the run is put together is an error.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from omninft.rewards.registry import ComponentSpec, Input
from omninft.scorers.weights import JudgingModel
from omninft.service.messages import ENCODINGS, Encoding
from omninft.service.replies import RewardsReply, judging_model
from omninft.service.token import TOKEN_VARIABLE, read_token
from omninft.types import Clip, OmniNFTError, ScoreTable

if TYPE_CHECKING:
    from omninft.service.client import ServiceClient


class RemoteReward:
    """All rewards of one service, their components side by side with the service's routes, ranges and weights.

    Making one asks nobody anything. What the service serves is asked for once, at the first use of `components` (when
    the recipe's reward is built); a recipe's `components` select among them and weigh them as for any other reward.

    Options: `url` ("http://host:port"); the token from `token_file`, else the variable `token_env`, or `token` itself,
    which ends up in the run's config.yaml; `timeout`, seconds for all clips of one call together; `retries` of one
    request; `batch_clips` of one request; `parallel` requests; `encoding`, "tensors" (exact) or "media" (H.264 and
    AAC: lossy, for slow networks).
    """

    name = "remote"

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        token_file: str | Path | None = None,
        token_env: str = TOKEN_VARIABLE,
        timeout: float = 600.0,
        retries: int = 10,
        batch_clips: int = 8,
        parallel: int = 2,
        encoding: Encoding = "tensors",
    ) -> None:
        from omninft.service.client import ServiceClient

        if url is None:
            raise OmniNFTError("needs the option url: http://host:port of an `omninft serve`")
        parts = urlsplit(url) if isinstance(url, str) else None
        if (
            parts is None
            or parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
        ):
            raise OmniNFTError(f"reward 'remote': url is {url!r}, expected http://host:port or https://host")
        if encoding not in ENCODINGS:
            raise OmniNFTError(f"reward 'remote': encoding is {encoding!r}, expected one of: {', '.join(ENCODINGS)}")
        for option, value, least in (
            ("retries", retries, 0),
            ("batch_clips", batch_clips, 1),
            ("parallel", parallel, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise OmniNFTError(f"reward 'remote': {option} is {value!r}, expected a whole number from {least}")
        if not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
            raise OmniNFTError(f"reward 'remote': timeout is {timeout!r}, expected a positive number of seconds")
        token = token if token is not None else read_token(token_file, token_env)
        self.device = f"service {url}"  # it waits for the network: rewards of this machine need not wait with it
        self._client: ServiceClient = ServiceClient(url, token, timeout, retries, batch_clips, parallel, encoding)
        self._served: RewardsReply | None = None
        self._lock = threading.Lock()

    @property
    def served(self) -> RewardsReply:
        """What the service said of itself, asked once.

        Raises:
            OmniNFTError: it cannot be reached, refuses the token, or speaks another format.
        """
        with self._lock:
            if self._served is None:
                self._served = self._client.describe()
        return self._served

    @property
    def components(self) -> tuple[ComponentSpec, ...]:
        return tuple(component.spec for reward in self.served.rewards for component in reward.components)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Of all rewards served."""
        return tuple(dict.fromkeys(name for reward in self.served.rewards for name in reward.inputs))

    @property
    def licence(self) -> str:
        return "; ".join(f"{reward.name}: {reward.licence}" for reward in self.served.rewards)

    @property
    def model(self) -> JudgingModel | None:
        """One card for all models behind the service."""
        return judging_model(self.served.rewards)

    def missing(self) -> str | None:
        """None when every reward served can be used, else what the service lacks, or why it cannot be reached."""
        try:
            lacking = [reward.missing for reward in self._client.describe().rewards if reward.missing is not None]
        except OmniNFTError as error:
            return str(error)
        return f"{self._client.url}: {'; '.join(lacking)}" if lacking else None

    def score(self, clips: list[Clip]) -> ScoreTable:
        """[B, components of the service]; what the service did not score within `timeout` is missing, with reasons."""
        components = tuple(spec.component for spec in self.components)
        return self._client.score(clips, components, self.served.limits.limits)
